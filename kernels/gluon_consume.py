"""The two warp groups of the Hopper kernel that multiply: 64 query rows of every item each."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from dit_sparse.kernels.gluon_blocks import (
    BLOCK_MEANS,
    FULL_BLOCKS,
    PARTIAL_BLOCKS,
    attend_blocks,
    next_logits,
    queries,
)
from dit_sparse.kernels.gluon_masks import entry_mask, tile_words
from dit_sparse.kernels.gluon_produce import item_of, next_stage, noted_from, notes_of
from dit_sparse.kernels.gluon_softmax import finished, first_weights, half, natural_lse, operand, quad_sums, row_sums

# Triton renamed these after 3.6; from 3.9 on the old names raise.
tma_store = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global
thread_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier


@gluon.jit
def consume(
    rings, lists, sizes, places, masks, results, scalars,
    GROUP: gl.constexpr, D: gl.constexpr, BLOCK: gl.constexpr, PARTIAL: gl.constexpr, RAGGED: gl.constexpr,
    COMPENSATE: gl.constexpr, ONLINE: gl.constexpr, STAGES: gl.constexpr, TURNS: gl.constexpr,
):  # fmt: skip
    """Attend for half the rows of every item of this program, and again for those that the shift did not suit."""
    if not ONLINE:
        lane = gl.arange(0, 128, layout=gl.BlockedLayout([1], [32], [4], [0]))
        each = (sizes[0] + gl.num_programs(0) - 1) // gl.num_programs(0)
        for first in range(0, each, 128):
            gl.store(notes_of(lists, sizes[0], GROUP) + first + lane, lane * 0, mask=first + lane < each)
        thread_barrier()
    item, stage, phase, tick = _consume_items(
        gl.program_id(0), gl.to_tensor(0), gl.to_tensor(0), gl.to_tensor(0), gl.to_tensor(0),
        rings, lists, sizes, places, masks, results, scalars,
        GROUP, D, BLOCK, PARTIAL, RAGGED, COMPENSATE, ONLINE, False, STAGES, TURNS,
    )  # fmt: skip
    if not ONLINE:
        mbarrier.arrive(rings[10].index(0), count=1)
        mbarrier.wait(rings[10].index(0), 0)
        work = noted_from(gl.program_id(0), lists, sizes[0])
        if work < sizes[0]:
            _consume_items(
                work, item, stage, phase, tick, rings, lists, sizes, places, masks, results, scalars,
                GROUP, D, BLOCK, PARTIAL, RAGGED, COMPENSATE, True, True, STAGES, TURNS,
            )  # fmt: skip
    tma.store_wait(0)


@gluon.jit
def _consume_items(
    work, item, stage, phase, tick, rings, lists, sizes, places, masks, results, scalars,
    GROUP: gl.constexpr, D: gl.constexpr, BLOCK: gl.constexpr, PARTIAL: gl.constexpr, RAGGED: gl.constexpr,
    COMPENSATE: gl.constexpr, ONLINE: gl.constexpr, AGAIN: gl.constexpr, STAGES: gl.constexpr, TURNS: gl.constexpr,
):  # fmt: skip
    """Attend for half the rows of every item, at least one; returns where the rings stand."""
    q_tiles, k_tiles, v_tiles, q_full, q_empty, k_full, k_empty, v_full, v_empty, turn, done = rings
    total, query_blocks, heads, group, list_width, mean_tiles = sizes
    head_of_ptr, bits_ptr, log_counts_ptr, q_len_ptr = masks[2], masks[3], masks[4], masks[5]
    out_desc, out_tiles, out_ptr, lse_ptr, computed_lse_ptr = results
    q_tokens, words, scale_log2 = scalars
    ROWS: gl.constexpr = BLOCK // 2
    HIDE: gl.constexpr = PARTIAL or COMPENSATE  # the first block of an item may be hidden in part, or wholly
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 2)
    ROW: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    O_ROW: gl.constexpr = gl.SliceLayout(1, O_LAYOUT)
    STORE: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])  # 16 bytes a lane
    DTYPE: gl.constexpr = v_tiles.dtype

    row = GROUP * ROWS + gl.arange(0, ROWS, layout=ROW)
    column = gl.arange(0, BLOCK, layout=gl.SliceLayout(0, S_LAYOUT))
    no_logits = gl.zeros([ROWS, BLOCK], gl.float32, S_LAYOUT)
    no_output = gl.zeros([ROWS, D], gl.float32, O_LAYOUT)
    numbers = (no_logits, scale_log2)
    head_index, entry, full, count = item_of(work, lists)

    slot = item & 1
    mbarrier.wait(q_full.index(slot), (item >> 1) & 1)
    mbarrier.wait(k_full.index(stage), phase)
    q = queries(rings, item, GROUP)
    logits = warpgroup_mma(q, k_tiles.index(stage).permute((1, 0)), no_logits, use_acc=False, is_async=True)
    logits = warpgroup_mma_wait(0, deps=(logits,))
    mbarrier.arrive(k_empty.index(stage), count=1)
    seen = column
    if HIDE:
        tile, left = entry_mask(
            entry * list_width, full, count, head_index // heads, lists, places, masks, PARTIAL, RAGGED, BLOCK
        )
        seen = tile_words(tile, left, row, masks, PARTIAL)
    weights, top = first_weights(logits, seen, scale_log2, HIDE, ONLINE)
    sums = quad_sums(weights)
    p = operand(weights, DTYPE, P_LAYOUT)
    acc = no_output

    while work < total:
        # What the end of this item and the next one need is read now, long before it is used.
        query_block = work % query_blocks
        start = gl.load(places[0] + query_block)
        rows = gl.load(q_len_ptr + query_block)
        next_work = work + gl.num_programs(0)
        if AGAIN:
            next_work = noted_from(next_work, lists, total)
        next_head, next_entry, next_full, next_count = item_of(gl.minimum(next_work, total - 1), lists)
        batch = head_index // heads
        head = head_index % heads
        if HIDE:
            next_tile, next_left = entry_mask(
                next_entry * list_width, next_full, next_count, next_head // heads, lists, places, masks, PARTIAL,
                RAGGED, BLOCK,
            )  # fmt: skip
        state = (p, acc, top, sums, stage, phase, tick)
        state = attend_blocks(
            FULL_BLOCKS, gl.to_tensor(1), full, item, state, (), numbers, rings,
            RAGGED, ONLINE, STAGES, TURNS, GROUP,
        )  # fmt: skip
        if PARTIAL:
            source = (entry * list_width, full, count, batch, lists, places, row, masks)
            state = attend_blocks(
                PARTIAL_BLOCKS, gl.maximum(full, 1), count, item, state, source, numbers, rings,
                RAGGED, ONLINE, STAGES, TURNS, GROUP,
            )  # fmt: skip
        if COMPENSATE:
            lse_place = (batch.to(gl.int64) * q_tokens + start) * heads + head + row * heads
            computed = gl.where(count > 0, row_sums(state[3], ROW), 0.0)
            gl.store(computed_lse_ptr + lse_place, natural_lse(state[2], computed), mask=row < rows)
            if not ONLINE:
                note = notes_of(lists, total, GROUP) + work // gl.num_programs(0)
                unfit = (count > 0) & ((computed < 2.0**-60) | (computed > 2.0**60))
                gl.store(note + row * 0, row * 0 + 1, mask=(row < rows) & unfit)
            bits_row = bits_ptr + (gl.load(head_of_ptr + head_index).to(gl.int64) * query_blocks + query_block) * words
            means_source = (bits_row, words, log_counts_ptr + batch * (mean_tiles * BLOCK), column)
            state = attend_blocks(
                BLOCK_MEANS, gl.to_tensor(0), mean_tiles, item, state, means_source, numbers, rings,
                RAGGED, ONLINE, STAGES, TURNS, GROUP,
            )  # fmt: skip
        p, acc, top, sums, stage, phase, tick = state

        # The first logits of the next item beside the last output of this one.
        mbarrier.arrive(q_empty.index(item & 1), count=1)
        item += 1
        slot = item & 1
        mbarrier.wait(q_full.index(slot), (item >> 1) & 1)
        q = queries(rings, item, GROUP)
        following, following_phase = next_stage(stage, phase, STAGES)
        first_seen = column
        if HIDE:
            first_seen = tile_words(next_tile, next_left, row, masks, PARTIAL)
        logits, acc, _ = next_logits(
            FULL_BLOCKS, stage, q, p, acc, (), (), numbers, rings,
            stage, phase, following, following_phase, tick, RAGGED, TURNS, GROUP,
        )  # fmt: skip
        tick ^= 1
        weights, next_top = first_weights(logits, first_seen, scale_log2, HIDE, ONLINE)
        acc = finished(p, acc)
        mbarrier.arrive(v_empty.index(stage), count=1)

        total_sums = row_sums(sums, ROW)
        if not COMPENSATE:  # what went through block 0 for an empty row is dropped
            total_sums = gl.where(count > 0, total_sums, 0.0)
        share = gl.where(total_sums == 0.0, 0.0, 1.0 / total_sums)
        out_tile = out_tiles.index(GROUP)
        tma.store_wait(0)
        out_tile.store(half(acc * gl.expand_dims(gl.convert_layout(share, O_ROW), 1), DTYPE))
        first_row = batch.to(gl.int64) * q_tokens + start
        if rows == BLOCK:
            fence_async_shared()
            tma_store(out_desc, [first_row.to(gl.int32) + GROUP * ROWS, head * D], out_tile)
        else:  # a tile would reach into the next block
            out_row = GROUP * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, STORE))
            out_column = gl.arange(0, D, layout=gl.SliceLayout(0, STORE))
            offset = gl.expand_dims(out_row, 1) * (heads * D) + gl.expand_dims(out_column, 0)
            inside = gl.expand_dims(out_row, 1) < rows
            gl.store(out_ptr + (first_row * heads + head) * D + offset, out_tile.load(STORE), mask=inside)
        gl.store(lse_ptr + first_row * heads + head + row * heads, natural_lse(top, total_sums), mask=row < rows)
        if not ONLINE:
            fine = (total_sums > 2.0**-60) & (total_sums < 2.0**60)
            if not COMPENSATE:
                fine = fine | (count == 0)
            note = notes_of(lists, total, GROUP) + work // gl.num_programs(0)
            gl.store(note + row * 0, row * 0 + 1, mask=(row < rows) & (fine == 0))

        p = operand(weights, DTYPE, P_LAYOUT)
        sums = quad_sums(weights)
        top = next_top
        acc = no_output
        stage = following
        phase = following_phase
        work = next_work
        head_index = next_head
        entry = next_entry
        full = next_full
        count = next_count

    # The item begun in vain leaves the rings as any other does.
    mbarrier.wait(v_full.index(stage), phase)
    mbarrier.arrive(v_empty.index(stage), count=1)
    mbarrier.arrive(q_empty.index(item & 1), count=1)
    stage, phase = next_stage(stage, phase, STAGES)
    return item + 1, stage, phase, tick
