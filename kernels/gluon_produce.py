"""Items of the Hopper kernel, its rings of tiles, and the warp group that fetches them."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

# Triton renamed the copy after 3.6; from 3.9 on the old name raises.
tma_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared


@gluon.jit
def item_of(work, lists):
    """Read an item: its head, the place of its list, its full and all blocks."""
    record = lists[0] + work * 4
    return gl.load(record), gl.load(record + 1).to(gl.int64), gl.load(record + 2), gl.load(record + 3)


@gluon.jit
def notes_of(lists, total, consumer):
    """Point to the notes of one consumer of this program."""
    each = (total + gl.num_programs(0) - 1) // gl.num_programs(0)
    return lists[2] + (gl.program_id(0) * 2 + consumer).to(gl.int64) * each


@gluon.jit
def noted_from(work, lists, total):
    """Find the first item of this program from work on that a consumer has noted; total or more if there is none."""
    first = notes_of(lists, total, 0)
    second = notes_of(lists, total, 1)
    found = gl.to_tensor(0)
    while found == 0:
        number = work // gl.num_programs(0)
        inside = work < total
        found = gl.load(first + number, mask=inside, other=1) | gl.load(second + number, mask=inside, other=1)
        work = gl.where(found == 0, work + gl.num_programs(0), work)
    return work


@gluon.jit
def next_stage(stage, phase, STAGES: gl.constexpr):
    """Step on in a ring of tiles."""
    last = stage == STAGES - 1
    return gl.where(last, 0, stage + 1), gl.where(last, phase ^ 1, phase)


@gluon.jit
def produce(
    descs, rings, lists, sizes, places, q_steps, k_steps, v_steps,
    COMPENSATE: gl.constexpr, ONLINE: gl.constexpr, STAGES: gl.constexpr, BLOCK: gl.constexpr,
):  # fmt: skip
    """Fetch what the consumers use, in their order."""
    item, stage, phase = _produce_items(
        gl.program_id(0), gl.to_tensor(0), gl.to_tensor(0), gl.to_tensor(1),
        descs, rings, lists, sizes, places, q_steps, k_steps, v_steps, COMPENSATE, False, STAGES, BLOCK,
    )  # fmt: skip
    if not ONLINE:
        mbarrier.wait(rings[10].index(0), 0)
        work = noted_from(gl.program_id(0), lists, sizes[0])
        if work < sizes[0]:
            _produce_items(
                work, item, stage, phase,
                descs, rings, lists, sizes, places, q_steps, k_steps, v_steps, COMPENSATE, True, STAGES, BLOCK,
            )  # fmt: skip


@gluon.jit
def _produce_items(
    work, item, stage, phase, descs, rings, lists, sizes, places, q_steps, k_steps, v_steps,
    COMPENSATE: gl.constexpr, AGAIN: gl.constexpr, STAGES: gl.constexpr, BLOCK: gl.constexpr,
):  # fmt: skip
    """Fetch for every item its queries, then keys and values block by block, then one more of each."""
    q_desc, k_desc, v_desc, mean_k_desc, mean_v_desc = descs
    q_full, q_empty = rings[3], rings[4]
    total, query_blocks, heads, group = sizes[0], sizes[1], sizes[2], sizes[3]
    list_width, mean_tiles = sizes[4], sizes[5]
    kv_heads = heads // group
    head_index, entry, full, count = item_of(work, lists)
    q_start = gl.load(places[0] + work % query_blocks)
    while work < total:
        batch = head_index // heads
        head = head_index % heads
        kv_head = head // group
        slot = item & 1
        mbarrier.wait(q_empty.index(slot), ((item >> 1) & 1) ^ 1)
        mbarrier.expect(q_full.index(slot), q_desc.block_type.nbytes)
        q_row = batch * q_steps[0] + head * q_steps[1] + q_start
        tma_load(q_desc, [q_row, head * q_steps[2]], q_full.index(slot), rings[0].index(slot))
        k_base = batch * k_steps[0] + kv_head * k_steps[1]
        v_base = batch * v_steps[0] + kv_head * v_steps[1]
        list_ptr = lists[1] + entry * list_width
        # Read now, used when this item has been fetched: otherwise the consumers would wait for it.
        work += gl.num_programs(0)
        if AGAIN:
            work = noted_from(work, lists, total)
        following = gl.minimum(work, total - 1)
        head_index, entry, full, next_count = item_of(following, lists)
        q_start = gl.load(places[0] + following % query_blocks)
        for place in range(gl.maximum(count, 1)):  # an empty row goes through block 0, and its result is dropped
            block = gl.load(list_ptr + place, mask=place < count, other=0).to(gl.int32)
            start = gl.load(places[1] + block)
            stage, phase = _fetch(
                k_desc, v_desc, k_base + start, kv_head * k_steps[2], v_base + start, kv_head * v_steps[2], rings,
                stage, phase, STAGES,
            )  # fmt: skip
        if COMPENSATE:
            for number in range(mean_tiles):
                row = ((batch * kv_heads + kv_head) * mean_tiles + number) * BLOCK
                stage, phase = _fetch(mean_k_desc, mean_v_desc, row, 0, row, 0, rings, stage, phase, STAGES)
        item += 1
        count = next_count
    # The consumers begin one item more than there are; what it holds does not matter.
    slot = item & 1
    mbarrier.wait(q_empty.index(slot), ((item >> 1) & 1) ^ 1)
    mbarrier.arrive(q_full.index(slot), count=1)
    stage, phase = _fetch(k_desc, v_desc, 0, 0, 0, 0, rings, stage, phase, STAGES)
    return item + 1, stage, phase


@gluon.jit
def _fetch(k_desc, v_desc, k_row, k_column, v_row, v_column, rings, stage, phase, STAGES: gl.constexpr):
    """Fetch a tile of keys and one of values, each as soon as its place is free."""
    k_tiles, v_tiles, k_full, k_empty, v_full, v_empty = rings[1], rings[2], rings[5], rings[6], rings[7], rings[8]
    mbarrier.wait(k_empty.index(stage), phase)
    mbarrier.expect(k_full.index(stage), k_desc.block_type.nbytes)
    tma_load(k_desc, [k_row, k_column], k_full.index(stage), k_tiles.index(stage))
    mbarrier.wait(v_empty.index(stage), phase)
    mbarrier.expect(v_full.index(stage), v_desc.block_type.nbytes)
    tma_load(v_desc, [v_row, v_column], v_full.index(stage), v_tiles.index(stage))
    return next_stage(stage, phase, STAGES)
