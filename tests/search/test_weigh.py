"""From scores to the solver and back to a plan: what is chosen is what runs."""

from __future__ import annotations

import math

import numpy as np
import pytest

from dit_sparse.grid import Grid
from dit_sparse.patterns import Cached, Dense, Pattern, Radial, Stripes, TopBlocks
from dit_sparse.search.planner.groups import StepGroups
from dit_sparse.search.planner.prices import CallShape, Price, Prices, measure_prices
from dit_sparse.search.planner.probe import bands_of, factored, probes, unprobed
from dit_sparse.search.planner.problem import MOST_FAMILIES, evaluate, uniform
from dit_sparse.search.planner.solve import fastest
from dit_sparse.search.planner.weigh import Place, Scored, densities, make_problem, shortlist, to_plan

GROUPS = StepGroups((0.0, 0.25, 0.5, 1.0))
CANDIDATES: tuple[Pattern, ...] = (
    Dense(), TopBlocks(0.1), TopBlocks(0.3), Cached(TopBlocks(0.1), 3), Cached(TopBlocks(0.3), 3), Radial(),
)  # fmt: skip
SHAPE = CallShape(Grid(5, 8, 8), 1, 3, 16, "float32")


def made_up(
    candidates: tuple[Pattern, ...] = CANDIDATES, transformers: tuple[str, ...] = ("transformer",), layers: int = 4
) -> tuple[Scored, Prices]:
    """Draw scores of 3 heads, and prices that rise with density."""
    rng = np.random.default_rng()
    places = tuple(Place(g, name, n) for g in range(len(GROUPS)) for name in transformers for n in range(layers))
    shape = (len(places), 3, len(candidates))
    scores = {name: rng.uniform(0.05, 0.95, shape) for name in ("recall", "error", "density")}
    scores["projected"] = 10 ** rng.uniform(-5, -1, shape)
    scores["projected"][..., 0] = 0.0
    scores["density"][..., 0] = 1.0
    calls = rng.integers(1, 20, len(places)).astype(float)
    launches = {pattern.family(): float(rng.uniform(0.05, 0.2)) for pattern in candidates}
    prices = {str(p): Price(launches[p.family()], float(rng.uniform(0.1, 0.8))) for p in candidates[1:]}
    prices["dense"] = Price(0.1, 1.0)
    return Scored(places, candidates, calls, np.ones(shape[:2]), **scores), Prices(SHAPE, "made up", prices, 0.07)


def test_a_plan_runs_what_was_chosen() -> None:
    for _ in range(20):
        scored, _ = made_up(transformers=("transformer", "transformer_2"))
        choice = np.random.default_rng().integers(0, len(CANDIDATES), scored.projected.shape[:2])
        plan = to_plan(scored, choice, GROUPS, "searched", None, {}, False)
        for place, chosen in zip(scored.places, choice, strict=True):
            start, end = GROUPS.window(place.group)
            for fraction in (start, (start + end) / 2, end - 1e-9):
                found = plan.patterns_at(fraction, place.transformer, place.layer, 3)
                assert found == tuple(CANDIDATES[c] for c in chosen)


def test_a_transformer_that_was_not_scored_stays_dense() -> None:
    scored, _ = made_up(transformers=("transformer_2",))
    plan = to_plan(scored, np.full(scored.projected.shape[:2], 2), GROUPS, "searched", None, {}, False)
    assert plan.patterns_at(0.0, "transformer", 0, 3) == (Dense(),) * 3
    assert plan.patterns_at(0.0, "transformer_2", 0, 3) == (CANDIDATES[2],) * 3


def test_rules_of_neighbouring_groups_and_of_layers_are_joined() -> None:
    scored, _ = made_up()
    choice = np.full(scored.projected.shape[:2], 2)
    plan = to_plan(scored, choice, GROUPS, "searched", None, {}, False)
    assert [(rule.steps, rule.layers, rule.heads) for rule in plan.rules] == [((0.0, 1.0), (0, 1, 2, 3), None)]


def test_the_problem_costs_what_calls_cost() -> None:
    """The solver's time is the sum of what `Prices.of` says of each call, whatever is chosen."""
    for _ in range(20):
        scored, prices = made_up()
        problem = make_problem(scored, prices, unprobed(scored))
        choice = np.random.default_rng().integers(0, len(CANDIDATES), scored.projected.shape[:2])
        weights, called = unprobed(scored), [[CANDIDATES[c] for c in chosen] for chosen in choice]
        ms = sum(calls * prices.of(patterns) for calls, patterns in zip(scored.calls, called, strict=True))
        lost = np.take_along_axis(scored.projected, choice[..., None], axis=-1)[..., 0]
        loss = float((weights[:, None] * lost).sum())
        assert evaluate(problem, choice) == (pytest.approx(ms), pytest.approx(loss))
        in_batches = make_problem(scored, prices, weights, batch=4)
        assert evaluate(in_batches, choice) == (pytest.approx(ms / 4), pytest.approx(loss))


