"""The report of one comparison: checked against a versioned schema, as JSON, Markdown and a table."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dit_sparse.record import Summary
from dit_sparse.search.report_parts import check_schema, escape_markdown, markdown_table, number, seconds, times

SCHEMA = Path(__file__).with_name("report.schema.json")
HEADINGS = ("run", "seconds", "speed-up", "attention s", "attention speed-up", "computed density", "PSNR dB", "SSIM")

YARDSTICK_FIELDS = {"psnr_db": ".1f", "ssim": ".3f", "lpips": ".4f", "flicker": ".4f"}


def validate(report: Mapping[str, Any]) -> None:
    """Hold a report against search/report.schema.json.

    Raises:
        ValueError: names the place in the report and what the schema asks for there.
    """
    check_schema(report, SCHEMA)


def to_json(report: Mapping[str, Any]) -> str:
    """Serialise a valid report; the same report gives the same text."""
    validate(report)
    return json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def load_report(folder: str | Path) -> dict[str, Any]:
    """Read and check report.json of a results folder.

    Raises:
        FileNotFoundError: the folder holds no report.json.
        ValueError: it is not JSON, or not a report of a version that this code reads.
    """
    path = Path(folder) / "report.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; make a results folder with: dit-sparse compare --out {folder}")
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    try:
        validate(report)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return report


def measured_fields(summary: Summary) -> dict[str, Any] | None:
    """Return what monitoring measured, over all sparse calls and for each (layer, step, head), or None for nothing."""
    found = summary.to_dict()
    if found["measured"] is None:
        return None
    layers = [{"name": layer["name"], "calls": layer["measured"]} for layer in found["layers"]]
    return {**found["measured"], "lowest_at": list(found["measured"]["lowest_at"]), "layers": layers}


def table_rows(report: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Return one row of text for dense and for each plan, under HEADINGS."""
    dense = report["dense"]
    rows: list[tuple[str, ...]] = [
        ("dense", seconds(dense["seconds"]), "1.00×", seconds(dense["attention_seconds"]), "1.00×", "1", "–", "–")
    ]
    for run in report["sparse"]:
        metrics = run["metrics"]
        rows.append((
            run["name"],
            seconds(run["seconds"]),
            times(run["speedup"]),
            seconds(run["attention_seconds"]),
            times(run["attention_speedup"]),
            _density(run["computed_density"]),
            "identical" if metrics["identical"] else number(metrics["psnr_db"], ".1f"),
            number(metrics["ssim"], ".3f"),
        ))  # fmt: skip
    return rows


def summary_lines(report: Mapping[str, Any]) -> list[str]:
    """Say for each plan what it kept and skipped and what stayed dense, then the notes: for a terminal."""
    lines = []
    for run in report["sparse"]:
        kept = run["computed_density"]
        share = "nothing ran sparse" if kept is None else f"keep {kept['kept']:.1%} (skip {kept['skipped']:.1%})"
        why = "; ".join(f"{count} × {reason}" for reason, count in run["dense_reasons"].items()) or "none"
        lines.append(f"{run['name']}: {share}; calls that stayed dense: {why}")
    return lines + [f"note: {note}" for note in report["notes"]]


