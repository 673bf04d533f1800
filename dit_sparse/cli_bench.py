"""The commands `dit-sparse bench ...`: they measure, after checking what they measure."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from dit_sparse.cli_options import (
    PROMPT,
    Backend,
    Device,
    Dtype,
    Frames,
    Height,
    Model,
    Monitor,
    PlanSpecs,
    Quiet,
    Steps,
    Width,
)


def bench_kernels(
    section: Annotated[
        list[str] | None,
        typer.Option("--section", "-s", help="One of the table. Repeatable. (default: the usual ones)"),
    ] = None,
    shape: Annotated[list[str] | None, typer.Option(help="One of the tables. Repeatable. (default: all)")] = None,
    density: Annotated[list[float] | None, typer.Option(help="One of the tables. Repeatable. (default: all)")] = None,
    backend: Annotated[
        list[str] | None,
        typer.Option("--backend", "-b", help="hopper, triton, fa4 or flex. Repeatable. (default: all)"),
    ] = None,
    variants: Annotated[bool, typer.Option(help="Also time the launch configurations one by one.")] = False,
    rounds: Annotated[int, typer.Option(min=1, help="Interleaved rounds.")] = 5,
    timeout: Annotated[float, typer.Option(help="Seconds of silence after which a process is ended.")] = 120.0,
    minutes: Annotated[float, typer.Option(help="What has not begun by then is left out.")] = 9.0,
    out: Annotated[
        Path | None, typer.Option(help="Write JSON to this file, a picture beside it, and lines while it runs.")
    ] = None,
) -> None:
    """Time block-sparse kernels beside dense ones and peers, after checking them. Needs a GPU."""
    from dit_sparse.search.console import stdout, table
    from dit_sparse.search.kernel_bench import BACKENDS, Request, bench_kernels, units_of
    from dit_sparse.search.kernel_events import Listener
    from dit_sparse.search.kernel_report import (
        FINDING_HEADINGS,
        ROW_HEADINGS,
        failure_lines,
        finding_cells,
        row_cells,
        sound,
    )
    from dit_sparse.search.staging import check_writable

    if out is not None:
        check_writable(out.parent)
    request = Request(
        tuple(section or ()), tuple(shape or ()), tuple(density or ()), tuple(backend or BACKENDS), rounds, timeout,
        60.0 * minutes, variants,
    )  # fmt: skip
    units_of(request)  # what is unknown is said before any work
    listener = Listener(out, lambda line: print(line, file=sys.stderr, flush=True))
    try:
        bench_kernels(request, listener.hear)
    finally:
        report = listener.close()
    for line in failure_lines(report):
        print(line, file=sys.stderr)
    stdout().print(table(ROW_HEADINGS, row_cells(report)))
    stdout().print(table(FINDING_HEADINGS, finding_cells(report)))
    if out is not None:
        print(out)
    if not sound(report):
        raise typer.Exit(1)


def bench_model(
    plan: PlanSpecs = ["balanced", "topblocks:keep=0.2", "radial:kind=block", "neighborhood:window=0.3"],  # noqa: B006
    model: Model = "bundled",
    prompt: Annotated[str, typer.Option(help="What to generate.")] = PROMPT,
    seed: Annotated[int, typer.Option(help="Seed of the initial noise.")] = 0,
    steps: Steps = None,
    frames: Frames = None,
    height: Height = None,
    width: Width = None,
    device: Device = None,
    dtype: Dtype = None,
    backend: Backend = "auto",
    attention_steps: Annotated[int | None, typer.Option(help="Steps of the separate attention timing.")] = None,
    monitor: Monitor = False,
    out: Annotated[Path | None, typer.Option(help="Write the report as JSON to this file.")] = None,
    quiet: Quiet = False,
) -> None:
    """Time a model dense against plans at a size: seconds, attention seconds, PSNR. Writes no video."""
    from dit_sparse.options import Options
    from dit_sparse.search.compare import measure_plans
    from dit_sparse.search.console import progress_on_stderr, stdout, table
    from dit_sparse.search.report import HEADINGS, table_rows, to_json
    from dit_sparse.search.request import Job, Request, default_device
    from dit_sparse.search.staging import check_writable, write_text

    if out is not None:
        check_writable(out.parent)
    request = Request(
        job=Job(prompt, seed, steps, frames, height, width),
        plans=tuple(plan),
        out=Path("out/compare"),
        model=model,
        device=device or default_device(),
        dtype=dtype,
        options=Options(backend=backend, monitor=monitor),
        attention_steps=attention_steps,
    )
    with progress_on_stderr(quiet) as progress:
        report = measure_plans(request, progress).report
    stdout().print(table(HEADINGS, table_rows(report)))
    if out is not None:
        write_text(out, to_json(report))
        print(out)


def bench_forward(
    architecture: Annotated[
        list[str] | None, typer.Option("--architecture", "-a", help="One of the table. Repeatable. (default: all)")
    ] = None,
    density: Annotated[float, typer.Option(help="Computed density that the patterns are fitted to.")] = 0.25,
    plan: Annotated[list[str] | None, typer.Option("--plan", "-p", help="Patterns instead of the fitted ones.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write the rows as JSON to this file.")] = None,
) -> None:
    """Time one forward of published architectures with random weights: stock, dense, sparse. Needs a GPU."""
    from dataclasses import asdict

    from dit_sparse.patterns import pattern_from_text
    from dit_sparse.pipelines.architectures import ARCHITECTURES
    from dit_sparse.search.console import stdout, table
    from dit_sparse.search.environment import environment
    from dit_sparse.search.forward_bench import HEADINGS, bench_forwards, cells
    from dit_sparse.search.staging import check_writable, write_text

    if out is not None:
        check_writable(out.parent)
    patterns = None if plan is None else [pattern_from_text(one) for one in plan]
    rows = bench_forwards(
        architecture or list(ARCHITECTURES), density, lambda line: print(line, file=sys.stderr, flush=True), patterns
    )
    stdout().print(table(HEADINGS, cells(rows)))
    if out is not None:
        found = {"environment": environment(), "density": density, "rows": [asdict(row) for row in rows]}
        write_text(out, json.dumps(found, indent=2) + "\n")
        print(out)


def bench_patterns(
    shape: Annotated[
        list[str] | None, typer.Option("--shape", "-s", help="One of the table. Repeatable. (default: Wan's two)")
    ] = None,
    density: Annotated[float, typer.Option(help="Computed density that the patterns are fitted to.")] = 0.25,
    plan: Annotated[list[str] | None, typer.Option("--plan", "-p", help="Patterns instead of the table's.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write the rows as JSON to this file.")] = None,
) -> None:
    """Time choosing blocks beside attending to them, for every pattern at real shapes. Needs a GPU."""
    from dataclasses import asdict

    from dit_sparse.search.console import stdout, table
    from dit_sparse.search.environment import environment
    from dit_sparse.search.pattern_bench import HEADINGS, PATTERNS, bench_patterns, cells
    from dit_sparse.search.staging import check_writable, write_text

    if out is not None:
        check_writable(out.parent)
    shapes = shape or ["wan2.1-1.3b-480p", "wan2.1-14b-720p"]
    rows = bench_patterns(shapes, plan or PATTERNS, density, lambda line: print(line, file=sys.stderr, flush=True))
    stdout().print(table(HEADINGS, cells(rows)))
    if out is not None:
        found = {"environment": environment(), "density": density, "rows": [asdict(row) for row in rows]}
        write_text(out, json.dumps(found, indent=2) + "\n")
        print(out)


def bench_quality(
    budget: Annotated[
        list[float] | None, typer.Option(help="Computed density. Repeatable. (default: 0.1, 0.2, 0.35)")
    ] = None,
    plan: Annotated[list[str] | None, typer.Option("--plan", "-p", help="Patterns instead of the table's.")] = None,
    model: Model = "bundled",
    prompt: Annotated[list[str] | None, typer.Option(help="Prompts instead of the three usual ones.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the initial noise.")] = 0,
    steps: Steps = None,
    frames: Frames = None,
    height: Height = None,
    width: Width = None,
    device: Device = None,
    out: Annotated[Path | None, typer.Option(help="Write the rows as JSON to this file.")] = None,
) -> None:
    """Generate with every pattern at equal budgets: density, recall, PSNR against dense, seconds.

    The file is written anew after each row; "finished" in it says whether all are there.
    """
    from dataclasses import asdict

    from dit_sparse.pipelines.generate import check_device, default_device
    from dit_sparse.search.console import stdout, table
    from dit_sparse.search.environment import environment
    from dit_sparse.search.quality_bench import (
        HEADINGS,
        PATTERNS,
        PROMPTS,
        Row,
        Setting,
        Yardstick,
        bench_quality,
        cells,
    )
    from dit_sparse.search.staging import check_writable, write_text

    if out is not None:
        check_writable(out.parent)
    check_device(device or default_device())
    prompts = tuple(prompt or PROMPTS)
    setting = Setting(model, device or default_device(), prompts, seed, steps, frames, height, width)
    head = {"environment": environment(), "setting": asdict(setting)}

    def keep(yardstick: Yardstick, rows: Sequence[Row], finished: bool = False) -> None:
        if out is not None:
            found = {**head, "finished": finished, "yardstick": asdict(yardstick), "rows": list(map(asdict, rows))}
            write_text(out, json.dumps(found, indent=2) + "\n")

    yardstick, rows = bench_quality(
        setting, plan or PATTERNS, budget or [0.1, 0.2, 0.35],
        lambda line: print(line, file=sys.stderr, flush=True), keep,
    )  # fmt: skip
    keep(yardstick, rows, finished=True)
    stdout().print(table(HEADINGS, cells(rows)))
    if out is not None:
        print(out)


def bench_prices(
    out: Annotated[Path, typer.Option(help="Write the table to this file; what it holds is not measured again.")],
    shape: Annotated[list[str] | None, typer.Option("--shape", "-s", help="One of the table. (default: all)")] = None,
    minutes: Annotated[float, typer.Option(help="Stop after so many, between two candidates.")] = 4.0,
    device: Annotated[str, typer.Option(help="cuda, cuda:N or cpu.")] = "cuda",
) -> None:
    """Measure what attention costs here, for searches elsewhere: `search --prices FILE`.

    Exits 3 where time was up; the same command again goes on.
    """
    from dit_sparse.search.price_bench import bench_prices
    from dit_sparse.search.staging import check_writable

    check_writable(out.parent)
    _, missing = bench_prices(shape, minutes, out, lambda line: print(line, file=sys.stderr, flush=True), device)
    if out.exists():
        print(out)
    if missing:
        print(f"time was up; {len(missing)} prices are missing: {', '.join(missing)}", file=sys.stderr)
        raise typer.Exit(3)
