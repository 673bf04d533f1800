"""The main job: one prompt and seed, dense and with each plan, measured and written down."""

from __future__ import annotations

import datetime
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from dit_sparse.grid import Grid
from dit_sparse.pipelines.enable import sparse
from dit_sparse.pipelines.generate import Job, default_dtype, known_transformers, load_pipeline, with_defaults
from dit_sparse.pipelines.geometry import expected_grid, shapes_of
from dit_sparse.pipelines.presets import for_model
from dit_sparse.pipelines.targets import find_targets
from dit_sparse.plan import Plan
from dit_sparse.search.environment import environment
from dit_sparse.search.metrics import Metrics, measure
from dit_sparse.search.report import measured_fields, to_json, to_markdown
from dit_sparse.search.request import Request, check_request, reproduce_command
from dit_sparse.search.runs import Preview, Progress, Run, Stage, run_dense, run_plan, yardsticks
from dit_sparse.search.staging import check_writable, staged
from dit_sparse.search.video import enlarge, side_by_side, stills, to_bytes, write_mp4

logger = logging.getLogger("dit_sparse")


def quiet(what: str, done: int, total: int) -> None:
    """Show no progress."""


@dataclass(frozen=True, eq=False)
class Comparison:
    """Hold the report and the clips of a comparison, dense first."""

    report: dict[str, Any]
    runs: dict[str, Run]


def compare(
    request: Request,
    progress: Progress = quiet,
    *,
    pipe: Any | None = None,
    plans: Mapping[str, Plan] | None = None,
    preview: Preview | None = None,
) -> tuple[dict[str, Any], tuple[Path, ...]]:
    """Generate dense and with every plan, same seed, one after the other; write videos and reports into request.out.

    Returns the report and the files. All that can be refused is refused before the first step, and nothing is written
    before the last. The keywords are those of `measure_plans`.

    Raises:
        ValueError: something in the request is wrong or does not fit the model; the message says what.
        FileNotFoundError: a plan's path does not exist.
        OSError: the model cannot be loaded, or the disk is full.
        RuntimeError: a run failed on the way.
    """
    check_writable(request.out)
    found = measure_plans(request, progress, pipe=pipe, plans=plans, preview=preview)
    progress("writing", 0, 1)
    return found.report, write(request.out, request, found)


def measure_plans(
    request: Request,
    progress: Progress = quiet,
    *,
    pipe: Any | None = None,
    plans: Mapping[str, Plan] | None = None,
    preview: Preview | None = None,
) -> Comparison:
    """Do all of `compare` but the writing; raises the same.

    pipe: a pipeline that is loaded already, on the request's device, with nothing enabled; it is left as it was, and
    its progress bar too. plans: plans that are read already, by the words of `request.plans`.
    preview: called some times in each run with the run's name and a picture of a frame; the seconds that this takes
    are not counted (`generate`). Pipelines of which we know no right picture give none.
    `progress` is called after each step and may raise to end the comparison there; what it raises is passed on (a
    ValueError as a RuntimeError), and the pipeline is as it was before.
    """
    read = check_request(request, plans)
    if pipe is None:
        progress("loading the model", 0, 1)
        dtype = request.dtype or default_dtype(request.device)
        pipe = load_pipeline(request.model, request.device, dtype)
        pipe.set_progress_bar_config(disable=True)
        known_transformers(pipe)
    else:
        dtype = _dtype_of_loaded(pipe, request)
    request = replace(request, dtype=dtype)
    models = [target.binding() for target in find_targets(pipe)]
    read = {name: for_model(plan, models) for name, plan in read.items()}
    job = with_defaults(pipe, request.model, request.job)
    notes, grid = check_model(pipe, request, job, read)
    stage = Stage(pipe, request, job, progress, preview)
    try:
        dense, dense_time = run_dense(stage)
        runs = {name: run_plan(stage, name, plan, dense_time) for name, plan in read.items()}
        others = yardsticks(stage, dense) if request.yardstick else {}
        frames, height, width = dense.clip.frames.shape[:3]
        resolved = replace(request, job=replace(job, frames=frames, height=height, width=width))
        progress("measuring", 0, 1)
        report = _report(pipe, resolved, read, dense, runs, others, grid, notes)
    except ValueError as error:  # the request was fine: what fails now is not the user's doing
        raise RuntimeError(f"the run failed: {error}") from error
    return Comparison(report, {"dense": dense, **runs})


def _dtype_of_loaded(pipe: Any, request: Request) -> str:
    """Return the dtype of a caller's pipeline, after checking that the request means it and that it is dense."""
    dtype = str(next(iter(known_transformers(pipe).values())).dtype).removeprefix("torch.")
    if request.dtype not in (None, dtype):
        raise ValueError(f"the pipeline's transformer is in {dtype}, and dtype is {request.dtype}; leave dtype out")
    if torch.device(pipe.device).type != torch.device(request.device).type:
        raise ValueError(f"the pipeline is on {pipe.device}, and device is {request.device}; they must be the same")
    if any(target.enabled for target in find_targets(pipe)):
        raise ValueError("sparse attention is enabled on this pipeline, so that no run of it is dense; disable() first")
    return dtype


