"""Uniform patterns: what one pattern costs everywhere, and which ones of a kind rival a plan."""

from __future__ import annotations

import numpy as np

from dit_sparse.patterns import Cached, Pattern
from dit_sparse.search.planner.prices import Prices
from dit_sparse.search.planner.problem import Choice, Floats
from dit_sparse.search.planner.weigh import Scored


def costs(scored: Scored, prices: Prices, weights: Floats, batch: int = 1) -> tuple[Floats, Floats]:
    """Return (ms, loss), [C] each, of every candidate used in all places for all heads; of one clip, as `Problem`."""
    found = [prices.by_pattern[str(pattern)] for pattern in scored.candidates]
    launch, head = np.array([price.launch for price in found]), np.array([price.head for price in found])
    ms = (scored.calls[:, None] * (launch + scored.real.sum(1)[:, None] * head)).sum(0) / batch
    loss = np.where(scored.real[..., None] > 0, scored.projected, 0.0).sum(1)
    return ms, (loss * weights[:, None]).sum(0)


def everywhere(scored: Scored, candidate: int) -> Choice:
    """Return the choice of one candidate for all heads that exist."""
    return np.where(scored.real > 0, candidate, 0)


def rivals(scored: Scored, ms: Floats, loss: Floats, plan_ms: float, plan_loss: float) -> list[int]:
    """Name two candidates of each kind: the one that loses least in the plan's time, the fastest at the plan's loss.

    Where all of a kind are slower, or lose more, the fastest and the one that loses least stand in. Those of the
    first sort come first, so that a search cut short has one of each kind.
    """
    kinds: dict[str, list[int]] = {}
    for number, pattern in enumerate(scored.candidates):
        if number:
            kinds.setdefault(kind_of(pattern), []).append(number)
    for_time, for_loss = [], []
    for members in kinds.values():
        in_time = [n for n in members if ms[n] <= plan_ms] or [min(members, key=lambda n: ms[n])]
        in_loss = [n for n in members if loss[n] <= plan_loss] or [min(members, key=lambda n: loss[n])]
        for_time.append(min(in_time, key=lambda n: loss[n]))
        for_loss.append(min(in_loss, key=lambda n: ms[n]))
    return list(dict.fromkeys([*for_time, *for_loss]))


def kind_of(pattern: Pattern) -> str:
    """Name the kind of a pattern; one whose choice is kept over steps is of the kind that chooses."""
    return kind_of(pattern.pattern) if isinstance(pattern, Cached) else pattern.name
