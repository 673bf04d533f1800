"""Choice of key blocks on the device: one program a row, bisection in registers in place of a sort."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_sparse.kernels.choice import Choice, Rule
from dit_sparse.kernels.device import on_device
from dit_sparse.kernels.indices import WORD_BITS

# Scores that one warp holds: 32 a lane. Up to 16 warps share a row of more.
SCORES_PER_WARP = 1024
MAX_WARPS = 16
# Images of what is no candidate, below that of every score, and of what is kept in any case, above them.
NONE = tl.constexpr(-(2**31))
TAKEN = tl.constexpr(2**31 - 1)


def choose(score: Tensor, rule: Rule) -> Choice:
    """Do what choice.choose_blocks does. CUDA-graph safe: shapes alone decide every size."""
    rows, queries, keys = score.shape
    query_blocks, words = len(rule.q_len), -(-keys // WORD_BITS)
    bits = torch.empty((rows, query_blocks, words), dtype=torch.int32, device=score.device)
    pairs = torch.zeros(rows, dtype=torch.float64, device=score.device)
    padded = max(WORD_BITS, triton.next_power_of_2(keys))
    with on_device(score):
        _choose[(rows * query_blocks,)](
            score.contiguous(),
            rule.keep,
            None if rule.always is None else rule.always.contiguous().view(torch.uint8),
            None if rule.forced is None else rule.forced.contiguous().view(torch.uint8),
            rule.q_len.contiguous(),
            rule.kv_len.contiguous(),
            bits,
            pairs,
            *((0, 0) if rule.keep is None else rule.keep.stride()),
            queries,
            query_blocks,
            keys,
            rule.counted,
            rule.at_least,
            float(rule.mass if rule.mass is not None else rule.threshold or 0.0),
            BY_MASS=rule.mass is not None,
            EVERY=rule.mass is not None and rule.mass >= 1.0,
            K_PAD=padded,
            num_warps=min(MAX_WARPS, max(1, padded // SCORES_PER_WARP)),
        )
    return Choice(bits, pairs)


@triton.jit
def _choose(
    score_ptr,  # fp32 [R, Q, K]
    keep_ptr,  # int32 [R, Q], any strides, or None
    always_ptr,  # uint8 [K] or None
    forced_ptr,  # uint8 [Q, K] or None
    q_len_ptr,  # int32 [query_blocks]
    kv_len_ptr,  # int32 [K]
    bits_ptr,  # int32 [R, query_blocks, W], written
    pairs_ptr,  # fp64 [R], added to: whole numbers, so that their order does not matter
    keep_stride_r,
    keep_stride_q,
    queries,
    query_blocks,
    keys,
    counted,
    at_least,
    level,  # mass or threshold
    BY_MASS: tl.constexpr,
    EVERY: tl.constexpr,  # of a mass of 1: rounding must not drop the tail
    K_PAD: tl.constexpr,
):
    """Write the words of one (row, query block), and count the pairs of what it keeps."""
    W_PAD: tl.constexpr = K_PAD // 32
    pid = tl.program_id(0)
    row = pid // query_blocks
    query = pid % query_blocks
    block = tl.arange(0, K_PAD)
    inside = block < keys
    kept = inside
    if query < queries:
        line = (row.to(tl.int64) * queries + query) * keys
        score = tl.load(score_ptr + line + block, mask=inside, other=float("-inf"))
        competes = inside
        if always_ptr is not None:
            competes = inside & (tl.load(always_ptr + block, mask=inside, other=1) == 0)
        forced = block < 0
        if forced_ptr is not None:
            of_query = forced_ptr + query.to(tl.int64) * keys
            forced = competes & (tl.load(of_query + block, mask=inside, other=0) != 0)
        finite = competes & (score > float("-inf"))
        candidate = finite & (forced == 0)
        taken = inside & (forced | (competes == 0))
        held = tl.sum(forced.to(tl.int32), 0)
        available = tl.sum(candidate.to(tl.int32), 0)
        least = tl.minimum(at_least - held, available)
        # From here on the image alone says what a block is: few registers, many rows at a time.
        image = tl.where(taken, TAKEN, tl.where(candidate, _image(score), NONE))
        others = tl.sum(taken.to(tl.int32), 0)
        if keep_ptr is not None:
            keep = tl.load(keep_ptr + row.to(tl.int64) * keep_stride_r + query * keep_stride_q)
            count = tl.minimum(tl.maximum(keep - held, least), available)
            bound, ties = _bound_of_count(image, tl.maximum(count, 0) + others)
        else:
            if EVERY:
                bound, ties = tl.full([], NONE, tl.int32), tl.full([], 0, tl.int32)
            elif BY_MASS:
                top = tl.max(tl.where(finite, score, float("-inf")), 0)
                top = tl.where(top == float("-inf"), 0.0, top)
                weight = tl.where(finite, tl.exp(score - top), 0.0)
                goal = level * tl.sum(weight, 0) - tl.sum(tl.where(forced, weight, 0.0), 0)
                bound, ties = _bound_of_weight(image, tl.where(candidate, weight, 0.0), goal)
            else:
                number = tl.maximum(tl.sum(finite.to(tl.int32), 0), 1)
                mean = tl.sum(tl.where(finite, score, 0.0), 0) / number
                distance = tl.where(finite, score - mean, 0.0)
                deviation = tl.sqrt(tl.sum(distance * distance, 0) / number)
                bound, ties = _image(mean + level * deviation), tl.full([], 0, tl.int32)
            if tl.sum((image > bound).to(tl.int32), 0) + ties < least + others:
                bound, ties = _bound_of_count(image, least + others)
        kept = image > bound
        if ties > 0:  # the lower index wins
            tied = (image == bound).to(tl.int32)
            kept = kept | ((tied != 0) & (tl.cumsum(tied, 0) - tied < ties))
        if query < counted:
            tokens = tl.sum(tl.load(kv_len_ptr + block, mask=kept & (block < counted), other=0), 0)
            pairs = tokens.to(tl.float64) * tl.load(q_len_ptr + query).to(tl.float64)
            tl.atomic_add(pairs_ptr + row, pairs, sem="relaxed")
    words = tl.cdiv(keys, 32)
    word = tl.arange(0, W_PAD)
    packed = tl.sum(tl.reshape(kept.to(tl.int32), [W_PAD, 32]) << tl.arange(0, 32)[None, :], 1)
    tl.store(bits_ptr + pid.to(tl.int64) * words + word, packed, mask=word < words)


@triton.jit
def _image(score):
    """Map scores to integers of the same order, all between NONE and TAKEN."""
    bits = tl.where(score == 0.0, 0.0, score).to(tl.int32, bitcast=True)  # -0.0 equals 0.0, but its bits do not
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _signed(place):
    """Turn a place among all integers, counted from the least one, into that integer."""
    return (place ^ 0x80000000).to(tl.int32, bitcast=True)


@triton.jit
def _bound_of_count(image, count):
    """Return (bound, ties): the `count` largest are those above bound, and `ties` of those that equal it.

    count is at least the number of blocks that are taken, and at most that of all but those that are none.
    """
    place = tl.full([], 0, tl.uint32)  # becomes the largest that `count` images reach
    bit = tl.full([], 0x80000000, tl.uint32)
    found = tl.full([], -1, tl.int32)
    while bit != 0:
        found = tl.sum((image >= _signed(place | bit)).to(tl.int32), 0)
        place = tl.where(found >= count, place | bit, place)
        bit = tl.where(found == count, 0, bit >> 1)
    bound = _signed(tl.where(found == count, place - 1, place))  # equal: no tie at the border
    return bound, count - tl.sum((image > bound).to(tl.int32), 0)


@triton.jit
def _bound_of_weight(image, weight, goal):
    """Return (bound, ties): the fewest of the largest whose weights, 0 for what is no candidate, sum to goal."""
    place = tl.full([], 0, tl.uint32)  # becomes the largest down to which the weights suffice, 0 if all do not
    bit = tl.full([], 0x80000000, tl.uint32)
    for _ in range(32):
        enough = tl.sum(tl.where(image >= _signed(place | bit), weight, 0.0), 0) >= goal
        place = tl.where(enough, place | bit, place)
        bit = bit >> 1
    bound = tl.minimum(_signed(place), TAKEN - 1)  # nothing is missing where goal is 0 or less
    missing = goal - tl.sum(tl.where(image > bound, weight, 0.0), 0)
    tied = image == bound
    number = tl.sum(tied.to(tl.int32), 0)
    each = tl.max(tl.where(tied, weight, 0.0), 0)  # equal scores have equal weights
    ties = tl.minimum(tl.ceil(missing / tl.where(each > 0.0, each, 1.0)).to(tl.int32), number)
    ties = tl.where(each > 0.0, ties, 0)
    whole = (ties > 0) & (ties == number)
    return tl.where(whole, bound - 1, bound), tl.where(whole, 0, ties)
