"""Parts of the Triton kernel: the loops over full blocks, partial blocks and means, and what they end in."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def attend(
    q, row, keys, lists, blocks, means, scale_log2,
    D: tl.constexpr, D_PAD: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK: tl.constexpr, PARTIAL: tl.constexpr,
    RAGGED: tl.constexpr, COMPENSATE: tl.constexpr, ONLINE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Attend to full blocks, partial ones and means: output times sum, sum, shift, and sum and shift without means.

    Weights are 2^(logit - shift). The shift is the running maximum if ONLINE, else a row keeps the largest logit of its
    first tile: no maximum, no rescaling, and as exact while the sum stays far from the ends of the exponents' range.
    """
    k_base, v_base, k_desc, v_desc, k_stride_s, v_stride_s, batch, kv_head, group = keys
    blocks_ptr, tiles_ptr, full_count_ptr, partial_count_ptr, entry, list_width = lists
    kv_start_ptr, kv_len_ptr, kv_lengths_ptr, masks_ptr = blocks
    SPLIT_N: tl.constexpr = BLOCK // BLOCK_N
    key = tl.arange(0, BLOCK_N)
    list_ptr = blocks_ptr + entry * list_width
    full = tl.load(full_count_ptr + entry)
    if ONLINE:
        top = tl.full([q.shape[0]], float("-inf"), tl.float32)
    else:
        visited = full + tl.load(partial_count_ptr + entry) > 0
        opening = tl.load(list_ptr, mask=visited, other=0)
        start = tl.load(kv_start_ptr + opening)
        shown = BLOCK_N
        if RAGGED:
            shown = tl.load(kv_len_ptr + opening)
        some_k = _tile(k_base, k_desc, batch, kv_head, start, k_stride_s, shown, D, D_PAD, BLOCK_N, RAGGED)
        top = tl.max(tl.dot(q, some_k.T, input_precision=PRECISION), 1) * scale_log2
        if PARTIAL:  # hidden keys may hold anything
            top = tl.where(tl.abs(top) < float("inf"), top, 0.0)
    total = tl.zeros([q.shape[0]], tl.float32)
    acc = tl.zeros([q.shape[0], D_PAD], tl.float32)

    for step in tl.range(0, full * SPLIT_N):
        key_start = tl.load(kv_start_ptr + tl.load(list_ptr + step // SPLIT_N)) + (step % SPLIT_N) * BLOCK_N
        k = _tile(k_base, k_desc, batch, kv_head, key_start, k_stride_s, BLOCK_N, D, D_PAD, BLOCK_N, False)
        logits = tl.dot(q, k.T, input_precision=PRECISION)
        weights, acc, total, top = _weigh(logits, scale_log2, acc, total, top, False, ONLINE)
        v = _tile(v_base, v_desc, batch, kv_head, key_start, v_stride_s, BLOCK_N, D, D_PAD, BLOCK_N, False)
        acc = tl.dot(weights.to(v.dtype), v, acc, input_precision=PRECISION)

    if PARTIAL:
        list_ptr += full
        for step in tl.range(0, tl.load(partial_count_ptr + entry) * SPLIT_N):
            block = tl.load(list_ptr + step // SPLIT_N)
            first = (step % SPLIT_N) * BLOCK_N
            key_start = tl.load(kv_start_ptr + block) + first
            left = BLOCK_N
            if RAGGED:
                left = tl.load(kv_len_ptr + block) - first
                if kv_lengths_ptr is not None:
                    left = tl.minimum(left, tl.load(kv_lengths_ptr + batch) - key_start)
            k = _tile(k_base, k_desc, batch, kv_head, key_start, k_stride_s, left, D, D_PAD, BLOCK_N, RAGGED)
            logits = tl.dot(q, k.T, input_precision=PRECISION)
            if RAGGED:
                logits = tl.where(key[None, :] < left, logits, float("-inf"))
            if tiles_ptr is not None:
                tile = tl.load(tiles_ptr + entry * list_width + full + step // SPLIT_N)
                logits = tl.where(_seen(masks_ptr, tile, row, first, BLOCK_N), logits, float("-inf"))
            weights, acc, total, top = _weigh(logits, scale_log2, acc, total, top, True, ONLINE)
            v = _tile(v_base, v_desc, batch, kv_head, key_start, v_stride_s, left, D, D_PAD, BLOCK_N, RAGGED)
            acc = tl.dot(weights.to(v.dtype), v, acc, input_precision=PRECISION)

    computed = total
    computed_top = top
    if COMPENSATE:
        mean_k_ptr, mean_v_ptr, log_counts_ptr, bits_row_ptr, heads, key_blocks = means
        kv_heads = heads // group
        mean_base = (batch.to(tl.int64) * key_blocks * kv_heads + kv_head) * D
        for first in tl.range(0, key_blocks, BLOCK_N):
            block = first + key
            word = tl.load(bits_row_ptr + block // 32, mask=block < key_blocks, other=-1)
            log_count = tl.load(
                log_counts_ptr + batch.to(tl.int64) * key_blocks + block, mask=block < key_blocks, other=0.0
            )
            bias = tl.where(((word >> (block % 32)) & 1) != 0, float("-inf"), log_count * 1.4426950408889634)
            left = key_blocks - first
            k = _tile(mean_k_ptr + mean_base, None, batch, kv_head, first, kv_heads * D, left, D, D_PAD, BLOCK_N, True)
            logits = tl.dot(q, k.T, input_precision=PRECISION) * scale_log2 + bias[None, :]
            weights, acc, total, top = _weigh(logits, 1.0, acc, total, top, True, ONLINE)
            v = _tile(mean_v_ptr + mean_base, None, batch, kv_head, first, kv_heads * D, left, D, D_PAD, BLOCK_N, True)
            acc = tl.dot(weights.to(v.dtype), v, acc, input_precision=PRECISION)
    return acc, total, top, computed, computed_top


@triton.jit
def _tile(
    base_ptr,  # of this batch and head
    desc,  # descriptor [B, H, S, D] or None
    batch,
    head,
    start,  # first token
    stride,
    rows_left,  # rows beyond it read as 0
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASK_ROWS: tl.constexpr,
):
    """Load one tile [BLOCK_N, D_PAD] of keys or values; lanes past D, and with MASK_ROWS past rows_left, are 0."""
    if desc is not None and not MASK_ROWS:
        return desc.load([batch, head, start, 0]).reshape(BLOCK_N, D_PAD)
    lane = tl.arange(0, BLOCK_N)
    column = tl.arange(0, D_PAD)
    pointers = base_ptr + tl.cast(start, tl.int64) * stride + (lane[:, None] * stride + column[None, :])
    if MASK_ROWS:
        if D == D_PAD:
            return tl.load(pointers, mask=lane[:, None] < rows_left, other=0.0)
        return tl.load(pointers, mask=(lane[:, None] < rows_left) & (column[None, :] < D), other=0.0)
    if D == D_PAD:
        return tl.load(pointers)
    return tl.load(pointers, mask=column[None, :] < D, other=0.0)


@triton.jit
def _seen(
    masks_ptr,  # int32 [M, 128, 4]
    tile,  # row of masks, or -1: everything is seen
    row,  # int32 [BLOCK_M]: query lanes of the 128-token block
    first,  # key lane of the first column
    BLOCK_N: tl.constexpr,
):
    """Read a bit tile as bool [BLOCK_M, BLOCK_N]: one word per row and 32 columns, not a load per bit."""
    words_ptr = masks_ptr + (tl.maximum(tile, 0).to(tl.int64) * 512 + first // 32) + row * 4
    column = tl.arange(0, BLOCK_N)[None, :]
    word = tl.load(words_ptr)[:, None]
    for index in tl.static_range(1, BLOCK_N // 32):
        word = tl.where(column // 32 == index, tl.load(words_ptr + index)[:, None], word)
    return (((word >> (column % 32)) & 1) != 0) | (tile < 0)


@triton.jit
def _weigh(logits, scale_log2, acc, total, top, HIDDEN: tl.constexpr, ONLINE: tl.constexpr):
    """Turn logits into weights, add them up and, if ONLINE, move the shift of the row and what was added under it."""
    shift = top
    if ONLINE:
        top = tl.maximum(top, tl.max(logits, 1) * scale_log2)
        before, shift = shift, top
        if HIDDEN:  # a row that has seen no key yet keeps -inf, and -inf - -inf would be NaN
            shift = tl.where(top == float("-inf"), 0.0, top)
        rescale = tl.math.exp2(before - shift)
        total *= rescale
        acc = acc * rescale[:, None]
    weights = tl.math.exp2(logits * scale_log2 - shift[:, None])
    return weights, acc, total + tl.sum(weights, 1), top


@triton.jit
def lost(total):
    """Tell which sums a kept shift has brought so near to the ends of fp32's range that parts may be lost.

    A row that sees no key of its blocks is among them: its program works twice.
    """
    return (total < 2.0**-60) | (total > 2.0**60) | (total != total)


@triton.jit
def natural_lse(
    top,  # fp32 [BLOCK_M], base 2
    total,  # fp32 [BLOCK_M]
):
    """Give the natural-log LSE of a softmax in powers of two, -inf where nothing was added."""
    empty = total == 0.0
    return tl.where(empty, float("-inf"), (top + tl.math.log2(tl.where(empty, 1.0, total))) * 0.6931471805599453)
