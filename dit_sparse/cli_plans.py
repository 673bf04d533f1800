"""The commands `dit-sparse plans ...`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from dit_sparse.cli_options import AsJson


def plans_list() -> None:
    """List presets and patterns with their options."""
    from dit_sparse.search.plans import list_specs

    print("\n".join(list_specs()))


def plans_show(
    spec: Annotated[str, typer.Argument(help="Preset, pattern, plan file or hub id.")],
    grid: Annotated[str, typer.Option(help="Token grid, frames x rows x columns, with text 13x24x32+77.")] = "17x16x16",
    png: Annotated[Path | None, typer.Option(help="Draw the blocks of the first pattern that is not dense.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show a plan's rules and what each pattern keeps on a grid."""
    from dit_sparse.search.plans import describe, draw, parse_grid

    tokens = parse_grid(grid)
    found = describe(spec, tokens)
    if png is not None:
        draw(spec, tokens, png)
    print(json.dumps(found["plan"], indent=2) if as_json else "\n".join(found["lines"]))
    if png is not None:
        print(png)


def plans_diff(
    a: Annotated[str, typer.Argument(help="Preset, pattern, plan file or hub id.")],
    b: Annotated[str, typer.Argument(help="The same.")],
    layers: Annotated[int | None, typer.Option(help="Layers compared. (default: of the plans' model)")] = None,
    heads: Annotated[int | None, typer.Option(help="Heads compared. (default: of the plans' model)")] = None,
    as_json: AsJson = False,
) -> None:
    """Show the rules that differ, and the calls that get another pattern."""
    from dit_sparse.search.plan_diff import diff_plans, difference_lines
    from dit_sparse.spec import parse_spec

    found = diff_plans(parse_spec(a), parse_spec(b), layers, heads)
    print(json.dumps(found.to_dict(), indent=2) if as_json else "\n".join(difference_lines(found)))


def plans_convert(
    source: Annotated[str, typer.Option("--from", help="sta: a mask_strategy JSON; radial: flags, or a JSON of them.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Plan folder; may exist.")],
    file: Annotated[Path | None, typer.Argument(help="The JSON file; radial may do without.")] = None,
    grid: Annotated[str | None, typer.Option(help="sta: the file's token grid, e.g. 30x48x80.")] = None,
    transformer: Annotated[str | None, typer.Option(help="sta: class to bind the plan to.")] = None,
    dense_layers: Annotated[int | None, typer.Option(help="radial: first layers kept dense.")] = None,
    dense_timesteps: Annotated[int | None, typer.Option(help="radial: first steps kept dense.")] = None,
    decay_factor: Annotated[float | None, typer.Option(help="radial: narrows windows beyond next frames.")] = None,
    steps: Annotated[int | None, typer.Option(help="radial: denoising steps (num_inference_steps).")] = None,
    model_type: Annotated[str | None, typer.Option(help="radial: wan or hunyuan.")] = None,
) -> None:
    """Make a plan folder from the settings of another project: STA or Radial Attention."""
    from dit_sparse.search.convert import convert

    flags = {
        "dense_layers": dense_layers,
        "dense_timesteps": dense_timesteps,
        "decay_factor": decay_factor,
        "num_inference_steps": steps,
        "model_type": model_type,
    }
    given = {flag: value for flag, value in flags.items() if value is not None}
    print("\n".join(map(str, convert(source, file, out, grid, transformer, given))))


def plans_push(
    folder: Annotated[Path, typer.Argument(help="Plan folder.")],
    repo_id: Annotated[str, typer.Argument(help="user/repo on the Hugging Face hub; made if needed.")],
    private: Annotated[bool, typer.Option("--private", help="Refuse a repository that others can see.")] = False,
) -> None:
    """Send a plan folder to the hub: plan.json, README.md and its report, nothing else."""
    from dit_sparse.search.hub import push_plan

    address, files = push_plan(folder, repo_id, private)
    print(f"{address}: {', '.join(files)}")


def plans_pull(
    repo_id: Annotated[str, typer.Argument(help="user/repo on the Hugging Face hub.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder; may exist. (default: repo's name)")] = None,
) -> None:
    """Fetch a plan from the hub: plan.json and README.md, checked before they are put in place."""
    from dit_sparse.search.hub import pull_plan

    print("\n".join(map(str, pull_plan(repo_id, out or Path(repo_id.rpartition("/")[2])))))