def to_markdown(report: Mapping[str, Any]) -> str:
    """Write the report for people: the table, densities, what stayed dense, the environment, the command."""
    request = report["request"]
    lines = [
        "# Dense against sparse", "",
        f"> {escape_markdown(request['prompt'])}", "",
        f"Model `{request['model']}` ({report['model']['pipeline']}, {report['model']['parameters'] / 1e6:.1f} M "
        f"transformer parameters), seed {request['seed']}, {request['steps']} steps, {request['dtype']} on "
        f"{request['device']}. {_grid(report['grid'])}", "",
        markdown_table(HEADINGS, table_rows(report)), "",
        f"Seconds are wall time of a whole generation; warm-up: {report['timing']['warm_up']}. "
        f"Attention seconds come from a separate pass over some steps ({_steps(report['timing'])}), scaled to all "
        "self-attention calls. PSNR and SSIM compare raw frames with the dense ones.", "",
        *_yardsticks(report.get("yardsticks") or {}),
        "## Density", "",
        "Fractions of query-key pairs among video tokens: `kept (skipped)`.", "",
        markdown_table(
            ("run", "density", "computed density", "run density", "LPIPS", "flicker", "warp error"),
            [(r["name"], _kept(r["density"]), _kept(r["computed_density"]), _kept(r["run_density"]),
              number(r["metrics"].get("lpips"), ".4f"), number(r["metrics"]["flicker"], ".4f"),
              number(r["metrics"]["warp_error"], "+.4f"))
             for r in report["sparse"]],
        ), "",
        "`density`: pairs attended in sparse calls; `computed density`: pairs in the blocks that the kernel reads; "
        "`run density`: with the dense steps and layers.", "",
        "## What stayed dense", "",
    ]  # fmt: skip
    for run in report["sparse"]:
        lines.append(
            f"- **{run['name']}** (`{run['spec']}`): {run['sparse_calls']} calls sparse, {run['dense_calls']} dense"
        )
        lines += [f"  - {count} × {escape_markdown(reason)}" for reason, count in run["dense_reasons"].items()]
    if monitored := [run for run in report["sparse"] if run.get("measured")]:
        lines += [
            "", "## Measured in each sparse call", "",
            "Sampled rows against exact attention, in a run of its own: a diagnostic of single calls. Neither recall "
            "nor the error of a call ranks plans by the quality of the clip.", "",
            markdown_table(
                ("run", "mean recall", "lowest recall (layer, step, head)", "mean output error"),
                [(run["name"], f"{found['recall']:.3f}",
                  f"{found['lowest_recall']:.3f} ({', '.join(map(str, found['lowest_at']))})", f"{found['error']:.3f}")
                 for run in monitored for found in (run["measured"],)],
            ),
        ]  # fmt: skip
    if report["notes"]:
        lines += ["", "## Notes", "", *(f"- {escape_markdown(note)}" for note in report["notes"])]
    lines += ["", "## Environment", "", *environment_lines(report["environment"])]
    lines += ["", "## Reproduce", "", "```", report["command"], "```", ""]
    return "\n".join(lines)


def environment_lines(environment: Mapping[str, Any]) -> list[str]:
    """Render an environment block as Markdown list items, nested objects one level deep."""
    lines = []
    for name, value in environment.items():
        if isinstance(value, Mapping):
            lines.append(f"- {name}:")
            lines += [f"  - {key}: {text}" for key, text in value.items()]
        else:
            lines.append(f"- {name}: {value if value is not None else '–'}")
    return lines


def _yardsticks(found: Mapping[str, Any]) -> list[str]:
    if not found:
        return []
    rows = [
        (name, *(number(metrics.get(field), form) for field, form in YARDSTICK_FIELDS.items()))
        for name, metrics in found.items()
    ]
    table = markdown_table(("clip", "PSNR dB", "SSIM", "LPIPS", "flicker"), rows)
    return ["## Yardsticks", "", "How far from the dense clip others are that are as good.", "", table, ""]


def _density(value: Mapping[str, float] | None) -> str:
    return "–" if value is None else f"{value['kept']:.3f}"


def _kept(value: Mapping[str, float] | None) -> str:
    return "–" if value is None else f"{value['kept']:.3f} ({value['skipped']:.3f})"


def _grid(grid: Mapping[str, int] | None) -> str:
    if grid is None:
        return "Grid unknown."
    axes = f"{grid['frames']}×{grid['height']}×{grid['width']}"
    return f"Grid {axes} (frames × rows × columns), {grid['tokens']:,} tokens."


def _steps(timing: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {steps}/{timing['steps']}" for name, steps in timing["attention_steps"].items())
