"""Which key blocks every query block keeps, from scores: by count, by mass or by threshold."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dit_sparse.kernels.device import runs_triton
from dit_sparse.kernels.indices import pack_bits


@dataclass(frozen=True, eq=False)
class Choice:
    """Hold the chosen key blocks of every query block."""

    bits: Tensor  # int32 [R, query_blocks, ceil(K/32)], packed like BlockIndices.bits
    pairs: Tensor  # fp64 [R]: query-key pairs in chosen pairs of blocks below `counted`


@dataclass(frozen=True, eq=False)
class Rule:
    """Hold all that choose_blocks is told beside the scores; see there."""

    counted: int
    q_len: Tensor  # int32 [query_blocks]
    kv_len: Tensor  # int32 [K]
    keep: Tensor | None  # int32 [R, Q]
    mass: float | None
    threshold: float | None
    at_least: int
    always: Tensor | None  # bool [K]
    forced: Tensor | None  # bool [Q, K]


def choose_blocks(
    score: Tensor,  # fp32 [R, Q, K], without NaN; -inf: no visible key, kept by always and forced only
    *,
    counted: int,  # pairs counts the first so many blocks, of queries (that are scored) and of keys
    q_len: Tensor,  # int32 [query_blocks], query_blocks >= Q; the blocks from Q on are dense
    kv_len: Tensor,  # int32 [K]
    keep: Tensor | None = None,  # int32 [R] or [R, Q]
    mass: float | None = None,  # in (0, 1]
    threshold: float | None = None,
    at_least: int = 1,
    always: Tensor | None = None,  # bool [K]
    forced: Tensor | None = None,  # bool [Q, K]
) -> Choice:
    """Choose the key blocks of every scored row by exactly one of keep, mass and threshold.

    Blocks that are `always` read stand outside everything below; the others compete. `forced` ones are kept in any
    case and count. Beside them the highest scores win, among equal ones the lower index:
    keep: so many blocks in all.
    mass: until the softmax of the score over all competitors sums to `mass`, the crossing block included; 1 keeps all.
    threshold: scores above mean + threshold * deviation (population) of the competitors' finite scores.
    at_least: fewer competitors are not kept, as far as there are that many with a finite score.

    Raises: ValueError or TypeError for arguments that do not fit each other.
    """
    _check_numbers(score, counted, keep, mass, threshold, at_least)
    rows, queries, keys = score.shape
    if q_len.dim() != 1 or len(q_len) < queries:
        raise ValueError(f"q_len must hold at least the {queries} scored query blocks, got shape {tuple(q_len.shape)}")
    _check_tensor("q_len", q_len, torch.int32, tuple(q_len.shape), score)
    _check_tensor("kv_len", kv_len, torch.int32, (keys,), score)
    _check_tensor("always", always, torch.bool, (keys,), score)
    _check_tensor("forced", forced, torch.bool, (queries, keys), score)
    if keep is not None:
        keep = keep[:, None].expand(-1, queries) if keep.dim() == 1 else keep
        _check_tensor("keep", keep, torch.int32, (rows, queries), score)
    rule = Rule(counted, q_len, kv_len, keep, mass, threshold, at_least, always, forced)
    if runs_triton(score):
        from dit_sparse.kernels import triton_choice  # triton is not there on every system

        return triton_choice.choose(score, rule)
    return slow_choose(score, rule)


def slow_choose(score: Tensor, rule: Rule) -> Choice:
    """Do what choose_blocks does, by sorting every row."""
    rows, queries, keys = score.shape
    outside = torch.zeros(keys, dtype=torch.bool, device=score.device) if rule.always is None else rule.always
    forced = outside.new_zeros((queries, keys)) if rule.forced is None else rule.forced & ~outside
    finite = (score > -torch.inf) & ~outside
    candidate = finite & ~forced
    ranked, order = score.masked_fill(~candidate, -torch.inf).sort(dim=-1, descending=True, stable=True)
    held = forced.sum(-1, dtype=torch.int32)  # [Q]
    count = _wins(score, rule, finite, forced, ranked, held)
    count = torch.minimum(torch.maximum(count, rule.at_least - held), candidate.sum(-1))
    wins = torch.arange(keys, device=score.device) < count[..., None]
    kept = torch.zeros_like(finite).scatter_(-1, order, wins) | forced | outside
    dense = kept.new_ones((rows, len(rule.q_len) - queries, keys))
    of_keys = (kept[:, : rule.counted, : rule.counted] * rule.kv_len[: rule.counted]).sum(-1)  # int64 [R, Q]
    pairs = of_keys.double() @ rule.q_len[: min(queries, rule.counted)].double()
    return Choice(pack_bits(torch.cat((kept, dense), 1)), pairs)


def _wins(
    score: Tensor,  # [R, Q, K]
    rule: Rule,
    finite: Tensor,  # bool [R, Q, K]: competitors with a finite score
    forced: Tensor,  # bool [Q, K]
    ranked: Tensor,  # [R, Q, K]: scores of those that are not forced, best first, then -inf
    held: Tensor,  # int32 [Q]: how many are forced
) -> Tensor:
    """Count how many of `ranked` the rule takes, before at_least: int [R, Q]."""
    if rule.keep is not None:
        return rule.keep - held
    inside = score.masked_fill(~finite, -torch.inf)
    if rule.mass is not None:
        top = inside.amax(-1, keepdim=True).clamp(min=torch.finfo(score.dtype).min)
        weight = (inside - top).exp()
        best = (ranked - top).exp()
        reached = (weight * forced).sum(-1, keepdim=True) + best.cumsum(-1) - best
        below = reached < rule.mass * weight.sum(-1, keepdim=True)
        return (below | (rule.mass >= 1.0)).sum(-1)
    assert rule.threshold is not None
    share = finite / finite.sum(-1, keepdim=True).clamp(min=1)
    mean = (share * inside.masked_fill(~finite, 0.0)).sum(-1, keepdim=True)
    variance = (share * (inside - mean).masked_fill(~finite, 0.0) ** 2).sum(-1, keepdim=True)
    return (ranked > mean + rule.threshold * variance.sqrt()).sum(-1)


def _check_numbers(
    score: Tensor,
    counted: int,
    keep: Tensor | None,
    mass: float | None,
    threshold: float | None,
    at_least: int,
) -> None:
    if score.dim() != 3 or score.numel() == 0:
        raise ValueError(f"score must be [R, Q, K] with at least one element, got shape {tuple(score.shape)}")
    if score.dtype != torch.float32:
        raise TypeError(f"score must be float32, got {score.dtype}")
    given = {"keep": keep is not None, "mass": mass is not None, "threshold": threshold is not None}
    if sum(given.values()) != 1:
        raise ValueError(f"give exactly one of keep, mass and threshold, got {[name for name in given if given[name]]}")
    if mass is not None and not 0.0 < mass <= 1.0:
        raise ValueError(f"mass must be in (0, 1], got {mass}")
    if threshold is not None and not math.isfinite(threshold):
        raise ValueError(f"threshold must be finite, got {threshold}")
    if at_least < 0:
        raise ValueError(f"at_least must be >= 0, got {at_least}")
    if not 0 <= counted <= score.shape[2]:
        raise ValueError(f"counted must be at most the key blocks, got counted={counted}, key blocks={score.shape[2]}")


def _check_tensor(name: str, tensor: Tensor | None, dtype: torch.dtype, shape: tuple[int, ...], score: Tensor) -> None:
    if tensor is None:
        return
    if tensor.dtype != dtype:
        raise TypeError(f"{name} must be {dtype}, got {tensor.dtype}")
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must have shape {shape} beside score {tuple(score.shape)}, got {tuple(tensor.shape)}")
    if tensor.device != score.device:
        raise ValueError(f"{name} and score must be on one device, got {tensor.device} and {score.device}")
