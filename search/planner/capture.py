"""Run the pipeline densely on calibration prompts and score every candidate on the way, unit by unit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor, nn

from dit_sparse.attention import Layer
from dit_sparse.execution import Tensors
from dit_sparse.grid import Grid
from dit_sparse.kernels.indices import BLOCK
from dit_sparse.moment import Call, Moment
from dit_sparse.patterns import Cached, Pattern, TopBlocks
from dit_sparse.pipelines.enable import sparse
from dit_sparse.pipelines.generate import Job, run_steps
from dit_sparse.pipelines.models import attention_module
from dit_sparse.pipelines.targets import find_schedules, find_targets
from dit_sparse.search.planner.groups import StepGroups
from dit_sparse.search.planner.prices import CallShape
from dit_sparse.search.planner.scoring import ROWS, Scores, Scoring, Visit
from dit_sparse.search.planner.store import Store, Unit

SHAPE = "shape"  # fact: what the first call that was scored looked like
Stop = Callable[[], bool]
Told = Callable[[str, int, int], None]


@dataclass
class Watch:
    """Decide what is looked at in each call of one prompt's run, and collect it."""

    candidates: Sequence[Pattern]
    groups: StepGroups
    prompt: int
    missing: set[Unit]
    heard: dict[Unit, list[Scores]] = field(default_factory=dict)
    shape: CallShape | None = None  # of the first call

    def visits(self, layer: Layer, moment: Moment, given: Tensors, call: Call) -> list[Visit]:
        """Ask for all candidates at the step that stands for a group; before it, for those that keep a choice."""
        if moment.step is None or not moment.total_steps:
            raise ValueError(
                f"{layer.name}: nobody tells the denoising step, so no step group can be told apart; search on the "
                "pipeline, not on the transformer alone"
            )
        for step, group in self.groups.sampled(moment.total_steps).items():
            if moment.step > step or self._unit(group, layer) not in self.missing:
                continue
            first = self.groups.steps_of(group, moment.total_steps)[0]
            begin = {pattern: max(first, step - _age(pattern)) for pattern in self.candidates}
            if moment.step == step:
                self.shape = self.shape or CallShape.of(given, call)
                return [Visit(pattern) for pattern in self.candidates]
            if early := [Visit(p, measured=False) for p in self.candidates if begin[p] == moment.step]:
                return early
        return []

    def hear(self, layer: Layer, moment: Moment, scores: Scores) -> None:
        assert moment.step is not None
        assert moment.total_steps is not None
        group = self.groups.sampled(moment.total_steps)[moment.step]
        self.heard.setdefault(self._unit(group, layer), []).append(scores)

    def end_step(self, store: Store) -> None:
        """Keep what this step finished."""
        if self.shape is not None and store.read(SHAPE) is None:
            store.write(SHAPE, asdict(self.shape))
        for unit, scores in self.heard.items():
            store.save(unit, Scores.mean(scores))
            self.missing.discard(unit)
        self.heard.clear()

    def _unit(self, group: int, layer: Layer) -> Unit:
        return Unit(self.prompt, group, layer.schedule.transformer, layer.index)


def _age(pattern: Pattern) -> int:
    """Return how many steps old the choice is that a candidate is judged by: the oldest that it uses."""
    return pattern.refresh_steps - 1 if isinstance(pattern, Cached) else 0


@contextmanager
def watched(pipe: Any, watch: Watch, backend: str, rows: int) -> Iterator[None]:
    """Score candidates in every self-attention call of a pipeline, whose results stay those of the dense one."""
    with sparse(pipe, TopBlocks(), min_tokens=0, backend=backend):
        for transformer, schedule in find_schedules(pipe):
            schedule.execution = Scoring(backend, watch.visits, watch.hear, _projections(transformer), rows)
        yield


def capture(
    pipe: Any,
    jobs: Sequence[Job],
    candidates: Sequence[Pattern],
    groups: StepGroups,
    store: Store,
    stop: Stop,
    told: Told,
    backend: str = "auto",
    rows: int = ROWS,
) -> bool:
    """Score candidates[1:] on every prompt (the first is dense) and keep each unit as soon as its step has ended.

    Units that the store has are not measured again, and no step is run that serves none of the missing ones. Returns
    False where `stop()` said so before the end.
    """
    layers = [(target.name, index) for target in find_targets(pipe) for index in range(len(target.layers))]
    shape_lost = store.read(SHAPE) is None
    for number, job in enumerate(jobs):
        wanted = [
            Unit(number, group, name, index)
            for group in groups.sampled(job.steps or 0).values()
            for name, index in layers
        ]
        missing = {unit for unit in wanted if store.load(unit) is None}
        if shape_lost and number == 0:
            missing.add(wanted[0])  # one more look tells it
        watch = Watch(candidates[1:], groups, number, missing)
        if missing and not _run(pipe, job, watch, store, stop, told, backend, rows):
            return False
    return True


def _run(pipe: Any, job: Job, watch: Watch, store: Store, stop: Stop, told: Told, backend: str, rows: int) -> bool:
    """Score one prompt until nothing is missing; return False where `stop()` came first."""
    what = f"scoring prompt {watch.prompt + 1}"
    told(what, 0, job.steps or 1)

    def enough() -> bool:
        watch.end_step(store)
        return stop() or not watch.missing

    with watched(pipe, watch, backend, rows):
        run_steps(pipe, job, enough, on_step=lambda done, total: told(what, done, total))
    if stop() and watch.missing:
        return False
    for unit in watch.missing:  # the whole run has ended without such a call: it will not come in another one
        store.save(unit, Scores.none())
    return True


def bytes_beside_model(grid: Grid, batch: int, heads: int, head_dim: int, itemsize: int, kept_choices: int) -> int:
    """Estimate the memory that scoring takes beyond a dense run, in bytes.

    q, k, v in kernel order and the dense output; four fp32 tensors of block pairs while a choice is made; and the
    choices that candidates remember over some steps, `kept_choices` of them (candidates x layers x branches), a bit
    for each pair of blocks.
    """
    pairs = batch * heads * (-(-grid.tokens // BLOCK)) ** 2
    return 4 * batch * grid.tokens * heads * head_dim * itemsize + 16 * pairs + kept_choices * pairs // 8


def _projections(transformer: nn.Module) -> Callable[[Layer], Tensor | None]:
    """Return what finds the weights [C, H*D] of the projection behind a layer's attention, None where there is none."""

    def found(layer: Layer) -> Tensor | None:
        module = attention_module(transformer, layer.name)
        out = getattr(module, "to_out", None)
        if isinstance(out, (nn.ModuleList, nn.Sequential)):
            out = out[0]
        weight = getattr(out, "weight", None)
        inner = getattr(module, "inner_dim", None)
        if not isinstance(weight, Tensor) or weight.dim() != 2 or not weight.is_floating_point():
            return None
        if weight.is_meta or weight.element_size() < 2:  # offloaded, or quantised with a scale of its own
            return None
        return weight if inner in (None, weight.shape[1]) else None

    return found
