"""The solver of the offline pattern search: one candidate for every head of every unit, by a budget.

Minimise     sum of head_ms[u, h, c] x[u, h, c] + launch_ms[u, f] y[u, f] + mixed_ms[u] z[u]
subject to   sum of loss[u, h, c] x[u, h, c] <= most_loss, one candidate for each head,
             y[u, f] = 1 where a head of unit u takes one of family f, z[u] = 1 where more than one family runs

or, in `closest`, the two sums in each other's place. Three steps, each of which may be the last:
1. Close what a candidate of its own family dominates, and what the budget cannot pay for in any choice.
2. With a price on the budget the units fall apart. In each, every subset of families is tried and each head takes
   its best. The best price gives a lower bound and a choice at most one unit's jump away, which is then improved.
3. If the gap is over the tolerance, HiGHS solves what the bound leaves open, where that is small enough.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from dit_sparse.search.planner.dual import LOSS, MS, Table, Walk, close, make_table, regrets, separate, walk
from dit_sparse.search.planner.exact import count_columns, make_program, run_program
from dit_sparse.search.planner.problem import Choice, Problem, evaluate, uniform

__all__ = ["Problem", "Solution", "closest", "evaluate", "fastest", "uniform"]

MOST_COLUMNS = 50_000  # decisions that HiGHS is asked about; at more it would spend the time limit on reading them
SAME = 1e-9  # relative: gaps below are rounding


@dataclass(frozen=True, eq=False)
class Solution:
    """Hold a choice and what is proven about it.

    choice: [U, H]. ms, loss: as `evaluate` gives them. bound: no choice within the budget comes below it, in ms for
    `fastest`, in loss for `closest`. gap: how far the choice is above, relative to itself. optimal: gap is within the
    tolerance, or 1e-9; HiGHS proves some programs to 1e-7 only. method: what found the choice, "lagrangian" or "milp".
    """

    choice: Choice
    ms: float
    loss: float
    bound: float
    gap: float
    optimal: bool
    method: str


def fastest(problem: Problem, most_loss: float, *, most_gap: float = 0.005, most_seconds: float = 20.0) -> Solution:
    """Find the choice of the least time whose loss is at most most_loss.

    most_gap: relative, where the search may stop. most_seconds: of HiGHS, which is asked only if the gap is larger.

    Raises: ValueError for NaN or a negative number.
    """
    _check(most_loss=most_loss, most_gap=most_gap, most_seconds=most_seconds)
    found = _solve(make_table(problem), MS, most_loss, most_gap, most_seconds)
    assert found is not None, "dense has no loss"
    return found


def closest(problem: Problem, most_ms: float, *, most_gap: float = 0.005, most_seconds: float = 20.0) -> Solution:
    """Find the choice of the least loss that takes at most most_ms.

    most_gap: relative, where the search may stop. most_seconds: of HiGHS, which is asked only if the gap is larger.

    Raises: ValueError for NaN or a negative number, or if no choice is as fast as most_ms.
    """
    _check(most_ms=most_ms, most_gap=most_gap, most_seconds=most_seconds)
    table = make_table(problem)
    found = _solve(table, LOSS, most_ms, most_gap, most_seconds)
    if found is None:
        least_ms, _ = evaluate(problem, separate(table, (1.0, 0.0)))
        least = _solve(table, LOSS, least_ms, most_gap, most_seconds)
        loss = math.nan if least is None else least.loss
        raise ValueError(
            f"no choice takes at most most_ms={most_ms!r}: the least time is {least_ms!r} ms, with a loss of {loss!r}; "
            f"allow at least that much time, or offer faster candidates"
        )
    return found


def _solve(table: Table, goal: int, budget: float, most_gap: float, most_seconds: float) -> Solution | None:
    """Minimise one figure with the other within a budget; None if nothing is."""
    use = 1 - goal
    only_use = (1.0, 0.0) if use == MS else (0.0, 1.0)
    left = budget - evaluate(table.problem, separate(table, only_use))[use]
    if left < 0:
        return None
    slack = 0.0 if budget == 0 else left + SAME * budget
    table = close(table, regrets(table, only_use).candidates > slack)
    found = walk(table, goal, budget)
    assert found is not None, "the choice of the least use is within the budget"
    choice, bound, method = found.choice, found.bound, "lagrangian"
    value = evaluate(table.problem, choice)[goal]
    if value <= bound:
        # no price on the budget was needed: of the equally good choices take one that uses less of it
        again = walk(table, use, value)
        if again is not None and evaluate(table.problem, again.choice)[use] < evaluate(table.problem, choice)[use]:
            choice = again.choice
    elif _gap(value, bound) > max(most_gap, SAME):
        better, proven = _ask_highs(table, goal, budget, found, most_gap, most_seconds)
        bound = max(bound, proven)
        if better is not None:
            choice, method = better, "milp"
    ms, loss = evaluate(table.problem, choice)
    value = (ms, loss)[goal]
    bound = min(bound, value)
    gap = _gap(value, bound)
    return Solution(choice, ms, loss, bound, gap, gap <= max(most_gap, SAME), method)


def _ask_highs(
    table: Table, goal: int, budget: float, found: Walk, most_gap: float, most_seconds: float
) -> tuple[Choice | None, float]:
    """Return a better choice than the one found, if HiGHS knows one, and its bound (0 if it was not asked).

    What it is not asked about is no better than the choice found, so its bound holds for all choices.
    """
    use, value = 1 - goal, evaluate(table.problem, found.choice)[goal]
    room = value - found.bound
    regret = regrets(table, found.weights)
    open_, subsets = table.open & (regret.candidates <= room), regret.subsets <= room
    if count_columns(open_, subsets) > MOST_COLUMNS:
        return None, 0.0
    program = make_program(table, open_, subsets)
    choice, bound = run_program(program, goal, budget, value, most_gap, most_seconds)
    if choice is None:
        return None, bound
    at = evaluate(table.problem, choice)
    if at[use] > budget:
        # HiGHS meets the budget to 1e-9: ask again for a little less, and keep the bound of the first time
        less = budget * (1 - 4 * max(SAME, at[use] / budget - 1))
        choice, _ = run_program(program, goal, less, value, most_gap, most_seconds)
        at = (np.inf, np.inf) if choice is None else evaluate(table.problem, choice)
    return (choice, bound) if at[use] <= budget and at[goal] < value else (None, bound)


def _gap(value: float, bound: float) -> float:
    return 0.0 if value <= bound else (value - bound) / value


def _check(**numbers: float) -> None:
    for name, number in numbers.items():
        if not number >= 0:
            raise ValueError(f"{name} must be a number >= 0, got {number}")
