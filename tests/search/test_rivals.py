"""Uniform patterns beside a plan: what they cost, which are rendered, and how they are held against it."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from scipy.stats import ttest_rel

from dit_sparse.search.planner.points import price_errors
from dit_sparse.search.planner.problem import evaluate, uniform
from dit_sparse.search.planner.report import table_rows, to_markdown
from dit_sparse.search.planner.rivals import paired_db, rival_rows, rivals
from dit_sparse.search.planner.uniform import costs, everywhere, kind_of
from dit_sparse.search.planner.uniform import rivals as to_render
from dit_sparse.search.planner.weigh import make_problem
from tests.search.made_reports import made
from tests.search.test_weigh import made_up


def point(kind: str, db: list[list[float | None]], attention: float, name: str = "") -> dict[str, Any]:
    """Return a rendered point; db is [prompts][seeds], None for identical clips."""
    clips = [
        {"prompt": p, "seed": s, "psnr_db": value} for p, values in enumerate(db) for s, value in enumerate(values)
    ]
    return {"name": name or kind, "kind": kind, "measured": {"clips": clips, "attention_seconds": attention}}


def test_costs_of_uniform_patterns_are_those_of_the_problem() -> None:
    for batch in (1, 3):
        scored, prices = made_up()
        weights = np.random.default_rng().uniform(0.1, 2.0, len(scored.places))
        problem = make_problem(scored, prices, weights, batch)
        ms, loss = costs(scored, prices, weights, batch)
        for number in range(len(scored.candidates)):
            assert (ms[number], loss[number]) == pytest.approx(evaluate(problem, uniform(problem, number)))
            assert (everywhere(scored, number) == number).all()


def test_each_kind_is_rendered_at_the_time_and_at_the_loss_of_the_plan() -> None:
    for _ in range(50):
        scored, prices = made_up()
        ms, loss = costs(scored, prices, np.ones(len(scored.places)))
        plan_ms, plan_loss = np.random.default_rng().choice(ms), np.random.default_rng().choice(loss)
        found = to_render(scored, ms, loss, plan_ms, plan_loss)
        assert len(set(found)) == len(found)
        kinds = {kind_of(pattern) for pattern in scored.candidates[1:]}
        assert {kind_of(scored.candidates[n]) for n in found[: len(kinds)]} == kinds == {"topblocks", "radial"}
        for kind in kinds:
            members = [n for n, p in enumerate(scored.candidates) if n and kind_of(p) == kind]
            chosen = [n for n in found if n in members]
            in_time = [loss[n] for n in members if ms[n] <= plan_ms]
            in_loss = [ms[n] for n in members if loss[n] <= plan_loss]
            assert any(loss[n] == min(in_time) for n in chosen if ms[n] <= plan_ms) or not in_time
            assert any(ms[n] == min(in_loss) for n in chosen if loss[n] <= plan_loss) or not in_loss


def test_paired_differences_have_the_interval_of_a_paired_t_test_over_prompts() -> None:
    rng = np.random.default_rng()
    mine, its = rng.normal(25, 4, (16, 2)), rng.normal(23, 4, (16, 2))
    found = paired_db(point("searched", mine.tolist(), 1.0), point("uniform", its.tolist(), 1.0))
    known = ttest_rel(mine.mean(1), its.mean(1)).confidence_interval(0.95)
    assert found == pytest.approx({"mean": (mine - its).mean(), "low": known.low, "high": known.high})


def test_rivals_are_held_against_the_plan_that_beats_them_most() -> None:
    plans = [
        point("searched", [[30.0], [32.0]], 2.0, "slow"), point("searched", [[25.0], [27.0]], 1.0, "fast"),
        point("searched", [[None], [None]], 4.0, "dense"),
    ]  # fmt: skip
    weak, strong, odd = (
        point("uniform", [[20.0], [21.0]], 3.0, "weak"), point("uniform", [[30.0], [33.0]], 0.5, "strong"),
        point("uniform", [[31.0], [31.0]], 2.0, "odd"),
    )  # fmt: skip
    found = {one["rival"]["name"]: one for one in rivals([weak, *plans, strong, odd])}
    assert list(found) == ["strong", "odd", "weak"]
    assert (found["weak"]["at_its_loss"]["plan"], found["weak"]["at_its_loss"]["times_faster"]) == ("fast", 3.0)
    assert (found["weak"]["at_its_time"]["plan"], found["weak"]["at_its_time"]["db"]["mean"]) == ("slow", 10.5)
    assert found["strong"]["at_its_time"] is None
    assert (found["strong"]["at_its_loss"]["plan"], found["strong"]["at_its_loss"]["times_faster"]) == ("dense", 0.125)
    assert (found["odd"]["at_its_loss"]["plan"], found["odd"]["at_its_loss"]["times_faster"]) == ("slow", 1.0)


def test_a_report_tells_rivals_and_how_far_off_prices_were() -> None:
    seed = random.randrange(10**6)
    report = made(seed, points=8)
    uniform_points = [p for p in report["points"] if p["kind"] == "uniform"]
    rows = rival_rows(report)
    assert [row[0] for row in rows] == [
        p["name"] for p in sorted(uniform_points, key=lambda p: p["measured"]["attention_seconds"])
    ]
    errors = price_errors(report)
    assert len(errors) == 9
    assert errors[0] == pytest.approx(900.0 / 40000.0 - 1.0)
    text = to_markdown(report)
    assert ("## Against uniform patterns" in text) == bool(uniform_points)
    assert f"{100 * min(errors):+.1f} to {100 * max(errors):+.1f} % off in 9 runs" in text


def test_a_table_of_rendered_points_leaves_the_others_out() -> None:
    report = made(random.randrange(10**6), points=9, rendered=0.5)
    rendered = [p for i, p in enumerate(report["points"]) if p["measured"] or i == report["chosen"]]
    assert len(table_rows(report, rendered=True)) == len(rendered)
    assert len(table_rows(report)) == 9
