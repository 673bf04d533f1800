"""The offline search: score, price, solve, render until the gate holds; write a plan that can be shared."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dit_sparse.grid import Grid
from dit_sparse.patterns import Cached, Pattern
from dit_sparse.pipelines.generate import known_transformers
from dit_sparse.pipelines.geometry import expected_grid
from dit_sparse.pipelines.models import attention_module, head_dim_of, heads_of
from dit_sparse.pipelines.targets import Target, find_targets
from dit_sparse.plan import ModelBinding, Plan
from dit_sparse.search.metrics import Metrics
from dit_sparse.search.planner.candidates import candidates
from dit_sparse.search.planner.capture import Told, bytes_beside_model, capture
from dit_sparse.search.planner.prices import CallShape, Prices, measure_prices
from dit_sparse.search.planner.probe import probes, sensitivities, unprobed
from dit_sparse.search.planner.problem import Floats, Problem, evaluate, uniform
from dit_sparse.search.planner.renders import OutOfTimeError, Render, Renders
from dit_sparse.search.planner.request import Search
from dit_sparse.search.planner.solve import Solution, fastest
from dit_sparse.search.planner.store import Store
from dit_sparse.search.planner.verify import Trial, best, first_budget, tighten
from dit_sparse.search.planner.weigh import Scored, gather, make_problem, shortlist, to_plan

WORK = "work"  # folder of the units, clips and facts inside the results folder
PROBE_SHARE = 0.35  # of the time left, which probes may take
PROBE_JOBS = 2
AGAINST = 3  # uniform patterns of a kind that are rendered beside a plan
TINY = 1e-30
BRANCHES = 2  # of guidance: conditional and not


@dataclass
class Clock:
    """Tell when the time is up, and what each part took."""

    minutes: float | None
    started: float = field(default_factory=time.monotonic)
    seconds: dict[str, float] = field(default_factory=dict)

    def up(self) -> bool:
        return self.left < 0

    @property
    def left(self) -> float:
        return math.inf if self.minutes is None else self.started + 60 * self.minutes - time.monotonic()

    def timed(self, part: str, run: Callable[[], Any]) -> Any:
        begin = time.monotonic()
        try:
            return run()
        finally:
            self.seconds[part] = self.seconds.get(part, 0.0) + time.monotonic() - begin


@dataclass(frozen=True, eq=False)
class Outcome:
    """Hold all that a search found out; what it did not come to is None or empty."""

    search: Search
    grid: Grid
    verdict: str  # "met", "not met" or "unverified"
    why: str
    plan: Plan
    scored: Scored | None = None
    prices: Prices | None = None
    weights: Floats | None = None
    probed: bool = False
    problem: Problem | None = None
    trials: tuple[Trial, ...] = ()
    chosen: Trial | None = None
    dense: Render | None = None
    renders: Renders | None = None
    yardsticks: Mapping[str, Metrics] = field(default_factory=dict)
    uniform: Mapping[int, Render] = field(default_factory=dict)  # candidates that were rendered everywhere
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
    device = str(pipe.device)
    found = candidates(grid, search.specs, search.densities, device=device)
    store = Store(out / WORK, _settings(targets, search, found))
    layers = [(target.name, index) for target in targets for index in range(len(target.layers))]
    shape = call_shape(pipe, targets[0], grid, search.batch)
    kept = sum(isinstance(pattern, Cached) for pattern in found) * len(layers) * BRANCHES
    told(f"{len(found)} candidates; scoring takes about {_gib(shape, kept):.1f} GiB beside the model", 0, 1)
    finished = clock.timed("capture_s", lambda: capture(
        pipe, search.calibration_jobs, found, search.groups, store, clock.up, told, search.backend, search.rows
    ))  # fmt: skip
    steps = search.job.steps or 0
    try:
        scored = gather(store, len(search.prompts), layers, found, search.groups, steps)
    except ValueError:
        if finished:
            raise
        why = "time was up before any layer was scored: the plan is dense"
        return Outcome(search, grid, "unverified", why, Plan.dense(), seconds=clock.seconds)
    prices = clock.timed("prices_s", lambda: _prices(store, found, shape, device, search.backend, told))
    return _choose(pipe, search, clock, store, targets, grid, scored, prices, told)


def _choose(
    pipe: Any, search: Search, clock: Clock, store: Store, targets: Sequence[Target], grid: Grid, scored: Scored,
    prices: Prices, told: Told,
) -> Outcome:  # fmt: skip
    """Solve and render, in turn, until the gate holds or time is up."""
    renders = Renders(pipe, search.held_out_jobs, search.batch, store, search.backend, clock.up, told)
    scored = shortlist(scored, prices, unprobed(scored))
    weights, probed, dense = unprobed(scored), False, None
    yardsticks: Mapping[str, Metrics] = {}
    uniform_renders: dict[int, Render] = {}
    notes: list[str] = []

    def plan_of(solution: Solution) -> Plan:
        provenance = {"made_by": "dit-sparse search", "grid": _axes(grid), "steps": search.job.steps}
        return to_plan(scored, solution.choice, search.groups, "searched", binding(targets), provenance)

    def outcome(verdict: str, why: str, trials: Sequence[Trial], chosen: Trial) -> Outcome:
        return Outcome(
            search, grid, verdict, why, chosen.plan, scored, prices, weights, probed, problem, tuple(trials), chosen,
            dense, renders, yardsticks, uniform_renders, clock.seconds, tuple(notes),
        )  # fmt: skip

    problem = make_problem(scored, prices, weights)
    try:
        dense = clock.timed("verify_s", renders.dense)
        yardsticks = clock.timed("verify_s", renders.yardsticks)
        jobs = search.held_out_jobs[:PROBE_JOBS]
        expected = len(probes(scored, search.groups)) * len(jobs) * float(np.mean(dense.seconds))
        if search.sensitivity or (search.sensitivity is None and expected < PROBE_SHARE * clock.left):
            weights, _ = clock.timed("sensitivity_s", lambda: sensitivities(scored, search.groups, renders, jobs))
            probed = True
            problem = make_problem(scored, prices, weights)
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
        for number in nearest_uniform(scored, problem, chosen) if search.against and not out_of_time else ():
            pattern = scored.candidates[number]
            uniform_renders[number] = renders.of(Plan.of(pattern), f"rendering {pattern} everywhere")
    except OutOfTimeError:
        notes.append("time was up before all uniform patterns were rendered")
    if chosen.passes and not chosen.plan.rules:
        why = "no candidate is faster than dense on this machine at this size: the plan is dense"
        return outcome("met", why, trials, chosen)
    if chosen.passes:
        return outcome("met", f"{search.gate} holds on {len(search.held_out_jobs)} clips", trials, chosen)
    if out_of_time:
        return outcome("unverified", "time was up before a plan passed the gate", trials, chosen)
    if chosen.margin_db is None:
        return outcome("not met", "every error budget that was tried left all calls dense", trials, chosen)
    why = f"{search.gate} is missed by {-chosen.margin_db:.1f} dB by the best of {len(trials)} plans"
    return outcome("not met", why, trials, chosen)


def nearest_uniform(scored: Scored, problem: Problem, chosen: Trial) -> list[int]:
    """Name the candidates to render everywhere: of each kind the few whose predicted loss is nearest to the plan's."""
    kinds: dict[str, list[tuple[float, int]]] = {}
    for number, pattern in enumerate(scored.candidates):
        if number:
            _, loss = evaluate(problem, uniform(problem, number))
            distance = abs(math.log(max(loss, TINY)) - math.log(max(chosen.solution.loss, TINY)))
            kinds.setdefault(pattern.name, []).append((distance, number))
    return [number for of_kind in kinds.values() for _, number in sorted(of_kind)[:AGAINST]]


