"""Run what a pattern chose: the road from q, k, v in kernel order to the output in kernel order."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dit_sparse.biased import BiasedKeys
from dit_sparse.kernels.backends import Backend, block_attention, compensated_attention
from dit_sparse.kernels.indices import BLOCK, BlockIndices, from_block_mask, pack_bits, segment_blocks
from dit_sparse.masks import MOST_MASKS
from dit_sparse.order import Layout
from dit_sparse.selection import Attended, Exact, HeadOrder, Selection


def attend_selection(
    selection: Selection,
    q: Tensor,  # [B, Sq, H, D] in kernel order: all tokens, or the video alone
    k: Tensor,  # [B, S, Hkv, D]
    v: Tensor,  # [B, S, Hkv, D]
    layout: Layout,
    scale: float,
    kv_lengths: Tensor | None,  # int32 [B]
    backend: str | Backend,
    biased: BiasedKeys | None = None,
) -> Attended:
    """Attend over the selected blocks, in the heads' own orders where the selection has them."""
    indices = selection.indices if q.shape[1] == layout.grid.tokens else selection.video_queries(layout)
    order = selection.head_order
    if order is not None:
        q, k, v = order.to_kernel(q, order.q), order.to_kernel(k, order.k), order.to_kernel(v, order.k)
    attended = attend_indices(q, k, v, indices, selection.compensate, scale, kv_lengths, backend, biased)
    if order is None:
        return attended
    out, lse = HeadOrder.from_kernel(attended.out, order.q), HeadOrder.from_kernel(attended.lse, order.q)
    same = attended.computed_lse is attended.lse
    return Attended(out, lse, lse if same else HeadOrder.from_kernel(attended.computed_lse, order.q))


def attend_indices(
    q: Tensor,  # [B, Sq, H, D] in kernel order
    k: Tensor,  # [B, S, Hkv, D]
    v: Tensor,  # [B, S, Hkv, D]
    indices: BlockIndices,
    compensate: bool,
    scale: float,
    kv_lengths: Tensor | None,  # int32 [B]
    backend: str | Backend,
    biased: BiasedKeys | None = None,
) -> Attended:
    """Attend the queries over the blocks that indices name for them, with means for the skipped ones if wanted."""
    if compensate:
        attended = Attended(
            *compensated_attention(q, k, v, indices, scale=scale, kv_lengths=kv_lengths, backend=backend)
        )
    else:
        out, lse = block_attention(q, k, v, indices, scale=scale, kv_lengths=kv_lengths, backend=backend)
        attended = Attended(out, lse, lse)
    return attended if biased is None else biased.added(attended, q, indices)


def exact_attention(
    k: Tensor,
    v: Tensor,
    layout: Layout,
    scale: float,
    kv_lengths: Tensor | None,
    backend: str,
    shared: dict[Any, Any],
    biased: BiasedKeys | None = None,
) -> Exact:
    """Return a function that attends some query rows [B, R, H, D] to all visible keys: (out, natural-log LSE).

    With `seen`, bool [R, S] in kernel order, to those keys only, by the same token mask for all heads.
    """

    def exact(rows: Tensor, seen: Tensor | None = None) -> tuple[Tensor, Tensor]:
        indices = _everything(rows, layout, shared)
        if seen is not None:
            indices = _masked(indices, seen)
        out, lse = block_attention(rows, k, v, indices, scale=scale, kv_lengths=kv_lengths, backend=backend)
        return (out, lse) if biased is None else biased.added(Attended(out, lse, lse), rows, indices)[:2]

    return exact


def _masked(indices: BlockIndices, seen: Tensor) -> BlockIndices:
    """Give every visited block of one head row its bit tile of a token mask, bool [Sq, Sk]; the host reads nothing.

    Raises: ValueError for more blocks than bit tiles can be numbered.
    """
    tiles_needed = indices.query_blocks * indices.key_blocks
    if tiles_needed > MOST_MASKS:
        raise ValueError(
            f"{len(seen)} rows over {indices.key_blocks} key blocks need {tiles_needed} bit tiles, at most "
            f"{MOST_MASKS} can be numbered; sample fewer rows"
        )
    lane = torch.arange(BLOCK, device=seen.device)
    rows = seen[(indices.q_start[:, None] + lane).clamp(max=seen.shape[0] - 1).flatten()]
    tiles = rows[:, (indices.kv_start[:, None] + lane).clamp(max=seen.shape[1] - 1)]  # [Q * 128, K, 128]
    tiles = (tiles & (lane < indices.kv_len[:, None])).unflatten(0, (-1, BLOCK)).transpose(1, 2)
    shape = (1, indices.query_blocks, indices.key_blocks)
    number = torch.arange(shape[1] * shape[2], dtype=torch.int16, device=seen.device).view(shape)
    return replace(indices, partial_bits=indices.bits, mask_id=number, masks=pack_bits(tiles.flatten(0, 1)))


def _everything(rows: Tensor, layout: Layout, shared: dict[Any, Any]) -> BlockIndices:
    """Return indices in which every query reads every key, for rows [B, R, H, D]."""
    key = ("everything", tuple(rows.shape[:3]), rows.device)
    if key not in shared:
        start, length = segment_blocks([rows.shape[1]])
        mask = torch.ones(1, len(start), layout.blocks, dtype=torch.bool, device=rows.device)
        head_of = torch.zeros(rows.shape[0] * rows.shape[2], dtype=torch.int32)
        shared[key] = from_block_mask(mask, head_of, start, length, layout.start, layout.length)
    indices: BlockIndices = shared[key]
    return indices
