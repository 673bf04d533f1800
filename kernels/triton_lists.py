"""Compaction on the device: bitmaps of BlockIndices to padded int16 lists, without a value read by the host."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_sparse.kernels.indices import BLOCK, BlockIndices
from dit_sparse.kernels.lists import BlockLists, list_rows

# Query blocks whose counts are read at a time, of every head.
COUNTS_CHUNK = 32


def compact(indices: BlockIndices, kv_lengths: Tensor | None = None) -> BlockLists:
    """Compact bitmaps into lists; the same contract as its slow twin lists.compact.

    Entries past full_count + partial_count are not written. CUDA-graph safe: shapes alone decide every size.
    """
    rows, query_blocks, key_blocks = list_rows(indices, kv_lengths), indices.query_blocks, indices.key_blocks
    shape = (rows, query_blocks, key_blocks)
    device = indices.device
    lists = BlockLists(
        blocks=torch.empty(shape, dtype=torch.int16, device=device),
        tiles=None if indices.mask_id is None else torch.empty(shape, dtype=torch.int16, device=device),
        full_count=torch.empty(shape[:2], dtype=torch.int32, device=device),
        partial_count=torch.empty(shape[:2], dtype=torch.int32, device=device),
        row_of=indices.head_of if kv_lengths is None else torch.arange(rows, dtype=torch.int32, device=device),
        items=torch.empty((indices.heads * query_blocks, 4), dtype=torch.int32, device=device),
    )
    _compact[(rows * query_blocks,)](
        indices.bits,
        indices.partial_bits,
        indices.mask_id,
        indices.head_of,
        indices.kv_start,
        indices.kv_len,
        kv_lengths,
        lists.blocks,
        lists.tiles,
        lists.full_count,
        lists.partial_count,
        query_blocks,
        key_blocks,
        indices.bits.shape[2],
        1 if kv_lengths is None else indices.heads // kv_lengths.shape[0],
        BLOCK=BLOCK,
        CHUNK=min(1024, max(32, triton.next_power_of_2(key_blocks))),
        num_warps=4,
    )
    _write_items[(indices.heads,)](
        lists.full_count,
        lists.partial_count,
        lists.row_of,
        lists.items,
        indices.heads,
        query_blocks,
        HEADS=triton.next_power_of_2(indices.heads),
        CHUNK=COUNTS_CHUNK,
        num_warps=4,
    )
    return lists


@triton.jit
def _compact(
    bits_ptr,  # int32 [U, Q, W]
    partial_ptr,  # int32 [U, Q, W] or None
    mask_id_ptr,  # int16 [U, Q, K] or None
    head_of_ptr,  # int32 [B*H]
    kv_start_ptr,  # int32 [K]
    kv_len_ptr,  # int32 [K]
    kv_lengths_ptr,  # int32 [B] or None
    blocks_ptr,  # int16 [R, Q, K], written
    tiles_ptr,  # int16 [R, Q, K] or None, written
    full_count_ptr,  # int32 [R, Q], written
    partial_count_ptr,  # int32 [R, Q], written
    query_blocks,
    key_blocks,
    words,
    heads,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One program writes the list of one (row, query block): a pass for full blocks, then one for partial blocks."""
    pid = tl.program_id(0)
    row = pid // query_blocks
    query_block = pid % query_blocks
    source_row = row
    limit = 2147483647
    if kv_lengths_ptr is not None:
        source_row = tl.load(head_of_ptr + row)
        limit = tl.load(kv_lengths_ptr + row // heads)
    source = source_row.to(tl.int64) * query_blocks + query_block
    target = pid.to(tl.int64) * key_blocks
    written = 0
    full_total = 0
    for want_partial in tl.static_range(2):
        for first in range(0, key_blocks, CHUNK):
            block = first + tl.arange(0, CHUNK)
            inside = block < key_blocks
            word = tl.load(bits_ptr + source * words + block // 32, mask=inside, other=0)
            start = tl.load(kv_start_ptr + block, mask=inside, other=0)
            length = tl.load(kv_len_ptr + block, mask=inside, other=0)
            visited = inside & (((word >> (block % 32)) & 1) != 0) & (start < limit)
            partial = (length < BLOCK) | (start + length > limit)
            tile = tl.full([CHUNK], -1, tl.int16)
            if partial_ptr is not None:
                partial_word = tl.load(partial_ptr + source * words + block // 32, mask=inside, other=0)
                tiled = ((partial_word >> (block % 32)) & 1) != 0
                partial = partial | tiled
                if want_partial == 1:
                    tile = tl.load(mask_id_ptr + source * key_blocks + block, mask=visited & tiled, other=-1)
            chosen = (visited & partial) if want_partial == 1 else (visited & (partial == 0))
            flag = chosen.to(tl.int32)
            place = target + written + tl.cumsum(flag, 0) - flag
            tl.store(blocks_ptr + place, block.to(tl.int16), mask=chosen)
            if want_partial == 1:
                if tiles_ptr is not None:
                    tl.store(tiles_ptr + place, tile, mask=chosen)
            written += tl.sum(flag, 0)
        if want_partial == 0:
            full_total = written
    tl.store(full_count_ptr + pid, full_total)
    tl.store(partial_count_ptr + pid, written - full_total)


@triton.jit
def _write_items(
    full_count_ptr,  # int32 [R, Q]
    partial_count_ptr,  # int32 [R, Q]
    row_of_ptr,  # int32 [B*H]
    items_ptr,  # int32 [B*H*Q, 4], written
    heads,
    query_blocks,
    HEADS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Write the items of one head at its place: every program counts the blocks of all heads."""
    own = tl.program_id(0)
    head = tl.arange(0, HEADS)
    row = tl.load(row_of_ptr + head, mask=head < heads, other=0).to(tl.int64) * query_blocks
    total = tl.zeros([HEADS], tl.int32)
    for first in range(0, query_blocks, CHUNK):
        block = first + tl.arange(0, CHUNK)
        inside = (head[:, None] < heads) & (block[None, :] < query_blocks)
        place = row[:, None] + block[None, :]
        full = tl.load(full_count_ptr + place, mask=inside, other=0)
        total += tl.sum(full + tl.load(partial_count_ptr + place, mask=inside, other=0), 1)
    mine = tl.sum(tl.where(head == own, total, 0), 0)
    before = (head < heads) & ((total > mine) | ((total == mine) & (head < own)))
    rank = tl.sum(before.to(tl.int32), 0)
    entry = tl.load(row_of_ptr + own) * query_blocks
    for first in range(0, query_blocks, 128):
        block = first + tl.arange(0, 128)
        inside = block < query_blocks
        full = tl.load(full_count_ptr + entry + block, mask=inside, other=0)
        partial = tl.load(partial_count_ptr + entry + block, mask=inside, other=0)
        record = items_ptr + (rank * query_blocks + block) * 4
        tl.store(record, own, mask=inside)
        tl.store(record + 1, entry + block, mask=inside)
        tl.store(record + 2, full, mask=inside)
        tl.store(record + 3, full + partial, mask=inside)
