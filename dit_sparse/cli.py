"""The `dit-sparse` command. Exit codes: 0 ok, 1 failed, 2 usage, 3 gate not met or time up."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from dit_sparse.cli_bench import (
    bench_forward,
    bench_kernels,
    bench_model,
    bench_patterns,
    bench_prices,
    bench_quality,
)
from dit_sparse.cli_options import (
    AsJson,
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
from dit_sparse.cli_plans import plans_convert, plans_diff, plans_list, plans_pull, plans_push, plans_show
from dit_sparse.cli_search import search


def env(as_json: AsJson = False) -> None:
    """Print versions, devices and backends: the block to paste into an issue."""
    from dit_sparse.search.environment import environment
    from dit_sparse.search.report import environment_lines

    found = environment()
    print(json.dumps(found, indent=2) if as_json else "\n".join(environment_lines(found)))


def doctor(as_json: AsJson = False) -> None:
    """Run every backend on tiny data against the float64 oracle. Exits 1 if one is wrong."""
    from dataclasses import asdict

    from dit_sparse.search.console import stdout, table
    from dit_sparse.search.doctor import examine

    findings = [asdict(finding) for finding in examine()]
    if as_json:
        print(json.dumps(findings, indent=2))
    else:
        headings = ("backend", "device", "dtype", "verdict", "detail")
        stdout().print(table(headings, [[f[name] for name in headings] for f in findings]))
    if any(finding["verdict"] == "WRONG" for finding in findings):
        raise typer.Exit(1)


def compare(
    prompt: Annotated[str | None, typer.Option(help="What to generate.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="Read the prompt from a text file.")] = None,
    plan: PlanSpecs = ["balanced"],  # noqa: B006  typer copies it
    out: Annotated[Path, typer.Option("--out", "-o", help="Results folder; may exist.")] = Path("out/compare"),
    model: Model = "bundled",
    seed: Annotated[int, typer.Option(help="Seed of the initial noise, the same for all runs.")] = 0,
    steps: Steps = None,
    frames: Frames = None,
    height: Height = None,
    width: Width = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale. (default: the model's)")] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What to avoid.")] = None,
    device: Device = None,
    dtype: Dtype = None,
    backend: Backend = "auto",
    min_tokens: Annotated[int | None, typer.Option(help="Fewer tokens run dense. (default: by device)")] = None,
    dense_steps: Annotated[str | None, typer.Option(help="First steps kept dense: 2, or 0.1 of them.")] = None,
    dense_layers: Annotated[str | None, typer.Option(help='Layers kept dense: "0, 1, 47-49".')] = None,
    attention_steps: Annotated[int | None, typer.Option(help="Steps of the separate attention timing.")] = None,
    monitor: Monitor = False,
    yardstick: Annotated[
        bool, typer.Option("--yardstick", help="Measure how far another seed's clip is, in one more dense run.")
    ] = False,
    fps: Annotated[float, typer.Option(help="Frames a second in the mp4 files.")] = 8.0,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Generate dense and sparse with one seed; write videos, report.json and report.md."""
    from dit_sparse.options import Options
    from dit_sparse.search.compare import compare as run
    from dit_sparse.search.console import progress_on_stderr, stdout, table
    from dit_sparse.search.report import HEADINGS, summary_lines, table_rows
    from dit_sparse.search.request import Job, Request, default_device, parse_dense_steps

    text = _prompt(prompt, prompt_file)
    request = Request(
        job=Job(text, seed, steps, frames, height, width, guidance, negative_prompt),
        plans=tuple(plan),
        out=out,
        model=model,
        device=device or default_device(),
        dtype=dtype,
        options=Options(parse_dense_steps(dense_steps), dense_layers, min_tokens, backend, monitor=monitor),
        fps=fps,
        attention_steps=attention_steps,
        yardstick=yardstick,
    )
    with progress_on_stderr(quiet) as progress:
        report, files = run(request, progress)
    if as_json:
        print(json.dumps(report, indent=2))
        return
    console = stdout()
    console.print(table(HEADINGS, table_rows(report)))
    for line in [*summary_lines(report), *map(str, files)]:
        console.print(line)


