"""The Lagrangian side of the pattern search: with a price on the budget, every unit is solved by itself."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from dit_sparse.search.planner.problem import Choice, Floats, Problem, evaluate, families_used

Bools = NDArray[np.bool_]

MS, LOSS = 0, 1  # the two figures of a choice, as evaluate returns them
MOST_PRICES = 200  # the walk ends by itself after 10 to 40
MOST_ROUNDS = 20  # of greedy improvement
SLAB = 1 << 22  # numbers of a [2^F, units, H] table held at once
ROUNDING = 1e-14  # relative, for a sum of many products


@dataclass(frozen=True, eq=False)
class Table:
    """Hold a problem with what is left of it after pruning.

    open: [U, H, C], candidates still in the race. families: those in use, each as its columns of C; subset s of
    them has bit f for families[f]. fees_ms: [2^F, U], launches of a subset and the price of mixing.
    """

    problem: Problem
    ms: Floats  # [U, H, C], 0 where nothing is offered
    loss: Floats  # [U, H, C], 0 where nothing is offered
    open: Bools
    families: tuple[NDArray[np.intp], ...]
    fees_ms: Floats

    def weigh(self, weights: tuple[float, float]) -> Floats:
        """Return weights · (ms, loss) of every candidate [U, H, C]; inf where it is closed."""
        return np.where(self.open, weights[MS] * self.ms + weights[LOSS] * self.loss, np.inf)


@dataclass(frozen=True, eq=False)
class Regrets:
    """Say by how much the weighted sum grows at least if something is imposed: [U, H, C] and [2^F, U]."""

    candidates: Floats
    subsets: Floats


@dataclass(frozen=True, eq=False)
class Walk:
    """Hold what the multiplier's walk found: a feasible choice, a bound of the goal, and the price that proved it."""

    choice: Choice
    bound: float
    weights: tuple[float, float]


def make_table(problem: Problem) -> Table:
    """Close what a candidate of the same family dominates: no more ms and no more loss."""
    offered = np.isfinite(problem.loss)
    ms, loss = (np.where(offered, x, 0.0) for x in (problem.ms, problem.loss))
    names = np.unique(problem.family)
    families = tuple(np.flatnonzero(problem.family == name) for name in names)
    left = offered.copy()
    for columns in families:
        for c in columns:
            for d in columns[columns != c]:
                no_worse = (ms[..., d] <= ms[..., c]) & (loss[..., d] <= loss[..., c])
                twin = (ms[..., d] == ms[..., c]) & (loss[..., d] == loss[..., c]) & (d > c)
                left[..., c] &= ~offered[..., d] | ~no_worse | twin
    has = _bits(len(families))
    fees = has.astype(np.float64) @ problem.launch_ms[:, names].T
    fees += np.outer(has.sum(axis=1) > 1, problem.mixed_ms)
    return Table(problem, ms, loss, left, families, fees)


def close(table: Table, wrong: Bools) -> Table:
    """Take candidates [U, H, C] out of the race, and forget columns that nobody can use."""
    left = table.open & ~wrong
    used = np.flatnonzero(left.any(axis=(0, 1)))
    return replace(table, open=left, families=tuple(columns[np.isin(columns, used)] for columns in table.families))


def separate(table: Table, weights: tuple[float, float]) -> Choice:
    """Return the choice of the least weighted sum: in each unit the best subset of families, in it each head's best."""
    values = table.weigh(weights)
    best, which = _best(table, values)
    chosen = np.empty(best.shape[1:], dtype=np.int64)
    has = _bits(len(table.families))
    for slab in _slabs(table):
        totals = _subset_heads(best[:, slab]).sum(axis=-1) + weights[MS] * table.fees_ms[:, slab]
        allowed = has[totals.argmin(axis=0)].T[..., None]  # [F, units, 1]
        family = np.where(allowed, best[:, slab], np.inf).argmin(axis=0)
        chosen[slab] = np.take_along_axis(which[:, slab], family[None], axis=0)[0]
    return chosen


def regrets(table: Table, weights: tuple[float, float]) -> Regrets:
    """Return what it costs at least to impose a candidate on a head, or a subset of families on a unit."""
    values = table.weigh(weights)
    best, _ = _best(table, values)
    candidates = np.full(values.shape, np.inf)
    subsets = np.full(table.fees_ms.shape, np.inf)
    has = _bits(len(table.families))
    for slab in _slabs(table):
        heads = _subset_heads(best[:, slab])
        totals = heads.sum(axis=-1) + weights[MS] * table.fees_ms[:, slab]
        least = totals.min(axis=0)
        subsets[:, slab] = totals - least
        heads = np.where(np.isfinite(totals)[..., None], heads, 0.0)
        for f, columns in enumerate(table.families):
            without = (totals[..., None] - heads)[has[:, f]].min(axis=0)  # [units, H], the rest of the unit at its best
            candidates[slab, :, columns] = values[slab][..., columns] + (without - least[:, None])[..., None]
    return Regrets(candidates, subsets)


