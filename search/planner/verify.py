"""Tighten the error budget until the clips of the plan pass the gate: the render decides, scores only propose."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from dit_sparse.plan import Plan
from dit_sparse.search.planner.gate import Gate
from dit_sparse.search.planner.problem import Problem, evaluate, uniform
from dit_sparse.search.planner.renders import OutOfTimeError, Render
from dit_sparse.search.planner.solve import Solution, closest, fastest

CLOSE_DB = 0.5  # a plan that passes by no more is close enough to the gate
DENSE_MARGIN_DB = 10.0  # what a budget without any sparse call is raised by
LOOKS = 6  # budgets looked at for each plan that may be rendered: several may come to the same plan
NEAR = 1.05  # a budget that passes and one that fails this near to each other tell no more


@dataclass(frozen=True, eq=False)
class Trial:
    """Hold one plan that was tried: its loss budget, what the solver proved, its clips and how far they pass.

    Of several budgets that come to one plan it is the largest of a plan that passes, the smallest of one that fails.
    """

    budget: float
    solution: Solution
    plan: Plan
    render: Render | None = None  # None where time was up before
    margin_db: float | None = None

    @property
    def passes(self) -> bool:
        return self.margin_db is not None and self.margin_db >= 0.0


def first_budget(problem: Problem, gate: Gate, measured: bool) -> float:
    """Return the loss budget to begin with.

    measured: losses are squared errors of clips; then the gate's PSNR says what is allowed. Else the budget is that of
    the least loss at half the time between the cheapest choice and dense.
    """
    if measured and (limit := gate.limits.get("psnr_db")) is not None:
        return float(10 ** (-limit / 10))
    dense_ms, _ = evaluate(problem, uniform(problem, 0))
    cheapest = fastest(problem, math.inf)
    return closest(problem, (dense_ms + cheapest.ms) / 2).loss


def tighten(
    problem: Problem,
    gate: Gate,
    budget: float,
    make_plan: Callable[[Solution], Plan],
    render: Callable[[Plan, str], Render],
    most_trials: int,
) -> tuple[list[Trial], bool]:
    """Try plans until one passes the gate closely; return all trials and whether time was up.

    The next budget follows from the margin of the last one, a squared error growing with the loss; between a budget
    that passed and one that failed it stays between them. Each failure in a row doubles the slack that is aimed for:
    the worst of many clips follows the loss badly. A dense plan, which passes every gate, only says that the
    budget was too small, unless dense is the cheapest choice. Stops early where the cheapest choice passes.
    """
    cheapest = fastest(problem, math.inf)
    trials: list[Trial] = []
    passing, failing, failures = 0.0, math.inf, 0
    for _ in range(LOOKS * most_trials):
        solution = fastest(problem, budget)
        plan = make_plan(solution)
        at = next((n for n, trial in enumerate(trials) if trial.plan == plan), None)
        if not plan.rules and cheapest.loss > 0.0:
            margin = DENSE_MARGIN_DB
        elif at is not None:
            margin = trials[at].margin_db or 0.0
            limit = max if margin >= 0.0 else min
            trials[at] = replace(trials[at], budget=limit(budget, trials[at].budget))
        elif len(trials) == most_trials:
            break
        else:
            try:
                clips = render(plan, f"rendering plan {len(trials) + 1} of at most {most_trials}")
            except OutOfTimeError:
                return [*trials, Trial(budget, solution, plan)], True
            margin = gate.margin_db(clips.metrics)
            trials.append(Trial(budget, solution, plan, clips, margin))
            if 0.0 <= margin <= CLOSE_DB:
                break
        if margin >= 0.0 and budget >= cheapest.loss:
            break
        passing = max(passing, budget) if margin >= 0.0 else passing
        failing = min(failing, budget) if margin < 0.0 else failing
        failures = failures + 1 if margin < 0.0 else 0
        if failing <= passing * NEAR:
            break
        slack = CLOSE_DB / 2 * 2 ** max(0, failures - 1)
        budget = _next(budget, margin - slack, passing, failing, cheapest.loss)
    if not trials:
        trials.append(Trial(budget, solution, plan))
    return trials, False


def best(trials: list[Trial]) -> Trial:
    """Return the fastest plan that passes, or else the one that comes nearest to the gate, or else the last tried."""
    passed = [trial for trial in trials if trial.passes]
    if passed:
        return min(passed, key=lambda trial: trial.solution.ms)
    rendered = [trial for trial in trials if trial.margin_db is not None]
    return max(rendered, key=lambda trial: trial.margin_db or -math.inf) if rendered else trials[-1]


def _next(budget: float, change_db: float, passing: float, failing: float, most: float) -> float:
    wanted = budget * 10 ** (max(-20.0, min(20.0, change_db)) / 10)
    if passing > 0.0 and math.isfinite(failing) and not passing < wanted < failing:
        wanted = math.sqrt(passing * failing)
    return min(wanted, most)
