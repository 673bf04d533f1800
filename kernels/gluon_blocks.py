"""One kind of block after another, in the Hopper kernel's consumers: full blocks, partial ones, means."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from dit_sparse.kernels.gluon_masks import entry_mask, hidden, tile_words, unvisited_words
from dit_sparse.kernels.gluon_produce import next_stage
from dit_sparse.kernels.gluon_softmax import weigh

# Kinds of block.
FULL_BLOCKS = gl.constexpr(0)
PARTIAL_BLOCKS = gl.constexpr(1)
BLOCK_MEANS = gl.constexpr(2)


@gluon.jit
def attend_blocks(
    KIND: gl.constexpr, number, last, item, state, source, numbers, rings,
    RAGGED: gl.constexpr, ONLINE: gl.constexpr, STAGES: gl.constexpr, TURNS: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """Attend to the blocks of one kind from number to last of an item; returns the state after them.

    state: operand, and the output that its product is yet to be added to; shift; sums; stage and phase of the operand's
    values; whose turn it is. source: for partial blocks what `_read_ahead` names, for means what `next_logits` does.
    """
    p, acc, top, sums, stage, phase, tick = state
    v_empty = rings[8]
    scale = numbers[1]
    if KIND == BLOCK_MEANS:
        scale = 1.0  # these logits come scaled
    ahead = _read_ahead(KIND, number, source, RAGGED)
    q = queries(rings, item, GROUP)
    for each in range(number, last):
        following, following_phase = next_stage(stage, phase, STAGES)
        logits, acc, ahead = next_logits(
            KIND, each, q, p, acc, ahead, source, numbers, rings,
            stage, phase, following, following_phase, tick, RAGGED, TURNS, GROUP,
        )  # fmt: skip
        tick ^= 1
        p, acc, top, sums = weigh(logits, scale, p, acc, top, sums, ONLINE)
        mbarrier.arrive(v_empty.index(stage), count=1)
        stage = following
        phase = following_phase
    return p, acc, top, sums, stage, phase, tick


@gluon.jit
def queries(rings, item, GROUP: gl.constexpr):
    """Point to a consumer's queries of an item.

    Every loop asks anew, through an opaque move: otherwise ptxas (12.8) computes the addresses in front of the first
    loop alone, on a path that is not taken where that loop does not run.
    """
    q_tiles = rings[0]
    ROWS: gl.constexpr = q_tiles.shape[1] // 2
    slot = gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [item & 1], dtype=gl.int32, is_pure=False, pack=1)
    return q_tiles.index(slot).slice(GROUP * ROWS, ROWS, dim=0)


@gluon.jit
def next_logits(
    KIND: gl.constexpr, number, q, p, acc, ahead, source, numbers, rings,
    stage, phase, following, following_phase, tick, RAGGED: gl.constexpr, TURNS: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """Start the logits of the following keys and the output of this stage's values; wait for the logits alone.

    Returns them, hidden keys at -inf and those of means in powers of two; the output in flight; and what `_read_ahead`
    gives for the block after.
    """
    k_tiles, v_tiles, k_full, k_empty, v_full, turn = rings[1], rings[2], rings[5], rings[6], rings[7], rings[9]
    no_logits, scale_log2 = numbers
    mbarrier.wait(k_full.index(following), following_phase)
    if TURNS:
        mbarrier.wait(turn.index(GROUP), tick)
    logits = warpgroup_mma(q, k_tiles.index(following).permute((1, 0)), no_logits, use_acc=False, is_async=True)
    mbarrier.wait(v_full.index(stage), phase)
    acc = warpgroup_mma(p, v_tiles.index(stage), acc, is_async=True)
    if TURNS:
        mbarrier.arrive(turn.index(1 - GROUP), count=1)
    if KIND == PARTIAL_BLOCKS:
        seen = tile_words(ahead[0], ahead[1], source[-2], source[-1], True)
    if KIND == BLOCK_MEANS:
        bits_row, words, counts, column = source
        seen = unvisited_words(bits_row, number * 4, words)
        bias = gl.expand_dims(gl.load(counts + number * 128 + column) * 1.4426950408889634, 0)
        bias = hidden(bias, seen)
    ahead = _read_ahead(KIND, number + 1, source, RAGGED)
    logits = warpgroup_mma_wait(1, deps=(logits,))
    mbarrier.arrive(k_empty.index(following), count=1)
    if KIND == BLOCK_MEANS:
        logits = logits * scale_log2 + bias
    if KIND == PARTIAL_BLOCKS:
        logits = hidden(logits, seen)
    return logits, acc, ahead


@gluon.jit
def _read_ahead(KIND: gl.constexpr, number, source, RAGGED: gl.constexpr):
    """Read the entry of a partial block while the block before is computed; others need nothing so early."""
    ahead = (number, number)
    if KIND == PARTIAL_BLOCKS:
        place, full, count, batch, lists, places, row, masks = source
        ahead = entry_mask(
            place + number, full - number, count - number, batch, lists, places, masks, True, RAGGED, 128
        )
    return ahead
