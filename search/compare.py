"""The main job: one prompt and seed, dense and with each plan, measured and written down."""

from __future__ import annotations

import datetime
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from dit_sparse.grid import Grid
from dit_sparse.pipelines.enable import sparse, summary
from dit_sparse.pipelines.generate import (
    Clip,
    Job,
    default_dtype,
    generate,
    known_transformers,
    load_pipeline,
    run_steps,
    with_defaults,
)
from dit_sparse.pipelines.geometry import expected_grid, shapes_of
from dit_sparse.pipelines.presets import for_model
from dit_sparse.pipelines.targets import find_targets
from dit_sparse.pipelines.timing import AttentionTime, time_attention
from dit_sparse.plan import Plan
from dit_sparse.record import Summary
from dit_sparse.search.environment import environment
from dit_sparse.search.metrics import measure
from dit_sparse.search.report import measured_fields, to_json, to_markdown
from dit_sparse.search.request import Request, check_request, reproduce_command
from dit_sparse.search.staging import check_writable, staged
from dit_sparse.search.video import enlarge, side_by_side, stills, to_bytes, write_mp4

logger = logging.getLogger("dit_sparse")
Progress = Callable[[str, int, int], None]  # (what runs, steps done, steps in all)


def quiet(what: str, done: int, total: int) -> None:
    """Show no progress."""


@dataclass(frozen=True, eq=False)
class Run:
    """Hold one generated clip and what was measured on the way."""

    clip: Clip
    attention_seconds: float | None
    attention_steps: int
    summary: Summary
    measured: Summary | None = None  # of a run of its own under monitor=True


@dataclass(frozen=True, eq=False)
class Comparison:
    """Hold the report and the clips of a comparison, dense first."""

    report: dict[str, Any]
    runs: dict[str, Run]


def compare(request: Request, progress: Progress = quiet) -> tuple[dict[str, Any], tuple[Path, ...]]:
    """Generate dense and with every plan, same seed, one after the other; write videos and reports into request.out.

    Returns the report and the files. All that can be refused is refused before the first step, and nothing is written
    before the last.

    Raises:
        ValueError: something in the request is wrong or does not fit the model; the message says what.
        FileNotFoundError: a plan's path does not exist.
        OSError: the model cannot be loaded, or the disk is full.
        RuntimeError: a run failed on the way.
    """
    check_writable(request.out)
    found = measure_plans(request, progress)
    progress("writing", 0, 1)
    return found.report, _write(request, found)


def measure_plans(request: Request, progress: Progress = quiet) -> Comparison:
    """Do all of `compare` but the writing; raises the same."""
    plans = check_request(request)
    dtype = request.dtype or default_dtype(request.device)
    progress("loading the model", 0, 1)
    pipe = load_pipeline(request.model, request.device, dtype)
    known_transformers(pipe)
    models = [target.binding() for target in find_targets(pipe)]
    plans = {name: for_model(plan, models) for name, plan in plans.items()}
    job = with_defaults(pipe, request.model, request.job)
    notes, grid = check_model(pipe, request, job, plans)
    pipe.set_progress_bar_config(disable=True)
    try:
        dense, dense_time = _run_dense(pipe, request, job, progress)
        runs = {name: _run_plan(pipe, request, job, name, plan, dense_time, progress) for name, plan in plans.items()}
        frames, height, width = dense.clip.frames.shape[:3]
        resolved = replace(request, job=replace(job, frames=frames, height=height, width=width), dtype=dtype)
        progress("measuring", 0, 1)
        report = _report(pipe, resolved, plans, dense, runs, grid, notes)
    except ValueError as error:  # the request was fine: what fails now is not the user's doing
        raise RuntimeError(f"the run failed: {error}") from error
    return Comparison(report, {"dense": dense, **runs})


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


def _run_dense(pipe: Any, request: Request, job: Job, progress: Progress) -> tuple[Run, AttentionTime]:
    """Time the stock pipeline; its attention through the same hook as the plans', with nothing made sparse."""
    run_steps(pipe, job, lambda: True, on_step=_watch(progress, "dense: warm-up", job))
    clip = generate(pipe, job, on_step=_watch(progress, "dense", job))
    with sparse(pipe, Plan.dense()):
        taken = time_attention(
            pipe, job, request.most_attention_steps, on_step=_watch(progress, "dense: timing attention", job)
        )
        record = summary(pipe)
    seconds = taken.of_run(0, round(taken.calls / taken.steps * (job.steps or taken.steps)))
    return Run(clip, seconds, taken.steps, record), taken


def _run_plan(
    pipe: Any, request: Request, job: Job, name: str, plan: Plan, dense_time: AttentionTime, progress: Progress
) -> Run:
    """Time one plan: a warm-up where kernels compile, the whole generation, then attention in a pass of its own.

    The attention pass comes last, so that it finds every mask built.
    """
    with sparse(pipe, plan, **request.enable_options):
        if request.device != "cpu":
            time_attention(pipe, job, 1, on_step=_watch(progress, f"{name}: warm-up", job))
        clip = generate(pipe, job, on_step=_watch(progress, name, job))
        record = summary(pipe)
        taken = time_attention(
            pipe, job, request.most_attention_steps, on_step=_watch(progress, f"{name}: timing attention", job)
        )
    if taken.dense_call_seconds is None:  # dense calls that come after the timed steps
        taken = replace(taken, dense_call_seconds=dense_time.dense_call_seconds)
    measured = _run_monitored(pipe, request, job, name, plan, progress) if request.options.monitor else None
    return Run(clip, taken.of_run(record.sparse_calls, record.dense_calls), taken.steps, record, measured)


def _run_monitored(pipe: Any, request: Request, job: Job, name: str, plan: Plan, progress: Progress) -> Summary:
    """Generate once more and measure recall and error of each sparse call: that costs time, which must not count."""
    with sparse(pipe, plan, **request.enable_options, monitor=True):
        generate(pipe, job, on_step=_watch(progress, f"{name}: monitoring", job))
        return summary(pipe)


def _report(
    pipe: Any,
    request: Request,
    plans: dict[str, Plan],
    dense: Run,
    runs: dict[str, Run],
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


def _write(request: Request, found: Comparison) -> tuple[Path, ...]:
    """Write all files of a comparison and return their paths; the report goes last."""
    text, markdown = to_json(found.report), to_markdown(found.report)
    views = {name: enlarge(to_bytes(run.clip.frames)) for name, run in found.runs.items()}
    captions = [f"{name}  {run.clip.seconds:.1f} s" for name, run in found.runs.items()]
    with staged(request.out) as folder:
        for name, frames in views.items():
            write_mp4(folder / _video_name(name, request), frames, request.fps)
        write_mp4(folder / "side_by_side.mp4", side_by_side(list(views.values()), captions), request.fps)
        stills([to_bytes(run.clip.frames) for run in found.runs.values()], captions).save(folder / "stills.png")
        (folder / "report.md").write_text(markdown, encoding="utf-8")
        (folder / "report.json").write_text(text, encoding="utf-8")
        names = sorted(file.name for file in folder.iterdir())
    return tuple(request.out / name for name in names)


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


def _watch(progress: Progress, what: str, job: Job) -> Callable[[int, int], None]:
    progress(what, 0, job.steps or 1)
    return lambda done, total: progress(what, done, total)


def _kept(density: float | None) -> dict[str, float] | None:
    return None if density is None else {"kept": density, "skipped": 1.0 - density}


def _ratio(dense: float | None, sparse_seconds: float | None) -> float | None:
    return dense / sparse_seconds if dense and sparse_seconds else None