def check_model(pipe: Any, request: Request, job: Job, plans: dict[str, Plan]) -> tuple[list[str], Grid | None]:
    """Hold every plan against the model and the grid that the clip will have; return notes for the report and the grid.

    Raises:
        ValueError: the model has no known layers, or a plan does not fit its layers, heads or grid.
    """
    transformer = next(iter(known_transformers(pipe).values()))
    grid = None
    if job.height is not None and job.width is not None and getattr(pipe, "vae", None) is not None:
        grid = expected_grid(transformer, pipe.vae.config, job.frames or 1, job.height, job.width)
    for name, plan in plans.items():
        if grid is not None:
            _check_grid(name, plan, grid)
        with sparse(pipe, plan, **request.enable_options):
            pass
    return vocabulary_notes(job.prompt) if request.model == "bundled" else [], grid


def vocabulary_notes(prompt: str) -> list[str]:
    """Warn of words that the bundled model never saw, and list those that it knows."""
    from dit_sparse.pipelines.bundled import known_words, unknown_words

    unknown = unknown_words(prompt)
    if not unknown:
        return []
    known = "; ".join(f"{kind}: {' '.join(words)}" for kind, words in known_words().items())
    note = f"the bundled model does not know {', '.join(map(repr, unknown))}. It knows {known}"
    logger.warning(note)
    return [note]


def _check_grid(name: str, plan: Plan, grid: Grid) -> None:
    for rule in plan.rules:
        try:
            rule.pattern.check(grid)
        except ValueError as error:
            raise ValueError(f"plan {name} does not fit the grid {grid}: {error}") from error


def _report(
    pipe: Any,
    request: Request,
    plans: dict[str, Plan],
    dense: Run,
    runs: dict[str, Run],
    others: dict[str, Metrics],
    grid: Grid | None,
    notes: list[str],
) -> dict[str, Any]:
    job, shapes = request.job, shapes_of(pipe)
    left_alone = [f"attention left alone (unknown processor): {n}" for n in next(iter(runs.values())).summary.unknown]
    return {
        "schema": "dit-sparse/report",
        "schema_version": 1,
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "request": {
            "model": request.model,
            **asdict(job),
            "plans": list(request.plans),
            "device": request.device,
            "dtype": request.dtype,
            "options": request.enable_options,
        },
        "model": {
            "pipeline": type(pipe).__name__,
            "transformers": [f"{s.component}: {s.transformer}, {s.layers} layers x {s.heads} heads" for s in shapes],
            "parameters": sum(s.parameters for s in shapes),
        },
        "grid": None if grid is None else {**asdict(grid), "tokens": grid.tokens},
        "dense": _run_fields(dense, "dense.mp4"),
        "sparse": [
            {
                "name": name,
                "spec": spec,
                "plan": plans[name].to_dict(),
                **_run_fields(run, _video_name(name, request)),
                "speedup": dense.clip.seconds / run.clip.seconds,
                "attention_speedup": _ratio(dense.attention_seconds, run.attention_seconds),
                "density": _kept(run.summary.density),
                "computed_density": _kept(run.summary.computed_density),
                "run_density": _kept(run.summary.run_density),
                "sparse_calls": run.summary.sparse_calls,
                "dense_calls": run.summary.dense_calls,
                "dense_reasons": run.summary.dense_reasons,
                "metrics": asdict(measure(dense.clip.frames, run.clip.frames)),
                **({} if run.measured is None else {"measured": measured_fields(run.measured)}),
            }
            for spec, (name, run) in zip(request.plans, runs.items(), strict=True)
        ],
        **({"yardsticks": {name: asdict(found) for name, found in others.items()}} if others else {}),
        "timing": {
            "steps": job.steps,
            "attention_steps": {name: run.attention_steps for name, run in {"dense": dense, **runs}.items()},
            "warm_up": "one dense step; a plan's seconds include building its masks"
            if request.device == "cpu"
            else "one sparse step per plan",
        },
        "environment": environment(),
        "command": reproduce_command(request),
        "notes": [*notes, *left_alone],
    }


def write(out: Path, request: Request, found: Comparison) -> tuple[Path, ...]:
    """Write all files of a comparison into `out` and return their paths; the report goes last.

    Raises:
        OSError: the disk is full.
    """
    text, markdown = to_json(found.report), to_markdown(found.report)
    views = {name: enlarge(to_bytes(run.clip.frames)) for name, run in found.runs.items()}
    captions = [f"{name}  {run.clip.seconds:.1f} s" for name, run in found.runs.items()]
    with staged(out) as folder:
        for name, frames in views.items():
            write_mp4(folder / _video_name(name, request), frames, request.fps)
        write_mp4(folder / "side_by_side.mp4", side_by_side(list(views.values()), captions), request.fps)
        stills([to_bytes(run.clip.frames) for run in found.runs.values()], captions).save(folder / "stills.png")
        (folder / "report.md").write_text(markdown, encoding="utf-8")
        (folder / "report.json").write_text(text, encoding="utf-8")
        names = sorted(file.name for file in folder.iterdir())
    return tuple(out / name for name in names)


def _run_fields(run: Run, video: str) -> dict[str, Any]:
    return {
        "seconds": run.clip.seconds,
        "attention_seconds": run.attention_seconds,
        "peak_memory_bytes": run.clip.peak_memory_bytes,
        "video": video,
    }


def _video_name(name: str, request: Request) -> str:
    if name == "dense":
        return "dense.mp4"
    return "sparse.mp4" if len(request.plans) == 1 else f"sparse-{name}.mp4"


def _kept(density: float | None) -> dict[str, float] | None:
    return None if density is None else {"kept": density, "skipped": 1.0 - density}


def _ratio(dense: float | None, sparse_seconds: float | None) -> float | None:
    return dense / sparse_seconds if dense and sparse_seconds else None
