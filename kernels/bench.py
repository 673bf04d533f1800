"""Block lists for benchmarks, ours and those of other projects; the benchmark itself is `dit-sparse bench kernels`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dit_sparse.kernels.backends import block_attention
from dit_sparse.kernels.indices import BLOCK, BlockIndices, from_block_mask, segment_blocks


def run_blocks(q: Tensor, k: Tensor, v: Tensor, idx: Tensor, cnt: Tensor, backend: str = "auto") -> Tensor:
    """Attend over given lists of 128-blocks: the entry for benchmarks of other projects.

    q [B, H, N, D]; k, v [B, H, M, D]; idx int32 [B, H, Q, MAX], of which the first cnt int32 [B, H, Q] entries of a row
    count; entries of a row are distinct. Returns out [B, H, N, D].

    Raises: ValueError for lists of another shape, and what block_attention raises.
    """
    blocks_shape = (*q.shape[:2], -(-q.shape[2] // BLOCK))
    if idx.dim() != 4 or tuple(idx.shape[:3]) != blocks_shape or tuple(cnt.shape) != blocks_shape:
        raise ValueError(
            f"idx must be [B, H, Q, MAX] and cnt [B, H, Q] with B, H, Q = {blocks_shape}, "
            f"got idx={tuple(idx.shape)}, cnt={tuple(cnt.shape)}"
        )
    listed = torch.arange(idx.shape[3], device=idx.device) < cnt[..., None]
    # One column too many takes the entries that do not count.
    key_blocks = -(-k.shape[2] // BLOCK)
    mask = torch.zeros((*blocks_shape, key_blocks + 1), dtype=torch.bool, device=idx.device)
    mask.scatter_(-1, idx.masked_fill(~listed, key_blocks).long(), True)
    indices = block_indices(mask[..., :-1].flatten(0, 1), q.shape[2], k.shape[2])
    out, _ = block_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), indices, backend=backend)
    return out.transpose(1, 2)


def local_and_random(heads: int, blocks: int, density: float, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Draw lists with a local band and random blocks, equally many a row: idx int32 [1, H, Q, count], cnt [1, H, Q]."""
    count = max(1, round(blocks * density))
    idx = kept_blocks([count] * heads, blocks, device).nonzero()[:, 2].to(torch.int32)
    return idx.view(1, heads, blocks, count), torch.full((1, heads, blocks), count, dtype=torch.int32, device=device)


def kept_blocks(counts: Sequence[int], blocks: int, device: torch.device | str) -> Tensor:
    """Draw what each row of head h keeps, counts[h] blocks: a local band and random ones, bool [H, Q, K]."""
    place = torch.arange(blocks, device=device)
    many = torch.tensor([min(blocks, max(1, count)) for count in counts], device=device)[:, None, None]
    band = (place[:, None] - place).abs() < (many // 2).clamp_min(1) // 2
    score = torch.rand((len(counts), blocks, blocks), device=device) + 2.0 * band
    rank = score.argsort(-1, descending=True).argsort(-1)
    return rank < many


def block_indices(mask: Tensor, q_tokens: int, kv_tokens: int) -> BlockIndices:
    """Build indices over 128-blocks in order from bool [B*H, Q, K]; all that is kept is seen whole."""
    q_start, q_len = segment_blocks([q_tokens])
    kv_start, kv_len = segment_blocks([kv_tokens])
    return from_block_mask(mask, torch.arange(mask.shape[0], dtype=torch.int32), q_start, q_len, kv_start, kv_len)
