"""The engine behind the page: one model in memory, one job at a time, events for whoever looks on."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dit_sparse.app.events import Event, Failed, Finished
from dit_sparse.app.limits import Ask, Limits, check_ask, check_blocks, check_size
from dit_sparse.app.line import Line, Tell
from dit_sparse.app.results import Results
from dit_sparse.app.visitor_plans import read_upload, visitor_spec
from dit_sparse.options import Options
from dit_sparse.pipelines.generate import (
    Job,
    check_device,
    default_device,
    default_dtype,
    known_transformers,
    load_pipeline,
    with_defaults,
)
from dit_sparse.pipelines.geometry import read_configs
from dit_sparse.pipelines.targets import find_targets
from dit_sparse.plan import ModelBinding, Plan
from dit_sparse.search.compare import measure_plans, write
from dit_sparse.search.request import Request, slug

SHOWN_OUT = Path("out/compare")  # in the command that a report shows, instead of the app's temporary folder


class Studio:
    """Hold the model that the owner of the page chose, and run jobs on it, one after the other."""

    def __init__(
        self,
        model: str = "bundled",
        device: str | None = None,
        dtype: str | None = None,
        limits: Limits | None = None,
        options: Options | None = None,
        results: Results | None = None,
    ) -> None:
        """Name the model: bundled, a folder or a hub id, never a visitor's. It is loaded on first use.

        limits: None for the defaults of the device. options: those of `enable`, for every plan.

        Raises:
            ValueError: torch does not see the device.
        """
        self.model, self.device, self.dtype = model, device or default_device(), dtype
        check_device(self.device)
        self.limits, self.options = limits or Limits.of(self.device), options or Options()
        self.results = results or Results()
        self._line = Line(self.limits.waiting)
        self._pipe: Any = None
        self._loading = threading.Lock()

    @property
    def shown_model(self) -> str:
        """Return the model's name for visitors: of a folder only its last part."""
        is_folder = self.model != "bundled" and Path(self.model).exists()
        return f"./{Path(self.model).resolve().name}" if is_folder else self.model

    def run(self, ask: Ask, stop: threading.Event) -> Iterator[Event]:
        """Compare one plan with dense; see `sweep`."""
        return self.sweep(ask, [ask.plan], stop)

    def sweep(self, ask: Ask, plans: Sequence[str | Plan], stop: threading.Event) -> Iterator[Event]:
        """Compare several plans with dense in one go; yield events, the last of which is one of `events.LAST`.

        An event comes at least every half second. Setting `stop`, or closing the iterator, ends the job after the
        step that runs; the next job begins when it has ended. Nothing is raised: what fails is an event.
        """
        try:
            job, known = self._check(ask, plans)
        except ValueError as error:
            yield Failed(str(error))
            return
        yield from self.borrow(lambda pipe, tell: self._compare(pipe, tell, ask, job, known), stop)

    def borrow(self, task: Callable[[Any, Tell], Any], stop: threading.Event) -> Iterator[Event]:
        """Run task(pipeline, tell) when it is its turn; yield events as `sweep` does, then Done(its value).

        The task calls `tell.progress` between steps and leaves the pipeline as it was, whatever that raises.
        """

        def work(tell: Tell) -> Any:
            if not self._on_cuda:
                return task(self._loaded(tell), tell)
            torch.cuda.set_device(self.device)  # a new thread does not inherit it
            try:
                return task(self._loaded(tell), tell)
            finally:
                torch.cuda.empty_cache()

        return self._line.run(work, stop)

    @property
    def waiting(self) -> int:
        """Return how many jobs wait for their turn."""
        return self._line.waiting

    def read_plan(self, path: str | Path, uploads: Path) -> Plan:
        """Read an uploaded plan for this model; raises as `visitor_plans.read_upload`."""
        return read_upload(path, uploads, self.limits, self._bindings())

    def usual(self) -> Job:
        """Return the values that stand for None in an Ask; loads the model.

        Raises:
            RuntimeError: the model cannot be loaded.
        """
        return with_defaults(self._loaded(None), self.model, Job("-"))

    def close(self) -> None:
        """End the job that runs after its step, wait for it, and remove all results."""
        self._line.close()
        self.results.close()

    def _check(self, ask: Ask, plans: Sequence[str | Plan]) -> tuple[Job, dict[str, Plan]]:
        """Check what needs no model; return the job, and the plans by the words that a report has for them."""
        if not 1 <= len(plans) <= self.limits.plans:
            raise ValueError(f"choose between 1 and {self.limits.plans} plans, got {len(plans)}")
        known: dict[str, Plan] = {}
        for plan in plans:
            if isinstance(plan, Plan):
                words = slug(plan.name.replace("/", "-")) or "plan"
                while f"{words}.json" in known:
                    words += "-again"
                known[f"{words}.json"] = plan
            else:
                found = visitor_spec(plan)
                known[plan.strip()] = found
        return check_ask(ask, self.limits), known

    def _compare(self, pipe: Any, tell: Tell, ask: Ask, job: Job, known: dict[str, Plan]) -> Finished:
        job = with_defaults(pipe, self.model, job)
        grid = check_size(pipe, job, self.limits)
        if grid is not None:
            for plan in known.values():
                check_blocks(plan, grid)
        request = Request(
            job,
            tuple(known),
            SHOWN_OUT,
            self.shown_model,
            self.device,
            options=replace(self.options, monitor=ask.monitor),
            yardstick=ask.yardstick,
        )
        found = measure_plans(request, tell.progress, pipe=pipe, plans=known, preview=tell.preview)
        tell.progress("writing", 0, 1)
        folder = self.results.new()
        try:
            write(folder, request, found)
        except BaseException as error:
            self.results.remove(folder)
            if isinstance(error, ValueError):  # not the visitor's doing
                raise RuntimeError(f"the results cannot be written: {error}") from error
            raise
        return Finished(folder, found.report)

    @property
    def _on_cuda(self) -> bool:
        return torch.device(self.device).type == "cuda"

    def _loaded(self, tell: Tell | None) -> Any:
        """Return the pipeline, loaded once; what fails there is nothing that a visitor could mend."""
        with self._loading:
            if self._pipe is None:
                if tell is not None:
                    tell.progress("loading the model", 0, 1)
                try:
                    pipe = load_pipeline(self.model, self.device, self.dtype or default_dtype(self.device))
                    known_transformers(pipe)
                except ValueError as error:
                    raise RuntimeError(f"{self.model} cannot be loaded: {error}") from error
                pipe.set_progress_bar_config(disable=True)
                self._pipe = pipe
            return self._pipe

    def _bindings(self) -> list[ModelBinding]:
        """Return what plans for this model may be bound to; from its configs where it is not loaded yet."""
        if self._pipe is not None:
            return [target.binding() for target in find_targets(self._pipe)]
        try:
            modules, _ = read_configs(self.model)
            return [target.binding() for module in modules.values() for target in find_targets(module)]
        except ValueError as error:
            raise RuntimeError(f"{self.model} cannot be read: {error}") from error