def test_a_searched_choice_is_never_dearer_than_a_uniform_one_of_its_loss() -> None:
    for _ in range(5):
        scored, prices = made_up()
        problem = make_problem(scored, prices, unprobed(scored))
        for candidate in range(1, len(CANDIDATES)):
            ms, loss = evaluate(problem, uniform(problem, candidate))
            found = fastest(problem, loss)
            assert found.ms <= ms * (1 + 1e-9)
            assert found.loss <= loss * (1 + 1e-9)


def test_missing_heads_cost_nothing_and_stay_dense() -> None:
    scored, prices = made_up()
    scored.real[0, 2] = 0.0
    scored.projected[0, 2, 1:] = np.inf
    problem = make_problem(scored, prices, unprobed(scored))
    cheapest = fastest(problem, math.inf)
    assert cheapest.choice[0, 2] == 0
    patterns = [scored.candidates[c] for c in cheapest.choice[0, :2]]
    plan = to_plan(scored, cheapest.choice, GROUPS, "searched", None, {}, True)
    assert list(plan.patterns_at(0.0, "transformer", 0, 2)) == patterns


def test_a_shortlist_keeps_what_shares_launches_and_the_most_useful_of_the_rest() -> None:
    statics = tuple(Stripes(width=round(0.02 + 0.02 * n, 2)) for n in range(20))
    scored, prices = made_up((*CANDIDATES[:-1], *statics))
    useful = str(statics[13])
    scored.projected[..., 5 + 13] = 1e-9
    by_pattern = {**prices.by_pattern, useful: Price(0.05, 0.01)}
    short = shortlist(scored, Prices(SHAPE, "made up", by_pattern, 0.0), unprobed(scored))
    assert len({pattern.family() for pattern in short.candidates}) <= MOST_FAMILIES
    assert set(CANDIDATES[:-1]) <= set(short.candidates)
    assert useful in map(str, short.candidates)
    kept = [scored.candidates.index(pattern) for pattern in short.candidates]
    assert np.array_equal(short.projected, scored.projected[..., kept])
    make_problem(short, prices, unprobed(scored))


def test_densities_count_calls() -> None:
    scored, _ = made_up()
    dense = np.zeros(scored.projected.shape[:2], dtype=np.int64)
    assert densities(scored, dense) == (1.0, 1.0)
    some = dense.copy()
    some[1, 2] = 3
    own, run = densities(scored, some)
    assert own == pytest.approx(scored.density[1, 2, 3])
    lost = scored.calls[1] * (1 - own)
    assert run == pytest.approx(1 - lost / (scored.calls.sum() * 3))


def test_weights_that_made_the_measurements_are_found_again() -> None:
    scored, _ = made_up()
    rng = np.random.default_rng()
    asked = probes(scored, GROUPS)
    inside = np.stack([seen for _, _, seen in asked])
    assert (inside.sum(0) == 2).all()  # its steps and its band of layers
    by_group, by_layer = rng.uniform(0.1, 10, len(GROUPS)), rng.uniform(0.1, 10, 4)
    true = np.array([by_group[p.group] * by_layer[p.layer] for p in scored.places])
    errors = rng.uniform(0.1, 1.0, len(true))
    np.testing.assert_allclose(factored(errors, inside, inside @ (true * errors)), true, rtol=1e-3)


def test_many_layers_are_probed_in_bands() -> None:
    places = [Place(g, "transformer", n) for g in range(2) for n in range(30)]
    bands = bands_of(places)
    assert len(bands) == 8
    assert [n for _, layers in bands for n in layers] == list(range(30))


def test_measured_prices_are_positive_and_survive_a_round_trip() -> None:
    found = measure_prices([TopBlocks(0.3), Cached(TopBlocks(0.3), 2), Radial()], SHAPE, "cpu")
    assert set(found.by_pattern) == {"dense", "topblocks:keep=0.3", str(Cached(TopBlocks(0.3), 2)), "radial"}
    assert all(price.launch >= 0 and price.head >= 0 and price.of(3) > 0 for price in found.by_pattern.values())
    joined = found.of([TopBlocks(0.3)] * 3)
    assert joined == pytest.approx(found.by_pattern["topblocks:keep=0.3"].of(3))
    assert found.of([TopBlocks(0.3), Dense(), Dense()]) > found.mixed
