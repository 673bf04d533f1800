"""The offline search: score, price, solve, render until the gate holds; write a plan that can be shared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from dit_sparse.grid import Grid
from dit_sparse.patterns import Cached, Pattern
from dit_sparse.pipelines.models import attention_module, head_dim_of, heads_of
from dit_sparse.pipelines.targets import Target, find_targets
from dit_sparse.pipelines.timing import keeps_busy
from dit_sparse.plan import Plan
from dit_sparse.search.metrics import Metrics
from dit_sparse.search.planner.candidates import candidates
from dit_sparse.search.planner.capture import SHAPE, Stop, Told, bytes_beside_model, capture
from dit_sparse.search.planner.clock import Clock
from dit_sparse.search.planner.identity import binding, device_of, grid_of, settings_of
from dit_sparse.search.planner.price_table import MEASURED, PriceTable, read_table
from dit_sparse.search.planner.prices import CallShape, Price, Prices, measure_prices, place_of
from dit_sparse.search.planner.probe import probes, sensitivities, unprobed
from dit_sparse.search.planner.problem import Floats, Problem
from dit_sparse.search.planner.renders import OutOfTimeError, Render, Renders
from dit_sparse.search.planner.request import Search
from dit_sparse.search.planner.solve import Solution, fastest
from dit_sparse.search.planner.store import Store
from dit_sparse.search.planner.uniform import costs, rivals
from dit_sparse.search.planner.verify import Trial, best, first_budget, tighten
from dit_sparse.search.planner.weigh import Scored, gather, make_problem, shortlist, to_plan

WORK = "work"  # folder of the units, clips and facts inside the results folder
PROBE_SHARE = 0.35  # of the time left, which probes may take
PROBE_JOBS = 2
WARM_UP = 0.1  # of a clip, which each rendered plan pays
PRICES, MIXED = "prices", "two groups in one call"
BRANCHES = 2  # of guidance: conditional and not


@dataclass(frozen=True, eq=False)
class Outcome:
    """Hold all that a search found out; what it did not come to is None or empty."""

    search: Search
    grid: Grid
    verdict: str  # "met", "not met" or "unverified"
    why: str
    plan: Plan
    offered: Scored | None = None  # all candidates
    scored: Scored | None = None  # those that the solver weighed
    prices: Prices | None = None
    weights: Floats | None = None
    probed: bool = False
    problem: Problem | None = None
    trials: tuple[Trial, ...] = ()
    chosen: Trial | None = None
    dense: Render | None = None
    renders: Renders | None = None
    yardsticks: Mapping[str, Metrics] = field(default_factory=dict)
    uniform: Mapping[int, Render] = field(default_factory=dict)  # of offered candidates, each used everywhere
    seconds: dict[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def search_plan(pipe: Any, search: Search, out: Path, told: Told) -> Outcome:
    """Search a plan for a pipeline, which is left as it was; work is kept in out/work, from which it resumes.

    Raises:
        ValueError: a model without known layers or grid, candidates that do not fit it, or out/work of another search.
        OSError: the disk is full or gone; what was finished before stays.
    """
    clock = Clock(search.minutes)
    targets = find_targets(pipe)
    grid = grid_of(pipe, search)
    search.gate.check(search.job.frames, search.job.height or 0, search.job.width or 0)
    device = device_of(pipe)
    told("fitting candidates to the grid", 0, 1)
    found = candidates(grid, search.specs, search.densities, device=device)
    table = None if search.prices == MEASURED else read_table(search.prices)
    if table is not None:
        table.check(found, head_dim_of(attention_module(targets[0].transformer, targets[0].layers[0])))
    store = Store(out / WORK, settings_of(pipe, targets, search, found))
    layers = [(target.name, index) for target in targets for index in range(len(target.layers))]
    kept = sum(isinstance(pattern, Cached) for pattern in found) * len(layers) * BRANCHES
    told(f"{len(found)} candidates; scoring takes about {_gib(targets[0], grid, kept):.1f} GiB beside the model", 0, 1)
    finished = clock.timed("capture_s", lambda: capture(
        pipe, search.calibration_jobs, found, search.groups, store, clock.up, told, search.backend, search.rows
    ))  # fmt: skip
    steps = search.job.steps or 0

    def dense_plan(why: str) -> Outcome:
        return Outcome(search, grid, "unverified", f"time was up before {why}: the plan is dense", Plan.dense(),
                       seconds=clock.seconds)  # fmt: skip

    try:
        scored = gather(store, len(search.prompts), layers, found, search.groups, steps)
    except ValueError:
        if finished:
            raise
        return dense_plan("any layer was scored")
    try:
        prices = clock.timed("prices_s", lambda: (
            _prices(pipe, store, found, search, device, clock.up, told) if table is None
            else _predicted(table, store, found, search, device)
        ))  # fmt: skip
    except OutOfTimeError:
        return dense_plan("the candidates were timed")
    return _choose(pipe, search, clock, store, targets, grid, scored, prices, told)


def _choose(
    pipe: Any, search: Search, clock: Clock, store: Store, targets: Sequence[Target], grid: Grid, scored: Scored,
    prices: Prices, told: Told,
) -> Outcome:  # fmt: skip
    """Solve and render, in turn, until the gate holds or time is up."""
    renders = Renders(
        pipe, search.held_out_jobs, search.batch, store, search.backend, clock.up, told, search.gate.metrics
    )
    offered, scored = scored, shortlist(scored, prices, unprobed(scored))
    weights, probed, dense = unprobed(scored), False, None
    yardsticks: Mapping[str, Metrics] = {}
    uniform_renders: dict[int, Render] = {}
    notes: list[str] = []
    if len(targets) > 1:
        notes.append(
            "which transformer runs is known at one step of each group; where they change inside a group, the steps of "
            "the other one stay dense there and are not priced: give step edges at the change"
        )

    if prices.predicted:
        notes.append(
            f"predicted times are those of {prices.where} in {prices.shape.dtype}, not of this machine, where "
            "nothing was timed for the choice; rendered seconds and attention seconds are of this one"
        )

    def plan_of(solution: Solution) -> Plan:
        provenance = {"made_by": "dit-sparse search", "grid": _axes(grid), "steps": search.job.steps}
        one = len(targets) == 1
        return to_plan(scored, solution.choice, search.groups, "searched", binding(targets), provenance, one)

    def outcome(verdict: str, why: str, trials: Sequence[Trial], chosen: Trial) -> Outcome:
        return Outcome(
            search, grid, verdict, why, chosen.plan, offered, scored, prices, weights, probed, problem, tuple(trials),
            chosen, dense, renders, yardsticks, uniform_renders, clock.seconds, tuple(notes),
        )  # fmt: skip

    problem = make_problem(scored, prices, weights, search.batch)
    try:
        dense = clock.timed("verify_s", renders.dense)
        yardsticks = clock.timed("verify_s", renders.yardsticks)
        jobs = search.held_out_jobs[:PROBE_JOBS]
        clips = len(probes(scored, search.groups)) * (len(jobs) + WARM_UP)
        expected = clips * float(np.mean(dense.seconds))
        if search.sensitivity or (search.sensitivity is None and expected < PROBE_SHARE * clock.left):
            weights = clock.timed("sensitivity_s", lambda: sensitivities(scored, search.groups, renders, jobs))
            probed = True
            problem = make_problem(scored, prices, weights, search.batch)
        else:
            notes.append("sensitivity was not measured: all layers and steps count alike in the error budget")
    except OutOfTimeError:
        budget = first_budget(problem, search.gate, probed)
        solution = fastest(problem, budget)
        trial = Trial(budget, solution, plan_of(solution))
        return outcome("unverified", "time was up before a plan was rendered", [trial], trial)
    budget = first_budget(problem, search.gate, probed)
    trials, out_of_time = clock.timed("verify_s", lambda: tighten(
        problem, search.gate, budget, plan_of, renders.of, search.most_trials
    ))  # fmt: skip
    chosen = best(trials)
    try:
        if search.against and not out_of_time:
            ms, loss = costs(offered, prices, weights, search.batch)
            for number in rivals(offered, ms, loss, chosen.solution.ms, chosen.solution.loss):
                pattern = offered.candidates[number]
                uniform_renders[number] = renders.of(Plan.of(pattern), f"rendering {pattern} everywhere")
    except OutOfTimeError:
        notes.append("time was up before all uniform patterns were rendered")
    if chosen.passes and not chosen.plan.rules:
        machine = prices.where if prices.predicted else "this machine"
        why = f"no candidate is faster than dense on {machine} at this size: the plan is dense"
        return outcome("met", why, trials, chosen)
    if chosen.passes:
        return outcome("met", f"{search.gate} holds on {len(search.held_out_jobs)} clips", trials, chosen)
    if out_of_time:
        return outcome("unverified", "time was up before a plan passed the gate", trials, chosen)
    if chosen.margin_db is None:
        return outcome("not met", "every error budget that was tried left all calls dense", trials, chosen)
    why = f"{search.gate} is missed by {-chosen.margin_db:.1f} dB by the best of {len(trials)} plans"
    return outcome("not met", why, trials, chosen)


def _gib(target: Target, grid: Grid, kept_choices: int) -> float:
    module = attention_module(target.transformer, target.layers[0])
    batch = 2 if target.model.cfg == "doubled batch" else 1
    itemsize = min(parameter.element_size() for parameter in target.transformer.parameters())
    heads, head_dim = heads_of(module), head_dim_of(module)
    return bytes_beside_model(grid, batch, heads, head_dim, max(2, itemsize), kept_choices) / 2**30


def _prices(
    pipe: Any, store: Store, patterns: Sequence[Pattern], search: Search, device: str, stop: Stop, told: Told
) -> Prices:
    """Time what is not on disk for this shape and device; each price is kept as soon as it is known."""
    shape = _call_shape(store, search)
    head: dict[str, Any] = {"shape": asdict(shape), "where": place_of(device)}
    on_disk = store.read(PRICES)
    facts: dict[str, Any] = {}
    if on_disk and "busy" in on_disk["head"] and on_disk["head"] == {**head, "busy": on_disk["head"]["busy"]}:
        head, facts = on_disk["head"], dict(on_disk["prices"])

    def keep(pattern: str, price: Price) -> None:
        facts[pattern] = asdict(price)
        store.write(PRICES, {"head": head, "prices": facts})
        told("timing the candidates", len(facts), len(patterns))
        if stop():
            raise OutOfTimeError

    if stop() and len(facts) < len(patterns):
        raise OutOfTimeError
    if "busy" not in head:
        head["busy"] = keeps_busy(pipe, search.held_out_jobs[: search.batch])
    known = {pattern: Price(**price) for pattern, price in facts.items() if pattern != MIXED}
    mixed = facts.get(MIXED, {}).get("launch")
    found = measure_prices(patterns, shape, device, search.backend, known, keep, mixed, bool(head["busy"]))
    if mixed is None:
        facts[MIXED] = asdict(Price(found.mixed, 0.0))
        store.write(PRICES, {"head": head, "prices": facts})
    return found


def _predicted(table: PriceTable, store: Store, patterns: Sequence[Pattern], search: Search, device: str) -> Prices:
    """Predict prices of this shape on the machine of a table, where the model runs in the dtype of the table."""
    return table.prices(patterns, replace(_call_shape(store, search), dtype=table.dtype), device)


def _call_shape(store: Store, search: Search) -> CallShape:
    """Return the shape of the calls of a batch of clips."""
    seen = store.read(SHAPE)
    assert seen is not None, "a scored call has a shape"
    shape = CallShape.from_dict(seen)
    return replace(shape, batch=shape.batch * search.batch)


def _axes(grid: Grid) -> str:
    return "x".join(map(str, grid.shape))
