"""`dit-sparse search`: from a model to a plan worth sharing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from dit_sparse.cli_options import AsJson, Backend, Device, Dtype, Frames, Height, Model, Quiet, Steps, Width

NOT_MET = 3


def search(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the plan; may exist.")] = Path("out/search"),
    model: Model = "bundled",
    gate: Annotated[
        str, typer.Option(help="What clips must keep to, against dense ones.")
    ] = "psnr_db>=25,worst_psnr_db>=20",
    minutes: Annotated[float | None, typer.Option(help="Limit of all of it. (default: none)")] = None,
    prompts: Annotated[Path | None, typer.Option(help="File of prompts to score on, one a line.")] = None,
    held_out: Annotated[Path | None, typer.Option(help="File of prompts to render, one a line.")] = None,
    seed: Annotated[list[int] | None, typer.Option(help="Seed of rendered clips. Repeatable. (default: 0)")] = None,
    steps: Steps = None,
    frames: Frames = None,
    height: Height = None,
    width: Width = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale. (default: the model's)")] = None,
    candidate: Annotated[
        list[str] | None, typer.Option(help="Pattern to choose from. Repeatable. (default: the patterns' suggestions)")
    ] = None,
    density: Annotated[list[float] | None, typer.Option(help="Density to offer it at. Repeatable.")] = None,
    step_edges: Annotated[
        str, typer.Option(help="Shares of the schedule at which a plan may change.")
    ] = "0,0.1,0.25,0.5,1",
    sensitivity: Annotated[
        bool | None, typer.Option(help="Render how much each part of the model matters. (default: if time allows)")
    ] = None,
    validate: Annotated[
        str | None, typer.Option(help="Do not search: hold this plan against the gate, at this size.")
    ] = None,
    trials: Annotated[int, typer.Option(help="Plans to render at most.")] = 8,
    batch: Annotated[int, typer.Option(help="Clips that are rendered, and priced, in one call.")] = 1,
    prices: Annotated[
        str, typer.Option(help="measured: time here. shipped, or a FILE of `bench prices`: predict for that GPU.")
    ] = "measured",
    against: Annotated[bool, typer.Option("--against", help="Render uniform patterns near the plan, too.")] = False,
    device: Device = None,
    dtype: Dtype = None,
    backend: Backend = "auto",
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Find the best pattern per step, layer and head for a measured error; write a plan, a model card and a report.

    Resumes what out/work holds of the same search. Exits 3 where the gate is not met or time is up.
    """
    from dit_sparse.pipelines.generate import default_device, default_dtype, load_pipeline
    from dit_sparse.search.console import library_prints_on_stderr, progress_on_stderr, stdout, table
    from dit_sparse.search.planner.report import HEADINGS as REPORT_HEADINGS
    from dit_sparse.search.planner.report import table_rows, verdict_line
    from dit_sparse.search.planner.request import read_edges, read_prompts
    from dit_sparse.search.planner.run import find_plan, make_search
    from dit_sparse.search.planner.validate import FILE, HEADINGS, rows, validate_plan, verdict
    from dit_sparse.spec import parse_spec

    texts = None if prompts is None else read_prompts(prompts)
    held_out_texts = None if held_out is None else read_prompts(held_out)
    where = device or default_device()
    with library_prints_on_stderr(), progress_on_stderr(quiet, remaining=True) as progress:
        progress("loading the model", 0, 1)
        pipe = load_pipeline(model, where, dtype or default_dtype(where))
        pipe.set_progress_bar_config(disable=True)
        clips: dict[str, Any] = {
            "held_out": held_out_texts, "seeds": tuple(seed or (0,)), "gate": gate, "minutes": minutes, "steps": steps,
            "frames": frames, "height": height, "width": width, "guidance": guidance, "batch": batch,
            "backend": backend,
        }  # fmt: skip
        if validate is not None:
            request = make_search(pipe, model, **clips)
            result = validate_plan(pipe, parse_spec(validate), request, out, progress)
        else:
            found = find_plan(
                pipe, out, prompts=texts, specs=candidate, densities=density,
                step_edges=read_edges(step_edges), sensitivity=sensitivity,
                most_trials=trials, prices=prices, against=against, model=model, progress=progress, **clips,
            )  # fmt: skip
            result = dict(found.report)
    if as_json:
        print(json.dumps(result, indent=2))
    else:
        console = stdout()
        headings, lines = (
            (HEADINGS, rows(result)) if validate is not None else (REPORT_HEADINGS, table_rows(result, True))
        )
        console.print(table(headings, lines))
        console.print(verdict(result) if validate is not None else verdict_line(result))
        for path in (out / FILE,) if validate is not None else found.files:
            console.print(str(path))
    if result["verdict"] != "met":
        raise typer.Exit(NOT_MET)
