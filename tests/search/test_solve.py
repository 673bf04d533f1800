"""The solver of the pattern search against every choice there is, and against what must hold for any problem."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from dit_sparse.search.planner import exact, solve
from dit_sparse.search.planner.solve import Problem, Solution, closest, evaluate, fastest, uniform
from tests.search.problems import Floats, all_choices, draw, draw_large

SEEDS = st.integers(0, 2**32 - 1)
SAME = 1 + 1e-9


def held(problem: Problem, found: Solution, find: Callable[..., Solution], budget: float) -> float:
    """Check what must hold of any solution; return its goal."""
    assert evaluate(problem, found.choice) == (found.ms, found.loss)
    value, used = (found.ms, found.loss) if find is fastest else (found.loss, found.ms)
    assert used <= budget
    assert 0 <= found.bound <= value
    assert found.gap == pytest.approx((value - found.bound) / value if value else 0.0)
    return value


SIZES = st.sampled_from([(1, 1, 6, 3), (1, 4, 5, 4), (2, 2, 4, 3), (2, 3, 4, 3), (3, 2, 3, 2), (4, 1, 4, 2)])  # U H C F


def tight(goal: Floats, other: Floats, share: float) -> float:
    """Return a budget between the least there is and the least that the best of all needs."""
    least = other.min()
    return float(least + share * (other[goal == goal.min()].min() - least)) * SAME


@settings(max_examples=200, deadline=None)
@given(SEEDS, SIZES, st.booleans(), st.floats(0, 1))
def test_both_find_the_best_of_all_choices(
    seed: int, size: tuple[int, int, int, int], whole: bool, share: float
) -> None:
    problem = draw(seed, *size, whole=whole)
    ms, loss = all_choices(problem)
    for find, goal, other in ((fastest, ms, loss), (closest, loss, ms)):
        budget = tight(goal, other, share)
        found = find(problem, budget, most_gap=0)
        best = goal[other <= budget].min()
        assert held(problem, found, find, budget) == pytest.approx(best, rel=1e-9)
        assert found.bound <= best * SAME
        assert found.optimal or found.gap < 1e-6  # HiGHS takes .999999 for 1, and its bound says so


@settings(max_examples=60, deadline=None)
@given(SEEDS, SIZES, st.floats(0, 1))
def test_a_bound_without_highs_is_below_the_best(seed: int, size: tuple[int, int, int, int], share: float) -> None:
    problem = draw(seed, *size)
    ms, loss = all_choices(problem)
    for find, goal, other in ((fastest, ms, loss), (closest, loss, ms)):
        budget = tight(goal, other, share)
        found = find(problem, budget, most_gap=1e9)
        best = goal[other <= budget].min()
        assert found.method == "lagrangian"
        assert found.bound / SAME <= best <= held(problem, found, find, budget) * SAME


# what a session meets (losses 1e-8..1e-1, 1e-2..1e5 ms), and beyond
@pytest.mark.parametrize("scales", [(1e5, 1e-8), (1e-2, 1e-1), (1e-9, 1e9), (1e9, 1e-15)])
def test_scales_do_not_matter(scales: tuple[float, float]) -> None:
    for seed in np.random.default_rng().integers(0, 2**32, 10).tolist():
        problem = draw(seed, scales=scales)
        ms, loss = all_choices(problem)
        for share in (0.05, 0.4, 0.9):
            for find, goal, other in ((fastest, ms, loss), (closest, loss, ms)):
                budget = tight(goal, other, share)
                value = held(problem, find(problem, budget, most_gap=0), find, budget)
                assert value == pytest.approx(goal[other <= budget].min(), rel=1e-9, abs=0), (seed, find)


@settings(max_examples=25, deadline=None)
@given(SEEDS)
def test_more_budget_is_never_worse(seed: int) -> None:
    problem = draw(seed, 4, 4, 6)
    slow, lossy = evaluate(problem, uniform(problem, 0))[0], fastest(problem, np.inf).loss
    times = [fastest(problem, share * lossy, most_gap=0).ms for share in np.linspace(0, 1, 6)]
    assert (np.diff(times) <= 1e-9 * times[0]).all()
    least = fastest(problem, np.inf).ms
    losses = [
        closest(problem, (least + share * (slow - least)) * SAME, most_gap=0).loss for share in np.linspace(0, 1, 6)
    ]
    assert (np.diff(losses) <= 1e-9 * losses[0]).all()
    assert losses[-1] == 0


@settings(max_examples=30, deadline=None)
@given(SEEDS)
def test_no_budget_keeps_what_loses_nothing_and_any_budget_takes_the_cheapest(seed: int) -> None:
    problem = draw(seed, 3, 2, 3)
    none = fastest(problem, 0.0)
    assert none.loss == 0
    assert (none.choice == 0).all()
    free = replace(problem, loss=np.where(np.arange(3) == 1, 0.0, problem.loss))
    ms, loss = all_choices(free)
    none = fastest(free, 0.0, most_gap=0)
    assert none.loss == 0
    assert none.ms == pytest.approx(ms[loss == 0].min(), rel=1e-9)
    for huge in (1e300, np.inf):
        assert fastest(free, huge).ms == pytest.approx(ms.min(), rel=1e-9)
        assert fastest(free, huge).gap == 0
        # of all choices without loss, the fastest
        assert closest(free, huge).ms == pytest.approx(ms[loss == 0].min(), rel=1e-9)


@settings(max_examples=25, deadline=None)
@given(SEEDS)
def test_too_little_time_names_the_least_and_its_loss(seed: int) -> None:
    problem = draw(seed)
    ms, loss = all_choices(problem)
    assume(ms.min() > 0)
    with pytest.raises(ValueError, match=r"allow at least that much time") as error:
        closest(problem, float(ms.min()) * 0.999, most_gap=0)
    words = str(error.value).split()
    least_ms = float(words[words.index("ms,") - 1])
    least_loss = float(words[-11].rstrip(";"))
    assert least_ms == pytest.approx(ms.min(), rel=1e-12)
    assert least_loss == pytest.approx(loss[ms <= least_ms * SAME].min(), rel=1e-9)
    assert closest(problem, least_ms, most_gap=0).loss == least_loss


def test_one_candidate_and_one_head() -> None:
    only = Problem(np.zeros((3, 2, 1)), np.ones((3, 1)), [0], np.ones((3, 1)), np.ones(3))
    for found in (fastest(only, 0.0), closest(only, 9.0)):
        assert (found.ms, found.loss, found.gap, found.optimal) == (9.0, 0.0, 0.0, True)
    with pytest.raises(ValueError, match=r"least time is 9\.0 ms"):
        closest(only, 8.9)
    one = Problem([[[0, 0.1, 0.3]]], [[5, 3, 1]], [0, 1, 1], [[1, 1]], [7])
    assert [fastest(one, budget).choice.item() for budget in (0.09, 0.1, 0.29, 0.3)] == [0, 1, 1, 2]
    assert [closest(one, budget).choice.item() for budget in (2, 3.9, 4, 6)] == [2, 2, 1, 0]


def test_heads_stay_in_one_family_where_a_second_launch_costs_more_than_it_wins() -> None:
    r = np.random.default_rng()
    H = 6
    taste = r.integers(1, 3, H)
    taste[:2] = 1, 2
    loss = np.ones((1, H, 3))
    loss[0, np.arange(H), taste] = 0.5  # alone, every head would take the family it likes
    loss[..., 0] = 0
    problem = Problem(loss, [[10.0, 1, 1]], [0, 1, 2], [[0.0, 1, 1]], [5.0])
    found = closest(problem, H + 1.0, most_gap=0)
    assert len(np.unique(found.choice)) == 1
    likes_more = 1 + np.argmax([(taste == 1).sum(), (taste == 2).sum()])
    assert found.loss == H - 0.5 * (taste == likes_more).sum()
    apart = closest(problem, H + 7.0, most_gap=0)
    assert (apart.choice[0] == taste).all()


def test_a_large_case_comes_within_one_percent() -> None:
    problem = draw_large(int(np.random.default_rng().integers(2**32)), 400, 40)
    dense_ms, _ = evaluate(problem, uniform(problem, 0))
    found = closest(problem, dense_ms / 3)
    held(problem, found, closest, dense_ms / 3)
    assert found.gap <= 0.01
    back = fastest(problem, found.loss)
    assert held(problem, back, fastest, found.loss) <= found.ms * 1.005
    assert back.gap <= 0.01


def test_it_beats_every_uniform_choice_and_gives_the_same_answer_twice() -> None:
    problem = draw_large(int(np.random.default_rng().integers(2**32)), 12, 8, 12, 5)
    for candidate in range(1, 12):
        ms, loss = evaluate(problem, uniform(problem, candidate))
        found, again = (closest(problem, ms) for _ in range(2))
        assert found.loss <= loss
        assert (found.choice == again.choice).all()
        assert found.bound == again.bound
        assert fastest(problem, loss).ms <= ms


def hard() -> tuple[Problem, float]:
    """Return a problem whose Lagrangian gap is wide: one unit of equal heads that must all do the same."""
    problem = Problem(np.array([[[0.0, 1.0]] * 6] * 3), [[4.0, 1.0]] * 3, [0, 1], [[1.0, 1.0]] * 3, [9.0] * 3)
    return problem, 11.0


@settings(max_examples=30, deadline=None)
@given(SEEDS, st.floats(0, 1))
def test_equal_units_need_no_highs_to_come_within_one_units_jump(seed: int, share: float) -> None:
    """At the best price all of them tie, and so would all change at once."""
    r = np.random.default_rng(seed)
    U, H = int(r.integers(2, 60)), int(r.integers(1, 6))
    head_ms, launch_ms = np.array([4.0, 1.0]) * r.uniform(0.5, 2), r.uniform(0, 2, 2)
    problem = Problem(np.tile([0.0, 1.0], (U, H, 1)), [head_ms] * U, [0, 1], [launch_ms] * U, [99.0] * U)
    jump = abs(H * (head_ms[0] - head_ms[1]) + launch_ms[0] - launch_ms[1])
    budget = share * U * H
    found = fastest(problem, budget, most_gap=1e9)
    assert held(problem, found, fastest, budget) <= found.bound + jump * SAME


def test_highs_closes_the_gap_and_without_it_the_lagrangian_choice_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    problem, budget = hard()
    ms, loss = all_choices(problem)
    best = ms[loss <= budget].min()
    whole = fastest(problem, budget, most_gap=0)
    assert (whole.optimal, whole.method) == (True, "milp")
    assert whole.ms == whole.bound == best
    with monkeypatch.context() as patch:
        patch.setattr(solve, "MOST_COLUMNS", 0)
        too_large = fastest(problem, budget, most_gap=0)
    monkeypatch.setattr(exact, "milp", lambda *_, **__: SimpleNamespace(x=None, mip_dual_bound=None))
    out_of_time = fastest(problem, budget, most_gap=0)
    for found in (too_large, out_of_time):
        assert (found.optimal, found.method) == (False, "lagrangian")
        assert 0 < found.gap < 1
        assert found.bound <= best <= held(problem, found, fastest, budget)


def test_highs_stopped_with_a_choice_in_hand_gives_it_with_its_own_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    problem, budget = hard()
    done = fastest(problem, budget, most_gap=0)
    milp, asked = exact.milp, []

    def stopped(*program: object, options: dict[str, float], **rest: object) -> SimpleNamespace:
        asked.append(options)
        answer = milp(*program, options=options, **rest)
        return SimpleNamespace(x=answer.x, mip_dual_bound=answer.mip_dual_bound * 0.99)

    monkeypatch.setattr(exact, "milp", stopped)
    found = fastest(problem, budget, most_gap=0, most_seconds=7.0)
    assert held(problem, found, fastest, budget) == done.ms
    assert (found.optimal, found.method) == (False, "milp")
    assert found.gap == pytest.approx(0.01)
    assert asked == [{"mip_rel_gap": 0, "time_limit": 7.0}]


def test_a_choice_of_highs_that_oversteps_the_budget_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    problem, budget = hard()
    budgets = []

    def careless(program: exact.Program, goal: int, budget: float, *rest: float) -> tuple[NDArray[np.int64], float]:
        budgets.append(budget)
        return np.ones((3, 6), dtype=np.int64), 0.0  # loses 18

    monkeypatch.setattr(solve, "run_program", careless)
    found = fastest(problem, budget, most_gap=0)
    held(problem, found, fastest, budget)
    assert found.method == "lagrangian"
    assert budgets[0] == budget > budgets[1]


def test_wrong_requests_are_refused() -> None:
    problem = draw(0)
    for find, name in ((fastest, "most_loss"), (closest, "most_ms")):
        for bad in (np.nan, -1.0):
            with pytest.raises(ValueError, match=name):
                find(problem, bad)
        with pytest.raises(ValueError, match="most_gap"):
            find(problem, 1.0, most_gap=-0.1)
