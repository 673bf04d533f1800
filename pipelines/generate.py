"""Load a model, run it, time it: the same road for dense and for sparse."""

from __future__ import annotations

import contextlib
import inspect
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dit_sparse.pipelines import compat
from dit_sparse.pipelines.model_table import model_of, no_known_model

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# a job's fields as diffusers' pipelines call them
ARGUMENTS = {
    "prompt": "prompt",
    "negative_prompt": "negative_prompt",
    "steps": "num_inference_steps",
    "frames": "num_frames",
    "height": "height",
    "width": "width",
    "guidance": "guidance_scale",
    "text_tokens": "max_sequence_length",
}
OnStep = Callable[[int, int], None]  # (steps done, steps of the whole schedule)
OnLatents = Callable[[int, torch.Tensor], float]  # (steps done, latents) -> seconds that it took


@dataclass(frozen=True)
class Job:
    """Say what to generate; None leaves a value to the pipeline's own default."""

    prompt: str
    seed: int = 0
    steps: int | None = None
    frames: int | None = None
    height: int | None = None
    width: int | None = None
    guidance: float | None = None
    negative_prompt: str | None = None
    text_tokens: int | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "frames", "height", "width"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not self.prompt.strip():
            raise ValueError("the prompt is empty")


@dataclass(frozen=True, eq=False)
class Clip:
    """Hold what one run gave: raw frames float32 [T, H, W, 3] in [0, 1], its seconds and its peak memory."""

    frames: NDArray[np.float32]
    seconds: float
    peak_memory_bytes: int | None  # None on a CPU


def default_device() -> str:
    """Name the device that a run uses where the user names none."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def default_dtype(device: str) -> str:
    """Name the dtype for a device: bfloat16 has no fast path on most CPUs."""
    return "float32" if torch.device(device).type == "cpu" else "bfloat16"


def load_pipeline(model: str, device: str, dtype: str) -> Any:
    """Load a pipeline: `bundled`, a folder made by save_pretrained, or a hub id.

    Raises:
        ValueError: an unknown dtype or device, a folder that is no pipeline.
        OSError: the hub does not know the id or cannot be reached.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    check_device(device)
    if model == "bundled":
        from dit_sparse.pipelines.bundled import load_bundled

        with _no_loading_bars():
            return load_bundled(device=device, dtype=DTYPES[dtype])
    from diffusers import DiffusionPipeline

    if Path(model).exists() and not (Path(model) / "model_index.json").is_file():
        raise ValueError(f"{model} is no diffusers pipeline: it holds no model_index.json (save_pretrained writes one)")
    with _no_loading_bars():
        return DiffusionPipeline.from_pretrained(model, dtype=DTYPES[dtype]).to(device)


