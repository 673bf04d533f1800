"""K-means over the tokens of each head, and the order in which they then stand."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dit_sparse.estimate import blocks
from dit_sparse.selection import HeadOrder

# Rounds at the first search of a run and, from the centroids of the last one, at later ones (Sparse VideoGen2).
FIRST_ROUNDS, WARM_ROUNDS = 50, 2


def cluster_order(
    q: Tensor,  # [B, S, H, D]
    k: Tensor,  # [B, S, Hkv, D]
    video_tokens: int,
    clusters: tuple[int, int],  # of queries and of keys
    memory: dict[str, Any],  # holds the centroids of the last search
    kv_lengths: Tensor | None = None,  # int32 [B]
) -> HeadOrder:
    """Sort the video tokens of every head by their k-means cluster; those of one cluster keep their order.

    Hidden keys belong to no cluster and come last. Clusters have all sizes, while kernels want blocks of 128 tokens:
    blocks are cut from the sorted tokens without regard to the borders of clusters, where Sparse VideoGen2 makes a
    block of each cluster, however large. Keys that query heads share are sorted once.

    Papers: Sparse VideoGen2 (arXiv 2505.18875); Routing Transformer (arXiv 2003.05997)
    """
    orders = []
    for name, x, count in (("q", q, clusters[0]), ("k", k, clusters[1])):
        batch, heads = x.shape[0], x.shape[2]
        points = x[:, :video_tokens].transpose(1, 2).flatten(0, 1)  # [B * heads, V, D]
        hidden = None
        if name == "k" and kv_lengths is not None:
            place = torch.arange(video_tokens, device=x.device)
            hidden = (place >= kv_lengths[:, None]).repeat_interleave(heads, 0)
        known = memory.get(f"centroids of {name}")
        centroids, label = kmeans(points, count, known, hidden, FIRST_ROUNDS if known is None else WARM_ROUNDS)
        memory[f"centroids of {name}"] = centroids
        orders.append(label.argsort(dim=-1, stable=True).view(batch, heads, video_tokens))
    return HeadOrder(*orders)


def kmeans(
    points: Tensor,  # [G, V, D]
    count: int,
    centroids: Tensor | None = None,  # fp32 [G, C, D] to start from
    hidden: Tensor | None = None,  # bool [G, V]
    rounds: int = FIRST_ROUNDS,
) -> tuple[Tensor, Tensor]:
    """Cluster points by Euclidean distance in a fixed number of rounds: centroids fp32 [G, C, D], labels int64 [G, V].

    Starts from evenly spread points. A cluster that loses all its points keeps its centroid. Hidden points get the
    label C. bf16 points are multiplied as they are, which only matters between nearly equal distances.
    """
    points = points if points.dtype == torch.bfloat16 else points.float()
    if hidden is not None:
        points = points.masked_fill(hidden[..., None], 0.0)
    tokens = points.shape[1]
    if centroids is None:
        count = min(count, tokens)
        spread = (torch.arange(count, device=points.device) * 2 + 1) * tokens // (2 * count)
        centroids = points[:, spread].float()
    for _ in range(rounds):
        _, total, members = _assign(points, centroids, hidden, with_sums=True)
        centroids = torch.where(members > 0, total / members.clamp(min=1.0), centroids)
    return centroids, _assign(points, centroids, hidden, with_sums=False)[0]


def _assign(points: Tensor, centroids: Tensor, hidden: Tensor | None, with_sums: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Name the nearest centroid of every point [G, V], and sum the points of each: [G, C, D] and counts [G, C, 1].

    Some tokens at a time. Sums are products with one-hot rows: additions in a fixed order, where a scatter has none.
    """
    (group, tokens, _), count = points.shape, centroids.shape[1]
    half_norm = centroids.square().sum(-1)[:, None] / 2
    label = torch.empty(group, tokens, dtype=torch.int64, device=points.device)
    total, members = torch.zeros_like(centroids), torch.zeros_like(centroids[..., :1])
    across = centroids.transpose(1, 2).to(points.dtype)
    step = max(1, blocks.PIECE_ELEMENTS // (group * count))
    for first in range(0, tokens, step):
        some = slice(first, first + step)
        near = torch.baddbmm(half_norm.to(points.dtype), points[:, some], across, beta=-1).argmax(-1)
        if hidden is not None:
            near = near.masked_fill(hidden[:, some], count)
        label[:, some] = near
        if with_sums:
            mine = near[..., None] == torch.arange(count, device=points.device)  # [G, c, C]
            total += (mine.to(points.dtype).transpose(1, 2) @ points[:, some]).float()
            members += mine.sum(1, dtype=torch.float32)[..., None]
    return label, total, members
