"""The runs of a comparison: dense, each plan, and what is measured in passes of their own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dit_sparse.patterns import Dense
from dit_sparse.pipelines.enable import sparse, summary
from dit_sparse.pipelines.generate import Clip, Job, OnLatents, generate, run_steps
from dit_sparse.pipelines.preview import previews
from dit_sparse.pipelines.timing import AttentionTime, time_attention
from dit_sparse.plan import Plan
from dit_sparse.record import Summary
from dit_sparse.search.metrics import Metrics, measure
from dit_sparse.search.request import Request

Progress = Callable[[str, int, int], None]  # (what runs, steps done, steps in all)
Preview = Callable[[str, NDArray[np.uint8]], None]  # (which run, RGB [H, W, 3])


@dataclass(frozen=True, eq=False)
class Run:
    """Hold one generated clip and what was measured on the way."""

    clip: Clip
    attention_seconds: float | None
    attention_steps: int
    summary: Summary
    measured: Summary | None = None  # of a run of its own under monitor=True


@dataclass(frozen=True, eq=False)
class Stage:
    """Hold what all runs of one comparison share."""

    pipe: Any
    request: Request
    job: Job
    progress: Progress
    preview: Preview | None = None

    def clip(self, name: str) -> Clip:
        """Generate once, with previews if they are wanted; their seconds are not the clip's."""
        return generate(self.pipe, self.job, on_step=self.watch(name), on_latents=self._previews(name))

    def watch(self, what: str) -> Callable[[int, int], None]:
        """Tell that something begins; return what tells each of its steps."""
        self.progress(what, 0, self.job.steps or 1)
        return lambda done, total: self.progress(what, done, total)

    def _previews(self, name: str) -> OnLatents | None:
        show = self.preview
        if show is None or self.job.steps is None:
            return None
        return previews(self.pipe, self.job.steps, lambda frame: show(name, frame))


def run_dense(stage: Stage) -> tuple[Run, AttentionTime]:
    """Time the stock pipeline; its attention through the same hook as the plans', with nothing made sparse."""
    pipe, job = stage.pipe, stage.job
    run_steps(pipe, job, lambda: True, on_step=stage.watch("dense: warm-up"))
    clip = stage.clip("dense")
    with sparse(pipe, Plan.dense()):
        most = stage.request.most_attention_steps
        taken = time_attention(pipe, job, most, on_step=stage.watch("dense: timing attention"))
        record = summary(pipe)
    seconds = taken.of_run(0, round(taken.calls / taken.steps * (job.steps or taken.steps)))
    return Run(clip, seconds, taken.steps, record), taken


def run_plan(stage: Stage, name: str, plan: Plan, dense_time: AttentionTime) -> Run:
    """Time one plan: a warm-up where kernels compile, the whole generation, then attention in a pass of its own.

    The attention pass comes last, so that it finds every mask built. It ends after some steps, unless the plan changes
    over them and nobody said how many.
    """
    pipe, request, job = stage.pipe, stage.request, stage.job
    with sparse(pipe, plan, **request.enable_options):
        if request.device != "cpu":
            time_attention(pipe, job, 1, on_step=stage.watch(f"{name}: warm-up"))
        clip = stage.clip(name)
        record = summary(pipe)
        watch = stage.watch(f"{name}: timing attention")
        usual = None if changes_over_steps(plan) else request.most_attention_steps
        taken = time_attention(pipe, job, request.attention_steps or usual, on_step=watch)
    if taken.dense_call_seconds is None:  # dense calls that come after the timed steps
        taken = replace(taken, dense_call_seconds=dense_time.dense_call_seconds)
    measured = _run_monitored(stage, name, plan) if request.options.monitor else None
    return Run(clip, taken.of_run(record.sparse_calls, record.dense_calls), taken.steps, record, measured)


def changes_over_steps(plan: Plan) -> bool:
    """Say whether one sparse step does not tell what another costs: sparse rules differ in their windows.

    Windows in which whole layers are dense do not count: their calls are counted apart.
    """
    some = [rule for rule in plan.rules if rule.heads is not None or not isinstance(rule.pattern, Dense)]
    return len({rule.steps for rule in some}) > 1


def yardsticks(stage: Stage, dense: Run) -> dict[str, Metrics]:
    """Measure how far another seed's dense clip is from the dense one, in one more run."""
    name = "another seed"
    other = generate(stage.pipe, replace(stage.job, seed=stage.job.seed ^ 1), on_step=stage.watch(name))
    return {name: measure(dense.clip.frames, other.frames)}


def _run_monitored(stage: Stage, name: str, plan: Plan) -> Summary:
    """Generate once more and measure recall and error of each sparse call: that costs time, which must not count."""
    with sparse(stage.pipe, plan, **stage.request.enable_options, monitor=True):
        generate(stage.pipe, stage.job, on_step=stage.watch(f"{name}: monitoring"))
        return summary(stage.pipe)
