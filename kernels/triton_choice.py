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


def choose(score: Tensor, rule: Rule) -> Choice:
    """Do what choice.choose_blocks does. CUDA-graph safe: shapes alone decide every size."""
    rows, queries, keys = score.shape
    words = -(-keys // WORD_BITS)
    bits = torch.empty((rows, rule.query_blocks, words), dtype=torch.int32, device=score.device)
    kept_keys = torch.empty((rows, queries), dtype=torch.int32, device=score.device)
    padded = max(WORD_BITS, triton.next_power_of_2(keys))
    previous = rule.previous
    with on_device(score):
        _choose[(rows * rule.query_blocks,)](
            score.contiguous(),
            None if rule.keep is None else rule.keep.contiguous(),
            None if rule.always is None else rule.always.contiguous().view(torch.uint8),
            None if rule.forced is None else rule.forced.contiguous().view(torch.uint8),
            rule.kv_len.contiguous(),
            None if rule.wanted is None else rule.wanted.contiguous().view(torch.uint8),
            None if previous is None else previous.bits.contiguous(),
            None if previous is None else previous.kept_keys.contiguous(),
            bits,
            kept_keys,
            queries,
            rule.query_blocks,
            keys,
            words,
            rule.counted,
            rule.at_least,
            float(rule.mass if rule.mass is not None else rule.threshold or 0.0),
            BY_KEEP=rule.keep is not None,
            BY_MASS=rule.mass is not None,
            EVERY=rule.mass is not None and rule.mass >= 1.0,
            K_PAD=padded,
            num_warps=min(MAX_WARPS, max(1, padded // SCORES_PER_WARP)),
        )
    return Choice(bits, kept_keys)


@triton.jit
def _choose(
    score_ptr,  # fp32 [R, Q, K]
    keep_ptr,  # int32 [R, Q] or None
    always_ptr,  # uint8 [K] or None
    forced_ptr,  # uint8 [Q, K] or None
    kv_len_ptr,  # int32 [K]
    wanted_ptr,  # uint8 [R] or None
    old_bits_ptr,  # int32 [R, query_blocks, W] or None
    old_keys_ptr,  # int32 [R, Q] or None
    bits_ptr,  # int32 [R, query_blocks, W], written
    kept_keys_ptr,  # int32 [R, Q], written
    queries,
    query_blocks,
    keys,
    words,
    counted,
    at_least,
    level,  # mass or threshold
    BY_KEEP: tl.constexpr,
    BY_MASS: tl.constexpr,
    EVERY: tl.constexpr,  # of a mass of 1: rounding must not drop the tail
    K_PAD: tl.constexpr,
):
    """Write the words of one (row, query block), and the tokens of what it keeps."""
    W_PAD: tl.constexpr = K_PAD // 32
    pid = tl.program_id(0)
    row = pid // query_blocks
    query = pid % query_blocks
    word = tl.arange(0, W_PAD)
    target = bits_ptr + pid.to(tl.int64) * words + word
    entry = row.to(tl.int64) * queries + query
    if wanted_ptr is not None:
        if tl.load(wanted_ptr + row) == 0:
            tl.store(target, tl.load(old_bits_ptr + pid.to(tl.int64) * words + word, word < words), word < words)
            if query < queries:
                tl.store(kept_keys_ptr + entry, tl.load(old_keys_ptr + entry))
            return
    block = tl.arange(0, K_PAD)
    inside = block < keys
    kept = inside
    if query < queries:
        score = tl.load(score_ptr + entry * keys + block, mask=inside, other=float("-inf"))
        score = tl.where(score == 0.0, 0.0, score)  # -0.0 equals 0.0, but its image does not
        competes = inside
        if always_ptr is not None:
            competes = inside & (tl.load(always_ptr + block, mask=inside, other=1) == 0)
        finite = competes & (score > float("-inf"))
        forced = block < 0
        candidate = finite
        if forced_ptr is not None:
            line = forced_ptr + query.to(tl.int64) * keys
            forced = competes & (tl.load(line + block, mask=inside, other=0) != 0)
            candidate = finite & (forced == 0)
        held = tl.sum(forced.to(tl.int32), 0)
        available = tl.sum(candidate.to(tl.int32), 0)
        image = _image(score, candidate)
        if BY_KEEP:
            count = tl.load(keep_ptr + entry) - held
        elif EVERY:
            count = available
        elif BY_MASS:
            top = tl.max(tl.where(finite, score, float("-inf")), 0)
            top = tl.where(top == float("-inf"), 0.0, top)
            weight = tl.where(finite, tl.exp(score - top), 0.0)
            goal = level * tl.sum(weight, 0) - tl.sum(tl.where(forced, weight, 0.0), 0)
            count = _count_to_goal(image, tl.where(candidate, weight, 0.0), goal)
        else:
            number = tl.maximum(tl.sum(finite.to(tl.int32), 0), 1)
            mean = tl.sum(tl.where(finite, score, 0.0), 0) / number
            distance = tl.where(finite, score - mean, 0.0)
            deviation = tl.sqrt(tl.sum(distance * distance, 0) / number)
            count = tl.sum((candidate & (score > mean + level * deviation)).to(tl.int32), 0)
        count = tl.minimum(tl.maximum(count, at_least - held), available)
        kept = (_best(image, count) | forced | (competes == 0)) & inside
        tokens = tl.load(kv_len_ptr + block, mask=kept & (block < counted), other=0)
        tl.store(kept_keys_ptr + entry, tl.sum(tokens, 0))
    packed = tl.sum(tl.reshape(kept.to(tl.int32), [W_PAD, 32]) << tl.arange(0, 32)[None, :], 1)
    tl.store(target, packed, mask=word < words)


@triton.jit
def _image(score, candidate):
    """Map scores to unsigned integers of the same order; what is no candidate gets 0, below every score."""
    bits = score.to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # as signed integers
    return tl.where(candidate, ordered.to(tl.uint32, bitcast=True) ^ 0x80000000, 0)


@triton.jit
def _best(image, count):
    """Mark the `count` largest, at most as many as there are candidates; among equal ones the lower index wins."""
    value = tl.full([], 0, tl.uint32)  # becomes the largest that `count` images reach: the last one that wins
    bit = tl.full([], 0x80000000, tl.uint32)
    for _ in range(32):
        enough = tl.sum((image >= (value | bit)).to(tl.int32), 0) >= count
        value = tl.where(enough, value | bit, value)
        bit = bit >> 1
    above = image > value
    tied = (image == value).to(tl.int32)
    before = tl.cumsum(tied, 0) - tied
    return above | ((tied != 0) & (before < count - tl.sum(above.to(tl.int32), 0)))


@triton.jit
def _count_to_goal(image, weight, goal):
    """Count how many of the largest it takes until their weights, 0 for what is no candidate, sum to goal."""
    value = tl.full([], 0, tl.uint32)  # becomes the largest down to which the weights suffice, 0 if all do not
    bit = tl.full([], 0x80000000, tl.uint32)
    for _ in range(32):
        enough = tl.sum(tl.where(image >= (value | bit), weight, 0.0), 0) >= goal
        value = tl.where(enough, value | bit, value)
        bit = bit >> 1
    above = image > value
    missing = goal - tl.sum(tl.where(above, weight, 0.0), 0)
    tied = image == value
    each = tl.max(tl.where(tied, weight, 0.0), 0)  # equal scores have equal weights
    ties = tl.minimum(tl.ceil(missing / tl.where(each > 0.0, each, 1.0)).to(tl.int32), tl.sum(tied.to(tl.int32), 0))
    return tl.sum(above.to(tl.int32), 0) + tl.where(each > 0.0, ties, 0)
