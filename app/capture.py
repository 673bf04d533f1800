"""What the pattern of one head chooses in a real run: recorded on the way, which the run does not notice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from dit_sparse.app.choice import Choice, Served, check_place, one_head
from dit_sparse.attention import Layer
from dit_sparse.execution import Execution, Prepared, Tensors
from dit_sparse.moment import Call, Moment
from dit_sparse.options import Options
from dit_sparse.patterns import Pattern
from dit_sparse.pipelines.enable import sparse
from dit_sparse.pipelines.generate import Job, OnStep, run_steps
from dit_sparse.pipelines.targets import find_schedules
from dit_sparse.plan import Plan
from dit_sparse.schedule import Schedule
from dit_sparse.selection import HeadOrder

CONDITIONAL = "cond"  # the forward of the prompt, where branches have names


@dataclass
class Wanted:
    """Name one head of one layer at one step, and hold what it chose there, by the branch of the forward."""

    step: int
    layer: int
    head: int
    found: dict[str | None, Choice] = field(default_factory=dict)

    def choice(self) -> Choice | None:
        """Return the choice made for the prompt, or where branches have no names that of the first forward."""
        return self.found.get(CONDITIONAL) or next(iter(self.found.values()), None)


class Recording(Execution):
    """Run calls as they are, and keep what the wanted head's pattern chose."""

    def __init__(self, backend: str, monitor: bool, wanted: Wanted) -> None:
        super().__init__(backend, monitor)
        self.wanted = wanted

    def prepare(
        self, layer: Layer, pattern: Pattern, members: tuple[int, ...], given: Tensors, call: Call, moment: Moment
    ) -> Prepared:
        ready = super().prepare(layer, pattern, members, given, call, moment)
        wanted = self.wanted
        here = (moment.step, layer.index) == (wanted.step, wanted.layer) and wanted.head in members
        if here and moment.branch not in wanted.found:
            wanted.found[moment.branch] = _choice(pattern, members, wanted.head, ready, moment.branch)
        return ready


@contextmanager
def recorded(
    pipe: Any, plan: Plan, wanted: Wanted, options: Options | None = None, transformer: str | None = None
) -> Iterator[list[Schedule]]:
    """Make a pipeline sparse within the block and record the wanted head; the pipeline is then as it was before.

    transformer: the component meant, or None for whichever runs at that step. Gives the Schedules that record.

    Raises:
        ValueError: the plan does not fit the model, or the model has no such transformer, layer or head.
    """
    options = options or Options()
    with sparse(
        pipe,
        plan,
        dense_steps=options.dense_steps,
        dense_layers=options.dense_layers,
        min_tokens=options.min_tokens,
        backend=options.backend,
        strict=options.strict,
    ):
        found = [schedule for _, schedule in find_schedules(pipe)]
        chosen = [schedule for schedule in found if transformer in (None, schedule.transformer)]
        if not chosen:
            raise ValueError(
                f"transformer must be one of {', '.join(schedule.transformer for schedule in found)}, got {transformer}"
            )
        for schedule in chosen:
            heads = wanted.head + 1 if schedule.heads is None else schedule.heads
            check_place(wanted.layer, wanted.head, len(schedule.layer_names), heads)
            schedule.execution = Recording(options.backend, options.monitor, wanted)
        yield chosen


def captured_choice(
    pipe: Any,
    job: Job,
    plan: Plan,
    step: int,
    layer: int,
    head: int,
    *,
    options: Options | None = None,
    transformer: str | None = None,
    stop: Callable[[], bool] = lambda: False,
    on_step: OnStep | None = None,
) -> Choice | str | None:
    """Run a job with a plan up to a step, counted from 0, and return what the pattern of one head chose there.

    Returns the reason instead where the head ran dense in that step, and None where `stop()` said so between two
    steps. Of a batch that holds both branches the last entry, the prompt's, is told.

    Raises:
        ValueError: as `recorded`; or the run has no such step.
    """
    if step < 0 or (job.steps is not None and step >= job.steps):
        raise ValueError(f"step {step} does not exist: the run has {job.steps} steps, counted from 0")
    wanted, ended, stopped = Wanted(step, layer, head), 0, False
    before = after = _Calls(Counter(), 0)
    with recorded(pipe, plan, wanted, options, transformer) as schedules:

        def enough() -> bool:
            nonlocal ended, stopped, before, after
            ended += 1
            if ended == step:
                before = _calls_of(schedules, layer)
            if ended > step:
                after = _calls_of(schedules, layer)
                return True
            stopped = stop()
            return stopped

        if stop():
            return None
        run_steps(pipe, job, enough, on_step=on_step)
    if stopped:
        return None
    if ended <= step:
        raise ValueError(f"step {step} does not exist: the run has {ended} steps, counted from 0")
    if after.sparse > before.sparse:
        return wanted.choice() or "plan: dense"
    return "; ".join(after.dense_reasons - before.dense_reasons) or "no forward called this layer in this step"


@dataclass(frozen=True)
class _Calls:
    """Count the calls of a layer up to the end of a step."""

    dense_reasons: Counter[str]
    sparse: int


def _calls_of(schedules: list[Schedule], layer: int) -> _Calls:
    records = [schedule.summary().layers[layer] for schedule in schedules]
    return _Calls(
        sum((record.dense_reasons for record in records), Counter()), sum(record.sparse_calls for record in records)
    )


def _choice(pattern: Pattern, members: tuple[int, ...], head: int, ready: Prepared, branch: str | None) -> Choice:
    """Copy what one head chose to the CPU: of a batch, the last sample's."""
    place, last, selection = members.index(head), ready.q.shape[0] - 1, ready.selection
    order = selection.head_order
    if order is not None:
        kv_place = place // (ready.q.shape[2] // ready.k.shape[2])
        order = HeadOrder(order.q[last, place].cpu()[None, None], order.k[last, kv_place].cpu()[None, None])
    grid = ready.state.layout.grid
    return Choice(
        str(pattern),
        pattern.token_order().layout(grid),
        one_head(selection.indices, last * len(members) + place),
        selection.compensate,
        Served(pattern, place, len(members)).definition(grid),
        order,
        branch,
    )
