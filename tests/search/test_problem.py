"""What the pattern search chooses from: figures of a choice by their definition, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_sparse.search.planner.problem import Problem, evaluate, uniform
from dit_sparse.search.planner.solve import fastest
from tests.search.problems import Floats, all_choices, draw

SEEDS = st.integers(0, 2**32 - 1)


@settings(max_examples=40, deadline=None)
@given(SEEDS)
def test_evaluate_follows_the_definition(seed: int) -> None:
    problem = draw(seed, 2, 3)
    ms, loss = all_choices(problem)
    choice = np.random.default_rng(seed).integers(0, 4, (2, 3))
    at = evaluate(problem, choice)
    if np.isinf(at).any():
        assert at == (np.inf, np.inf)
        assert np.isinf(np.take_along_axis(problem.loss, choice[..., None], -1)).any()
    else:
        assert (np.isclose(ms, at[0], rtol=1e-12) & np.isclose(loss, at[1], rtol=1e-12)).any()
    for candidate in range(4):
        same = uniform(problem, candidate)
        offered = np.isfinite(problem.loss[..., candidate])
        assert (same == np.where(offered, candidate, 0)).all()
        assert evaluate(problem, same)[1] == pytest.approx(problem.loss[..., candidate][offered].sum())


def test_evaluate_counts_launches_once_and_mixing_where_families_meet() -> None:
    problem = Problem(np.zeros((2, 2, 3)), np.array([[1.0, 2, 3]] * 2), np.array([0, 1, 1]), [[10, 20]] * 2, [100, 200])
    assert evaluate(problem, np.array([[0, 0], [1, 2]])) == (1 + 1 + 10 + 2 + 3 + 20, 0.0)
    assert evaluate(problem, np.array([[0, 1], [2, 0]])) == (1 + 2 + 30 + 100 + 3 + 1 + 30 + 200, 0.0)


# each wrong in one way, and the word by which its message names it
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss": np.zeros((2, 3))}, r"loss must be \[units, heads, candidates\]"),
        ({"loss": np.zeros((2, 0, 3))}, "none of them 0"),
        ({"head_ms": np.ones((3, 2))}, r"head_ms must be \[2, 2, 3\] or \[2, 3\]"),
        (
            {"head_ms": np.array([[1.0, np.nan, 1], [1, 1, 1]])},
            r"head_ms must be a number >= 0, got nan at \[0, 0, 1\]",
        ),
        ({"family": [0, 1]}, r"family must be \[3\]"),
        ({"family": [0, 1, -1]}, "family must count from 0, got -1 at 2"),
        ({"family": [0, 1, 2]}, r"launch_ms must be .* at least 3\], got \[2, 2\]"),
        ({"family": [0.0, 1, 1]}, "whole numbers"),
        ({"launch_ms": np.ones(2)}, "launch_ms must be"),
        ({"launch_ms": np.full((2, 2), -1.0)}, "launch_ms must be a number >= 0, got -1.0"),
        ({"mixed_ms": np.ones(3)}, r"mixed_ms must be \[2\]"),
        ({"mixed_ms": [1.0, np.inf]}, r"mixed_ms must be a number >= 0, got inf at \[1\]"),
        ({"loss": np.full((2, 2, 3), 1.0)}, r"candidate 0 .* must be 0, got 1.0 at \[0, 0\] and 3 more"),
        ({"loss": np.full((2, 2, 3), np.inf)}, "candidate 0"),
        ({"loss": np.full((2, 2, 3), np.nan)}, "loss must be a number >= 0, got nan"),
        ({"loss": np.full((2, 2, 3), -1.0)}, "loss must be a number >= 0, got -1"),
    ],
)
def test_a_problem_that_does_not_fit_is_refused(change: dict[str, Floats], message: str) -> None:
    good = Problem(np.zeros((2, 2, 3)), np.ones((2, 3)), [0, 1, 1], np.ones((2, 2)), np.ones(2))
    with pytest.raises(ValueError, match=message):
        replace(good, **change)


def test_time_is_not_read_where_nothing_is_offered() -> None:
    loss = np.array([[[0.0, np.inf], [0.0, 1.0]]])
    problem = Problem(loss, np.array([[[2.0, np.nan], [2.0, 1.0]]]), [0, 0], [[0.0]], [0.0])
    assert fastest(problem, 9.0).choice.tolist() == [[0, 1]]
    with pytest.raises(ValueError, match="head_ms"):
        replace(problem, loss=np.zeros((1, 2, 2)))


def test_choices_that_do_not_fit_are_refused() -> None:
    problem = draw(0)
    with pytest.raises(ValueError, match=r"candidate must be in \[0, 4\), got 4"):
        uniform(problem, 4)
    for wrong in (np.zeros((2, 3), dtype=int), np.full((2, 2), 4), np.full((2, 2), -1)):
        with pytest.raises(ValueError, match="choice must be"):
            evaluate(problem, wrong)


def test_too_many_families_are_refused() -> None:
    families = 13
    with pytest.raises(ValueError, match="at most 12 families"):
        Problem(np.zeros((1, 1, families)), np.ones((1, families)), np.arange(families), np.ones((1, families)), [0.0])
