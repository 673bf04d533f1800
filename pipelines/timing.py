"""Seconds of self-attention alone, dense and sparse through the same hook: `Schedule.timer`."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from dit_sparse.pipelines.generate import Job, OnStep, is_cuda, run_steps, wait_for
from dit_sparse.pipelines.targets import find_schedules

if TYPE_CHECKING:
    from dit_sparse.attention import Layer

BEHIND = 0.2  # of a step's time, which the GPU needs after the host has queued it


@dataclass(frozen=True)
class AttentionTime:
    """Hold the mean seconds of a self-attention call in the steps that a timing pass ran; None without such a call."""

    steps: int
    calls: int
    sparse_call_seconds: float | None
    dense_call_seconds: float | None

    def of_run(self, sparse_calls: int, dense_calls: int) -> float | None:
        """Scale to a whole run; None where the pass met no call of a kind that the run has."""
        pairs = ((sparse_calls, self.sparse_call_seconds), (dense_calls, self.dense_call_seconds))
        if any(calls and seconds is None for calls, seconds in pairs):
            return None
        return sum(calls * (seconds or 0.0) for calls, seconds in pairs)


def time_attention(
    pipe: Any, job: Job | Sequence[Job], most_steps: int | None, *, on_step: OnStep | None = None
) -> AttentionTime:
    """Time every self-attention call of an enabled pipeline, in a pass of its own.

    most_steps ends the pass after so many steps with a sparse call (for `Plan.dense()`: so many steps); None runs all.
    A call is what the layer's attention costs: token order, selection and kernel, or the model's own dense call.

    Raises:
        ValueError: the pipeline is not enabled.
    """
    schedules = [schedule for _, schedule in find_schedules(pipe)]
    if not schedules:
        raise ValueError("attention can only be timed on an enabled pipeline; for dense, enable Plan.dense()")
    timer = _CallTimer(is_cuda(pipe), wants_sparse=any(schedule.plan.rules for schedule in schedules))
    for schedule in schedules:
        schedule.timer = timer
    try:
        steps = run_steps(pipe, job, lambda: timer.end_step(most_steps), on_step=on_step)
    finally:
        for schedule in schedules:
            schedule.timer = None
    return timer.mean(steps)


def keeps_busy(pipe: Any, job: Job | Sequence[Job]) -> bool:
    """Say whether a model keeps its GPU busy: whether a good part of a step is still to be computed once it is queued.

    Then what the host does for a call costs nothing, as long as it stays ahead. Runs three steps; False off CUDA.
    """
    if not is_cuda(pipe):
        return False
    begun, shares = time.perf_counter(), []

    def enough() -> bool:
        nonlocal begun
        queued = time.perf_counter()
        torch.cuda.synchronize()
        ended = time.perf_counter()
        shares.append((ended - queued) / (ended - begun))
        begun = ended
        return len(shares) == 3

    run_steps(pipe, job, enough)
    return shares[-1] > BEHIND


class _CallTimer:
    """Time calls one by one: events on CUDA, so that nothing waits within a step; the clock elsewhere."""

    def __init__(self, on_cuda: bool, wants_sparse: bool) -> None:
        self.on_cuda, self.wants_sparse = on_cuda, wants_sparse
        self.calls: list[tuple[bool, Any, Any]] = []  # (ran sparse, start, end)
        self._seen = self._counted_steps = 0

    @contextlib.contextmanager
    def __call__(self, layer: Layer) -> Iterator[None]:
        before = layer.schedule.summary().sparse_calls
        start = self._now()
        yield
        end = self._now()
        self.calls.append((layer.schedule.summary().sparse_calls > before, start, end))

    def end_step(self, most_steps: int | None) -> bool:
        """Count the step that ended if it is of the kind we came for; say whether these are enough."""
        of_this_step, self._seen = self.calls[self._seen :], len(self.calls)
        self._counted_steps += not self.wants_sparse or any(sparse for sparse, _, _ in of_this_step)
        return most_steps is not None and self._counted_steps >= most_steps

    def mean(self, steps: int) -> AttentionTime:
        wait_for(self.on_cuda)
        taken = {True: [0.0, 0], False: [0.0, 0]}
        for sparse, start, end in self.calls:
            taken[sparse][0] += start.elapsed_time(end) / 1e3 if self.on_cuda else end - start
            taken[sparse][1] += 1
        means = {sparse: total / count if count else None for sparse, (total, count) in taken.items()}
        return AttentionTime(steps, len(self.calls), means[True], means[False])

    def _now(self) -> Any:
        if not self.on_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