def walk(table: Table, goal: int, budget: float) -> Walk | None:
    """Minimise one figure with the other within a budget, but for the jump at the multiplier; None: out of reach.

    The two solutions that bracket the budget are corners of the lower hull of all choices. The slope between them
    is the next multiplier, in turn with the geometric mean of its bracket, until nothing lies below their line.
    """
    use = 1 - goal
    low, high = separate(table, _weights(goal, 0.0)), separate(table, _weights(use, 0.0))
    at_low, at_high = evaluate(table.problem, low), evaluate(table.problem, high)
    if at_low[use] <= budget:
        return Walk(low, at_low[goal], _weights(goal, 0.0))
    if at_high[use] > budget:
        return None
    bound, proof, bracket = at_low[goal], _weights(goal, 0.0), (0.0, math.inf)
    for turn in range(MOST_PRICES):
        slope = max(0.0, at_high[goal] - at_low[goal]) / (at_low[use] - at_high[use])
        middle = math.sqrt(bracket[0] * bracket[1]) if turn % 2 else slope
        price = middle if bracket[0] < middle < bracket[1] else slope
        found = separate(table, _weights(goal, price))
        at = evaluate(table.problem, found)
        value = at[goal] + price * at[use]
        proven = value - price * budget - ROUNDING * (value + price * budget)
        if proven > bound:
            bound, proof = proven, _weights(goal, price)
        if price == slope and value >= (at_high[goal] + price * at_high[use]) * (1 - ROUNDING):
            break
        if at[use] <= budget:
            high, at_high, bracket = found, at, (bracket[0], price)
        else:
            low, at_low, bracket = found, at, (price, bracket[1])
    return Walk(_improve(table, _fill(table, low, high, goal, budget), goal, budget), bound, proof)


def _weights(goal: int, price: float) -> tuple[float, float]:
    return (1.0, price) if goal == MS else (price, 1.0)


def _fill(table: Table, low: Choice, high: Choice, goal: int, budget: float) -> Choice:
    """Give units what they have in the choice over the budget, the greatest gain first, as long as it fits."""
    choice, spent = high.copy(), evaluate(table.problem, high)[1 - goal]
    was, now = _unit_figures(table, high), _unit_figures(table, low)
    gain, price = was[goal] - now[goal], now[1 - goal] - was[1 - goal]
    for unit in np.argsort(-gain, kind="stable"):
        if gain[unit] > 0 and spent + price[unit] <= budget:
            choice[unit] = low[unit]
            spent += price[unit]
    return choice if evaluate(table.problem, choice)[1 - goal] <= budget else high


def _improve(table: Table, choice: Choice, goal: int, budget: float) -> Choice:
    """Let heads change within the families that their unit runs, the greatest gain first, as long as it fits."""
    for _ in range(MOST_ROUNDS):
        spent = evaluate(table.problem, choice)
        runs = families_used(table.problem, choice)[:, table.problem.family]  # [U, C]
        change = [x - np.take_along_axis(x, choice[..., None], axis=-1) for x in (table.ms, table.loss)]
        fits = table.open & runs[:, None] & (change[1 - goal] <= budget - spent[1 - goal])
        gain = np.where(fits, -change[goal], 0.0)
        pick = gain.argmax(axis=-1)
        best = np.take_along_axis(gain, pick[..., None], axis=-1)[..., 0]
        price = np.take_along_axis(change[1 - goal], pick[..., None], axis=-1)[..., 0]
        left, now = budget - spent[1 - goal], choice.copy()
        for u, h in zip(*np.unravel_index(np.argsort(-best, axis=None, kind="stable"), best.shape), strict=True):
            if best[u, h] > 0 and price[u, h] <= left:
                now[u, h] = pick[u, h]
                left -= price[u, h]
        after = evaluate(table.problem, now)
        if after[1 - goal] > budget or after[goal] >= spent[goal]:
            return choice
        choice = now
    return choice


def _unit_figures(table: Table, choice: Choice) -> tuple[Floats, Floats]:
    """Return (ms, loss) of every unit [U]."""
    ms, loss = (np.take_along_axis(x, choice[..., None], axis=-1).sum(axis=(1, 2)) for x in (table.ms, table.loss))
    runs = families_used(table.problem, choice)
    fees = (runs * table.problem.launch_ms).sum(axis=1) + table.problem.mixed_ms * (runs.sum(axis=1) > 1)
    return ms + fees, loss


def _best(table: Table, values: Floats) -> tuple[Floats, NDArray[np.int64]]:
    """Return each head's least value within a family, and its candidate: both [F, U, H]."""
    shape = (len(table.families), *values.shape[:2])
    best, which = np.full(shape, np.inf), np.zeros(shape, dtype=np.int64)
    for f, columns in enumerate(table.families):
        if len(columns):
            mine = values[..., columns]
            at = mine.argmin(axis=-1)
            best[f], which[f] = np.take_along_axis(mine, at[..., None], axis=-1)[..., 0], columns[at]
    return best, which


def _subset_heads(best: Floats) -> Floats:
    """Return each head's least value within every subset of the families: [F, U, H] -> [2^F, U, H]."""
    heads = np.full((1, *best.shape[1:]), np.inf)
    for one in best:
        heads = np.concatenate([heads, np.minimum(heads, one)])
    return heads


def _bits(families: int) -> Bools:
    """Say which families a subset holds: [2^F, F]."""
    return (np.arange(1 << families)[:, None] >> np.arange(families) & 1).astype(np.bool_)


def _slabs(table: Table) -> list[slice]:
    U, H, _ = table.open.shape
    units = max(1, SLAB // (H << len(table.families)))
    return [slice(start, start + units) for start in range(0, U, units)]
