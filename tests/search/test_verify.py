"""The loop that renders: budgets follow from margins, until the gate holds closely or nothing is left to try."""

from __future__ import annotations

import math

import numpy as np
import pytest

from dit_sparse.plan import Plan
from dit_sparse.search.metrics import Metrics
from dit_sparse.search.planner.gate import Gate
from dit_sparse.search.planner.probe import unprobed
from dit_sparse.search.planner.problem import Problem, evaluate
from dit_sparse.search.planner.renders import OutOfTimeError, Render
from dit_sparse.search.planner.solve import Solution, fastest
from dit_sparse.search.planner.verify import CLOSE_DB, NEAR, best, first_budget, tighten
from dit_sparse.search.planner.weigh import make_problem, to_plan
from tests.search.test_weigh import GROUPS, made_up

GATE = Gate.parse("psnr_db>=25")


class Clips:
    """Render plans of a made-up problem: the squared error of a clip is `scale` times the modelled loss, and noise.

    slope: dB of a clip for each dB of loss below a hundredth; 1 where clips follow the loss.
    """

    def __init__(self, scale: float, noise_db: float = 0.0, last: int | None = None, slope: float = 1.0) -> None:
        self.scored, prices = made_up()
        self.problem: Problem = make_problem(self.scored, prices, unprobed(self.scored))
        self.scale, self.noise_db, self.last, self.slope = scale, noise_db, last, slope
        self.rendered: list[Plan] = []
        self.losses: dict[Plan, float] = {}
        self.rng = np.random.default_rng()

    def make_plan(self, solution: Solution) -> Plan:
        plan = to_plan(self.scored, solution.choice, GROUPS, "searched", None, {}, True)
        self.losses[plan] = solution.loss
        return plan

    def render(self, plan: Plan, what: str) -> Render:
        if self.last is not None and len(self.rendered) == self.last:
            raise OutOfTimeError
        self.rendered.append(plan)
        loss = self.losses[plan] * self.scale
        if loss == 0.0:
            return Render((Metrics(None, 1.0, 0.0, 0.0, True),), (1.0,), 1.0, 1.0)
        psnr = 20.0 + self.slope * (-10 * math.log10(loss) - 20.0) + self.rng.normal() * self.noise_db
        return Render((Metrics(psnr, 0.9, 0.01, 0.0, False),), (1.0,), 1.0, 0.5)


@pytest.mark.parametrize("scale", [1e-2, 0.3, 1.0, 7.0, 300.0])
def test_the_budget_comes_to_the_gate_whatever_the_scale_of_losses(scale: float) -> None:
    clips = Clips(scale)
    trials, out_of_time = tighten(
        clips.problem, GATE, first_budget(clips.problem, GATE, measured=False), clips.make_plan, clips.render, 12
    )
    assert not out_of_time
    chosen = best(trials)
    assert len({trial.plan for trial in trials}) == len(clips.rendered)
    assert chosen.passes
    assert chosen.margin_db is not None
    assert chosen.solution.loss * scale <= 10 ** (-25 / 10)
    passing = max(trial.budget for trial in trials if trial.passes)
    failing = min((trial.budget for trial in trials if not trial.passes), default=math.inf)
    cheapest = fastest(clips.problem, math.inf)
    assert passing < failing
    # close to the gate, or nothing lies between, or the cheapest of all passes, or no trial was left
    done = chosen.margin_db <= CLOSE_DB or failing <= passing * NEAR or passing >= cheapest.loss
    assert done or len(trials) == 12


def test_measured_losses_begin_at_the_gate() -> None:
    clips = Clips(1.0)
    assert first_budget(clips.problem, GATE, measured=True) == pytest.approx(10**-2.5)
    trials, _ = tighten(clips.problem, GATE, 10**-2.5, clips.make_plan, clips.render, 3)
    assert trials[0].passes


def test_noise_does_not_make_a_failing_plan_the_chosen_one() -> None:
    for _ in range(10):
        clips = Clips(3.0, noise_db=1.5)
        trials, _ = tighten(
            clips.problem, GATE, first_budget(clips.problem, GATE, measured=False), clips.make_plan, clips.render, 6
        )
        chosen = best(trials)
        passed = [trial for trial in trials if trial.passes]
        assert chosen.passes == bool(passed)
        if passed:
            assert chosen.solution.ms == min(trial.solution.ms for trial in passed)
        assert all(evaluate(clips.problem, t.solution.choice)[1] <= t.budget * (1 + 1e-9) for t in trials)


def test_a_worst_clip_that_hardly_follows_the_loss_is_brought_over_the_gate_in_few_trials() -> None:
    for _ in range(20):
        clips = Clips(1.0, noise_db=0.1, slope=0.3)
        least = min(clips.problem.loss[clips.problem.loss > 0])
        if 20.0 + 0.3 * (-10 * math.log10(least * 4) - 20.0) < 26.0:
            continue  # only dense would pass
        trials, _ = tighten(clips.problem, GATE, 10**-2.0, clips.make_plan, clips.render, 8)
        assert best(trials).passes


def test_a_gate_that_nothing_sparse_meets_ends_with_the_nearest_plan() -> None:
    clips = Clips(1e9)
    budget = first_budget(clips.problem, GATE, measured=False)
    trials, _ = tighten(clips.problem, GATE, budget, clips.make_plan, clips.render, 5)
    chosen = best(trials)
    assert not chosen.passes
    assert chosen.plan.rules
    margins = [trial.margin_db for trial in trials if trial.margin_db is not None]
    assert chosen.margin_db == max(margins)


def test_time_that_runs_out_leaves_what_was_rendered() -> None:
    clips = Clips(100.0, last=1)
    budget = first_budget(clips.problem, GATE, measured=False)
    trials, out_of_time = tighten(clips.problem, GATE, budget, clips.make_plan, clips.render, 5)
    assert out_of_time
    assert [trial.margin_db is None for trial in trials] == [False, True]
    assert best(trials) is trials[0]