def grid_of(pipe: Any, search: Search) -> Grid:
    """Return the token grid of the clips that are searched for.

    Raises: ValueError where the job's size or the model's configs do not tell it.
    """
    transformer = next(iter(known_transformers(pipe).values()))
    job = search.job
    if job.height is None or job.width is None or not job.steps:
        raise ValueError("a search needs the clip's height, width and steps: give them")
    grid = expected_grid(transformer, pipe.vae.config, job.frames or 1, job.height, job.width)
    if grid is None:
        raise ValueError(f"no grid is known for {type(transformer).__name__} at this size")
    return grid


def call_shape(pipe: Any, target: Target, grid: Grid, clips: int) -> CallShape:
    """Describe the attention calls of a transformer: those with guidance in one batch have two samples."""
    module = attention_module(target.transformer, target.layers[0])
    batch = clips * (2 if target.model.cfg == "doubled batch" else 1)
    dtype = str(next(target.transformer.parameters()).dtype).removeprefix("torch.")
    if str(pipe.device).startswith("cuda") and dtype == "float32":
        dtype = "bfloat16"
    return CallShape(grid, batch, heads_of(module), head_dim_of(module), dtype)


def _gib(shape: CallShape, kept_choices: int) -> float:
    itemsize = 4 if shape.dtype == "float32" else 2
    return bytes_beside_model(shape.grid, shape.batch, shape.heads, shape.head_dim, itemsize, kept_choices) / 2**30


def binding(targets: Sequence[Target]) -> ModelBinding | None:
    """Return what a plan for all of these transformers is bound to, None where they differ."""
    found = {target.binding() for target in targets}
    return found.pop() if len(found) == 1 else None


def _prices(
    store: Store, patterns: Sequence[Pattern], shape: CallShape, device: str, backend: str, told: Told
) -> Prices:
    known = store.read("prices")
    if known is not None:
        return Prices.from_dict(known)
    found = measure_prices(patterns, shape, device, backend, told)
    store.write("prices", found.to_dict())
    return found


def _settings(targets: Sequence[Target], search: Search, found: Sequence[Pattern]) -> dict[str, Any]:
    """Return all that decides what units and clips hold."""
    return {
        "transformers": [[target.name, str(target.binding())] for target in targets],
        "job": asdict(search.job) | {"prompt": None, "seed": None},
        "prompts": list(search.prompts),
        "step_edges": list(search.groups.edges),
        "candidates": [str(pattern) for pattern in found],
        "backend": search.backend,
        "rows": search.rows,
        "batch": search.batch,
    }


def _axes(grid: Grid) -> str:
    return "x".join(map(str, grid.shape))
