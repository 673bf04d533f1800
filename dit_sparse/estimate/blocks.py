"""What every estimate reads beyond q and k, and the arithmetic that estimates share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dit_sparse.kernels.pool import log_counts
from dit_sparse.order import Layout

# fp32 elements that one piece of an estimate may hold in its largest intermediate: 128 MiB, of which two live at once.
PIECE_ELEMENTS = 1 << 25


@dataclass(frozen=True, eq=False)
class Blocks:
    """Hold the blocks of one call, and what a score may read beyond q and k.

    scored: the first so many query blocks of the layout get scores. order: where each head has its own order of the
    video tokens, that of q, int64 [B, H, V]; what is remembered of query rows must not depend on it.
    """

    layout: Layout
    scored: int
    scale: float
    kv_lengths: Tensor | None = None  # int32 [B]
    seed: int = 0
    memory: dict[str, Any] = field(default_factory=dict)
    order: Tensor | None = None

    @property
    def q_start(self) -> Tensor:
        return self.layout.start[: self.scored]

    @property
    def q_length(self) -> Tensor:
        return self.layout.length[: self.scored]

    @property
    def scored_tokens(self) -> int:
        video_only = self.scored == self.layout.video_blocks
        return self.layout.grid.video_tokens if video_only else self.layout.grid.tokens

    def log_counts(self, batch: int) -> Tensor:
        """Return the log of each key block's visible tokens, fp32 [B, K]; -inf for none."""
        return log_counts(self.layout.start, self.layout.length, self.kv_lengths, batch)


def products(q: Tensor, k: Tensor, scale: float, bias: Tensor) -> Tensor:
    """Return scale * q.k + bias, fp32 [B, H, Q, K], in one product: q [B, Q, H, D], k [B, K, Hkv, D], bias [B, K].

    Sums are fp32 whatever the inputs are: half precision is multiplied as it is on a GPU, and as fp32 on a CPU.
    """
    batch, queries, heads, dim = q.shape
    keys, kv_heads = k.shape[1], k.shape[2]
    rows = q.transpose(1, 2).reshape(batch * kv_heads, -1, dim)  # the query heads of one key head side by side
    columns = k.transpose(1, 2).reshape(batch * kv_heads, keys, dim).transpose(1, 2)
    added = bias[:, None, None].expand(-1, kv_heads, 1, -1).reshape(batch * kv_heads, 1, keys)
    if q.is_cuda and q.dtype in (torch.float16, torch.bfloat16):
        score = torch.bmm(rows, columns, out_dtype=torch.float32).mul_(scale).add_(added)
    else:
        score = torch.baddbmm(added, rows.float(), columns.float(), alpha=scale)
    return score.view(batch, heads, queries, keys)


def pieces(
    heads: int, kv_heads: int, query_blocks: int, elements_per_block: int
) -> Iterator[tuple[slice, slice, slice]]:
    """Cut the work of an estimate so that no piece holds more than PIECE_ELEMENTS: heads first, then query blocks.

    elements_per_block: of one head and one query block, over the batch. Yields slices of the heads of q, the heads
    of k and the query blocks.
    """
    group = heads // kv_heads
    at_once = max(1, PIECE_ELEMENTS // (elements_per_block * group))
    step_blocks = min(query_blocks, at_once)
    step_heads = max(1, at_once // query_blocks)
    for first in range(0, kv_heads, step_heads):
        last = min(first + step_heads, kv_heads)
        for block in range(0, query_blocks, step_blocks):
            yield slice(first * group, last * group), slice(first, last), slice(block, block + step_blocks)


def mean_of_rows(log_mass: Tensor, log_weight: Tensor) -> Tensor:
    """Average the softmax over key blocks of the rows of each query block, in logs: [B, H, Q, P, K] -> [B, H, Q, K].

    log_weight [Q, P]: log of the share of each row in its query block, -inf for rows that do not count.
    """
    total = log_mass.logsumexp(-1, keepdim=True)
    share = log_mass - total.masked_fill(total == -torch.inf, 0.0)
    return (share + log_weight[..., None]).logsumexp(3)
