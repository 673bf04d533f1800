"""Padded lists of key blocks, made from the bitmaps of BlockIndices once per call: what the kernels loop over."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dit_sparse.kernels.indices import BLOCK, BlockIndices, unpack_bits

NO_TILE = -1


@dataclass(frozen=True, eq=False)
class BlockLists:
    """Name the key blocks of every query block: full ones ascending, then partial ones ascending.

    A full block needs no mask at all. A partial block carries a bit tile, or is short, or is cut by kv_lengths.
    Example, K = 4: visited {0, 1, 3}, block 1 with tile 7, block 3 short -> blocks 0 1 3 ?, tiles ? 7 -1 ?,
    full_count 1, partial_count 2. Entries marked ? are not written.
    """

    blocks: Tensor  # int16 [R, Q, K]
    tiles: Tensor | None  # int16 [R, Q, K]: row of masks, or -1 where only lengths cut; None: no block has a tile
    full_count: Tensor  # int32 [R, Q]
    partial_count: Tensor  # int32 [R, Q]
    row_of: Tensor  # int32 [B*H]: entry b*H + h names the row of R
    # int32 [B*H*Q, 4], what is computed at a time: b*H + h, place in the counts (row * Q + query block), full blocks,
    # all blocks. Heads follow one another, so that their keys stay in cache, those that visit the most blocks first:
    # they would run alone at the end.
    items: Tensor


def has_partial(indices: BlockIndices, key_tokens: int, kv_lengths: Tensor | None) -> bool:
    """Tell whether any list can hold a partial block, from shapes alone: nothing is read from the device."""
    return indices.partial_bits is not None or kv_lengths is not None or key_tokens != BLOCK * indices.key_blocks


def list_rows(indices: BlockIndices, kv_lengths: Tensor | None) -> int:
    """Count the rows of the lists: U, or B*H where kv_lengths make them differ by batch."""
    return indices.rows if kv_lengths is None else indices.heads


def compact(indices: BlockIndices, kv_lengths: Tensor | None = None) -> BlockLists:
    """Compact bitmaps into lists in plain torch: the slow twin of triton_lists.compact.

    kv_lengths: int32 [B]. Key blocks that begin at or after a batch's length are dropped, those that cross it become
    partial; the lists then have one row per entry of head_of.
    """
    visited = indices.block_mask()
    tiled = indices.partial_mask()
    row_of = indices.head_of
    cut = (indices.kv_len < BLOCK)[None, None]
    tiles = None if indices.mask_id is None else indices.mask_id.masked_fill(~tiled, NO_TILE)
    if kv_lengths is not None:
        rows = indices.head_of.long()
        limit = kv_lengths.repeat_interleave(indices.heads // kv_lengths.shape[0])[:, None, None]
        visited = visited[rows] & (indices.kv_start < limit)
        tiled = tiled[rows]
        cut = cut | (indices.kv_start + indices.kv_len > limit)
        tiles = None if tiles is None else tiles[rows]
        row_of = torch.arange(indices.heads, dtype=torch.int32, device=indices.device)
    partial = visited & (tiled | cut)
    full = visited & ~partial
    rank = torch.where(full, 0, torch.where(partial, 1, 2))
    order = torch.argsort(rank, dim=-1, stable=True)
    full_count = full.sum(-1, dtype=torch.int32)
    partial_count = partial.sum(-1, dtype=torch.int32)
    return BlockLists(
        blocks=order.to(torch.int16),
        tiles=None if tiles is None else tiles.gather(-1, order),
        full_count=full_count,
        partial_count=partial_count,
        row_of=row_of,
        items=_items(full_count, full_count + partial_count, row_of),
    )


def _items(full: Tensor, count: Tensor, row_of: Tensor) -> Tensor:
    """Order the heads by their blocks and write out their query blocks; see BlockLists.items."""
    query_blocks = count.shape[1]
    heads = count.sum(-1)[row_of.long()].argsort(descending=True, stable=True)[:, None]
    entry = row_of[heads].long() * query_blocks + torch.arange(query_blocks, device=count.device)
    fields = (heads.expand_as(entry), entry, full.flatten()[entry], count.flatten()[entry])
    return torch.stack([field.to(torch.int32) for field in fields], -1).flatten(0, 1)


def tile_masks(indices: BlockIndices) -> Tensor:
    """Expand the bit tiles and add one of all ones at the end, so that -1 finds it: bool [M + 1, 128, 128]."""
    ones = torch.ones((1, BLOCK, BLOCK), dtype=torch.bool, device=indices.device)
    if indices.masks is None:
        return ones
    return torch.cat((unpack_bits(indices.masks, BLOCK), ones))