def inspect(
    model: Model = "bundled", frames: Frames = None, height: Height = None, width: Width = None, as_json: AsJson = False
) -> None:
    """Show a model's grid, tokens, layers and heads at a clip size, from its configs alone."""
    from dit_sparse.pipelines.geometry import inspect_model

    found = inspect_model(model, frames, height, width)
    if as_json:
        print(json.dumps(found, indent=2))
        return
    for shape in found["transformers"]:
        print(
            f"{shape['component']}: {shape['transformer']}, {shape['layers']} self-attention layers x "
            f"{shape['heads']} heads x {shape['head_dim']}, {shape['parameters'] / 1e6:,.1f} M parameters"
        )
    grid = found["grid"]
    if grid is None:
        print("grid: the configs do not tell")
    else:
        axes = f"{grid['frames']} x {grid['height']} x {grid['width']} (frames x rows x columns)"
        print(f"grid: {axes}, {grid['prefix'] + grid['suffix']} text tokens, {grid['tokens']:,} tokens in all")


def models(as_json: AsJson = False) -> None:
    """List the transformer classes that are known, their usual token grids, and what stays dense in them."""
    from dit_sparse.pipelines.model_table import MODELS, REFUSED
    from dit_sparse.search.console import stdout, table

    if as_json:
        known = {
            name: {"layers": model.layers, "grid": model.usual[1].shape, "text": model.text, "dense": model.dense}
            for name, model in MODELS.items()
        }
        print(json.dumps({"known": known, "refused": REFUSED}, indent=2))
        return
    rows = [
        (name, model.usual[0], "x".join(map(str, model.usual[1].shape)), f"{model.usual[1].tokens:,}")
        for name, model in MODELS.items()
    ]
    stdout().print(table(("class", "usual size", "grid", "tokens"), rows))
    stdout().print(table(("nothing to make sparse in", "because"), list(REFUSED.items())))


def demo(
    port: Annotated[int, typer.Option(help="Port of the page.")] = 7860,
    host: Annotated[str, typer.Option(help="Address to serve on; 0.0.0.0 for a network.")] = "127.0.0.1",
    results: Annotated[
        Path | None, typer.Option(help="Results folder of `compare` to show first. (default: a stored one)")
    ] = None,
    model: Model = "bundled",
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Compare dense and sparse in the browser: generate, look at patterns, sweep plans, guess blindly."""
    from dit_sparse.app.demo import launch

    launch(results, port, host=host, model=model, device=device, dtype=dtype)


def _prompt(prompt: str | None, prompt_file: Path | None) -> str:
    if (prompt is None) == (prompt_file is None):
        raise typer.BadParameter("give either --prompt or --prompt-file")
    if prompt_file is None:
        return prompt or ""
    if not prompt_file.is_file():
        raise FileNotFoundError(f"prompt file {prompt_file} does not exist")
    return prompt_file.read_text(encoding="utf-8").strip()


COMMANDS: dict[str, Callable[..., None]] = {
    "env": env,
    "doctor": doctor,
    "compare": compare,
    "search": search,
    "inspect": inspect,
    "models": models,
    "plans list": plans_list,
    "plans show": plans_show,
    "plans diff": plans_diff,
    "plans convert": plans_convert,
    "plans push": plans_push,
    "plans pull": plans_pull,
    "bench kernels": bench_kernels,
    "bench model": bench_model,
    "bench forward": bench_forward,
    "bench patterns": bench_patterns,
    "bench quality": bench_quality,
    "bench prices": bench_prices,
    "demo": demo,
}
GROUPS = {
    "plans": "Look at plans and patterns; compare, convert and share them.",
    "bench": "Measure kernels and models.",
}


def reporting(command: Callable[..., None]) -> Callable[..., None]:
    """Wrap a command: what the user can mend exits 2 with one line, what failed on the way exits 1."""

    @functools.wraps(command)
    def wrapped(*args: Any, **options: Any) -> None:
        try:
            command(*args, **options)
        except (ValueError, FileNotFoundError) as error:
            _stop(error, 2)
        except (OSError, RuntimeError, ImportError) as error:
            if isinstance(error, (typer.Exit, typer.Abort)):
                raise
            _stop(error, 1)

    return wrapped


def _stop(error: Exception, code: int) -> None:
    print(f"dit-sparse: {error}", file=sys.stderr)
    raise typer.Exit(code) from error


def build_app() -> typer.Typer:
    """Make the command from the table above."""
    settings: dict[str, Any] = {"no_args_is_help": True, "add_completion": False, "pretty_exceptions_enable": False}
    app = typer.Typer(help="Sparse attention for diffusers' video and image transformers.", **settings)
    groups = {name: typer.Typer(help=text, **settings) for name, text in GROUPS.items()}
    for name, group in groups.items():
        app.add_typer(group, name=name)
    for name, command in COMMANDS.items():
        parent, _, last = name.rpartition(" ")
        (groups[parent] if parent else app).command(last)(reporting(command))
    return app


def main() -> None:
    """Run the command line."""
    build_app()()