def check_device(device: str) -> None:
    """Refuse a device that torch does not know or that is not there.

    Raises:
        ValueError: with what is there instead.
    """
    try:
        kind = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device must be cpu, cuda or cuda:N, got {device!r}") from error
    if kind.type == "cuda" and (kind.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {device} is not there: torch sees {torch.cuda.device_count()} CUDA devices")


def known_transformers(pipe: Any) -> dict[str, torch.nn.Module]:
    """Return the pipeline's transformers that have an entry in the model table.

    Raises:
        ValueError: there is none; names what was found and what is known.
    """
    modules = dict(compat.modules_of(pipe))
    known = {name: module for name, module in modules.items() if model_of(module) is not None}
    if not known:
        raise no_known_model([type(module).__name__ for module in modules.values()])
    return known


def with_defaults(pipe: Any, model: str, job: Job) -> Job:
    """Fill in what the job leaves open: the bundled model's sizes for the device, else the pipeline's own defaults.

    Raises:
        ValueError: the job sets something that this pipeline has no argument for.
    """
    _arguments(pipe, job)
    known = inspect.signature(pipe.__call__).parameters
    values = {field: known[name].default for field, name in ARGUMENTS.items() if name in known}
    if model == "bundled":
        from dit_sparse.pipelines.bundled import defaults

        own = defaults(pipe.device)
        values |= {field: getattr(own, name) for field, name in ARGUMENTS.items() if hasattr(own, name)}
    names = ("steps", "frames", "height", "width", "guidance", "text_tokens")
    missing: dict[str, Any] = {name: values.get(name) for name in names if getattr(job, name) is None}
    return replace(job, **missing)


def generate(pipe: Any, job: Job, *, on_step: OnStep | None = None, on_latents: OnLatents | None = None) -> Clip:
    """Run a pipeline once and time all of it, text encoding and decoding included.

    The seconds that `on_latents` says it took, such as those of `preview.previews`, are left out. What remains of it:
    where it waits for a GPU, the host begins the next step without a lead; its memory counts in the peak.

    Raises:
        ValueError: the job does not fit the pipeline.
    """
    return generate_batch(pipe, (job,), on_step=on_step, on_latents=on_latents)[0]


@torch.no_grad()
def generate_batch(
    pipe: Any, jobs: Sequence[Job], *, on_step: OnStep | None = None, on_latents: OnLatents | None = None
) -> list[Clip]:
    """Run a pipeline once for jobs that differ in prompt and seed alone; seconds are shared out among the clips.

    Raises:
        ValueError: the jobs differ in more, or do not fit the pipeline.
    """
    on_cuda = is_cuda(pipe)
    if on_cuda:
        torch.cuda.reset_peak_memory_stats()
    wait_for(on_cuda)
    start = time.perf_counter()
    counter = _StepCounter(jobs[0], on_step, on_latents=on_latents)
    result = _call(pipe, jobs, counter)
    wait_for(on_cuda)
    seconds = (time.perf_counter() - start - counter.seconds_aside) / len(jobs)
    peak = torch.cuda.max_memory_allocated() if on_cuda else None
    if not hasattr(result, "frames"):  # images: one array [B, H, W, 3]
        return [Clip(np.asarray(result.images[b : b + 1], np.float32), seconds, peak) for b in range(len(jobs))]
    return [Clip(np.asarray(frames, dtype=np.float32), seconds, peak) for frames in result.frames[: len(jobs)]]


def run_steps(pipe: Any, job: Job | Sequence[Job], stop: Callable[[], bool], *, on_step: OnStep | None = None) -> int:
    """Run the first steps of a job, or of a batch of them, until `stop()` says so after one; return how many ran."""
    jobs = (job,) if isinstance(job, Job) else job
    counter = _StepCounter(jobs[0], on_step, stop)
    with torch.no_grad(), contextlib.suppress(_EnoughError):
        _call(pipe, jobs, counter)
    wait_for(is_cuda(pipe))
    return counter.done


class _EnoughError(Exception):
    """Ends a pipeline call between two steps."""


class _StepCounter:
    """Be the pipeline's callback_on_step_end."""

    def __init__(
        self,
        job: Job,
        on_step: OnStep | None,
        stop: Callable[[], bool] | None = None,
        on_latents: OnLatents | None = None,
    ) -> None:
        self.job, self.on_step, self.stop, self.on_latents = job, on_step, stop, on_latents
        self.done, self.seconds_aside = 0, 0.0

    def __call__(self, pipe: Any, step: int, timestep: object, tensors: dict[str, Any]) -> dict[str, Any]:
        self.done += 1
        if self.on_latents is not None:
            self.seconds_aside += self.on_latents(self.done, tensors["latents"])
        if self.on_step is not None:
            self.on_step(self.done, self.job.steps or self.done)
        if self.stop is not None and self.stop():
            raise _EnoughError
        return tensors


@contextlib.contextmanager
def _no_loading_bars() -> Iterator[None]:
    """Silence the bars of loading weights; the caller says that it loads."""
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    switched_off = [lib for lib in (of_diffusers, of_transformers) if lib.is_progress_bar_enabled()]
    for lib in switched_off:
        lib.disable_progress_bar()
    try:
        yield
    finally:
        for lib in switched_off:
            lib.enable_progress_bar()


def _arguments(pipe: Any, job: Job) -> dict[str, Any]:
    """Name the job's values as the pipeline does."""
    known = inspect.signature(pipe.__call__).parameters
    given = {name: getattr(job, field) for field, name in ARGUMENTS.items() if getattr(job, field) is not None}
    if unknown := sorted(set(given) - set(known)):
        raise ValueError(f"{type(pipe).__name__} takes no {', '.join(unknown)}; leave it out")
    return given


def _call(pipe: Any, jobs: Sequence[Job], counter: _StepCounter) -> Any:
    arguments = _arguments(pipe, jobs[0])
    # drawn on the CPU, so that a seed means the same clip on every device
    generators = [torch.Generator("cpu").manual_seed(job.seed) for job in jobs]
    if len(jobs) > 1:
        if len({replace(job, prompt="-", seed=0) for job in jobs}) > 1:
            raise ValueError("jobs of one batch may differ in prompt and seed only")
        arguments["prompt"] = [job.prompt for job in jobs]
        if "negative_prompt" in arguments:
            arguments["negative_prompt"] = [job.negative_prompt for job in jobs]
    generator = generators if len(jobs) > 1 else generators[0]
    return pipe(**arguments, generator=generator, output_type="np", callback_on_step_end=counter)


def is_cuda(pipe: Any) -> bool:
    return torch.device(pipe.device).type == "cuda"


def wait_for(on_cuda: bool) -> None:
    if on_cuda:
        torch.cuda.synchronize()
