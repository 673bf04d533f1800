"""The report of a search: checked against a versioned schema, as JSON, Markdown, a table and one HTML page."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dit_sparse.search.planner.groups import StepGroups
from dit_sparse.search.planner.points import (
    Point,
    Report,
    by_speed,
    chosen_point,
    end_to_end,
    gate_line,
    gate_text,
    measured_speedup,
    price_errors,
    psnr_text,
    speedup,
)
from dit_sparse.search.planner.rivals import ABOUT, RIVAL_HEADINGS, rival_rows
from dit_sparse.search.report import environment_lines
from dit_sparse.search.report_parts import check_schema, escape_markdown, markdown_table, number, seconds, times

SCHEMA = Path(__file__).with_name("report.schema.json")
HEADINGS = (
    "plan", "kind", "attention speed-up", "predicted", "end to end", "density", "run density", "PSNR dB", "worst",
    "SSIM", "LPIPS", "gate",
)  # fmt: skip
METRICS = {"psnr_db": "PSNR, dB", "ssim": "SSIM", "flicker": "flicker", "warp_error": "warp error", "lpips": "LPIPS"}
PROMPT_CHARACTERS = 40
LIMIT = (
    "Figures of quality say how far a clip departs from the dense one of the same prompt and seed, not how good it "
    "looks; the yardsticks say how far clips depart that are equally good. Seconds are those of this machine."
)


def validate(report: Report) -> None:
    """Hold a report against search/planner/report.schema.json, and its numbers of points, prompts and groups.

    Raises:
        ValueError: names the place in the report and what is asked for there.
    """
    check_schema(report, SCHEMA)
    try:
        StepGroups(tuple(report["request"]["step_edges"]))
    except ValueError as error:
        raise ValueError(f"report/request/step_edges: {error}") from error
    for place, found, count, what in _references(report):
        if found >= count:
            raise ValueError(f"report{place} must be the number of one of {count} {what}, from 0, got {found}")


def to_json(report: Report) -> str:
    """Serialise a valid report; the same report gives the same text."""
    validate(report)
    return json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def to_html(report: Report, pictures: Mapping[str, bytes]) -> str:
    """Render one self-contained page. pictures: PNG bytes by the names in report["worst"].

    Raises:
        ValueError: the report is not valid, or a picture is missing or no PNG.
    """
    from dit_sparse.search.planner.page import render

    validate(report)
    return render(report, pictures)


def verdict_line(report: Report) -> str:
    """Say in one line whether the gate was met, and what the chosen point bought and cost."""
    verdict = {"met": "gate met", "not met": "gate not met", "unverified": "gate unverified"}[report["verdict"]]
    why = " ".join(report["why"].split())
    point = chosen_point(report)
    if point is None:
        return f"{verdict}: nothing chosen; {why}"
    found, how = speedup(report, point)
    told = f"{verdict}: {'predicted ' * (how == 'predicted')}{found:.2f}x attention"
    whole = end_to_end(report, point)
    told += "" if whole is None else f" ({whole:.2f}x end to end)"
    measured = point["measured"]
    if measured is None:
        told += ", nothing rendered"
    elif measured["identical"]:
        told += ", identical to dense"
    else:
        prompt = _short(report, measured["worst_prompt"])
        told += f' at {psnr_text(point)} dB, worst prompt {measured["worst_prompt"] + 1} "{prompt}" '
        told += f"{psnr_text(point, 'worst')} dB"
    return told if report["verdict"] == "met" else f"{told}; {why}"


def table_rows(report: Report, rendered: bool = False) -> list[tuple[str, ...]]:
    """Return one row of text for each point under HEADINGS, the fastest first; attention speed-ups are measured.

    rendered: only those that were rendered, and the chosen one.
    """
    chosen = chosen_point(report)
    shown = [point for point in by_speed(report) if not rendered or point["measured"] or point is chosen]
    return [_row(report, point, point is chosen) for point in shown]


def kept_text(density: float) -> str:
    """Write a density as what is kept and skipped."""
    return f"keeps {100 * density:.1f} %, skips {100 * (1 - density):.1f} %"


def group_name(report: Report, group: int) -> str:
    """Write a step group as its window of the schedule."""
    start, end = report["request"]["step_edges"][group : group + 2]
    return f"{100 * start:.4g}–{100 * end:.4g} %"


def group_densities(report: Report) -> dict[str, list[float | None]]:
    """Return for each transformer the mean density of all its heads in each step group, None where it is not called."""
    groups = len(report["request"]["step_edges"]) - 1
    heads: dict[str, list[list[float]]] = {}
    for unit in report["map"]:
        of = heads.setdefault(unit["transformer"], [[] for _ in range(groups)])
        of[unit["group"]] += [head["density"] for head in unit["heads"]]
    return {name: [sum(one) / len(one) if one else None for one in of] for name, of in heads.items()}


def spread_rows(point: Point) -> list[tuple[str, ...]]:
    """Return for each metric of a rendered point its mean, 95 % interval and worst as text."""
    interval = _interval(point["measured"]["psnr_db"], ".1f")
    rows: list[tuple[str, ...]] = [("PSNR, dB", psnr_text(point), interval, psnr_text(point, "worst"))]
    for name, label in METRICS.items():
        spread = point["measured"][name]
        if name != "psnr_db" and spread is not None:
            mean, worst = number(spread["mean"], ".4f"), number(spread["worst"], ".4f")
            rows.append((label, mean, _interval(spread, ".4f"), worst))
    return rows


def yardstick_rows(report: Report) -> list[tuple[str, ...]]:
    """Return for each yardstick what differs, PSNR, SSIM and LPIPS as text."""
    return [
        (name, "identical" if found["psnr_db"] is None else f"{found['psnr_db']:.1f}",
         number(found["ssim"], ".3f"), number(found.get("lpips"), ".3f"))
        for name, found in report["yardsticks"].items()
    ]  # fmt: skip


def to_markdown(report: Report) -> str:
    """Write the report for people: verdict, points, what the plan does, how it was checked, the command."""
    request, point, (above, gate) = report["request"], chosen_point(report), gate_line(report)
    rows = [tuple(map(escape_markdown, row)) for row in table_rows(report)]
    rows.insert(above, (f"*{escape_markdown(gate)}*", *[""] * (len(HEADINGS) - 1)))
    lines = [
        "# Search for a sparse plan", "",
        f"**{escape_markdown(verdict_line(report))}**", "",
        f"{escape_markdown(report['why'])}", "",
        f"Model {escape_markdown(request['model'])} ({escape_markdown(report['model']['pipeline'])}, "
        f"{report['model']['parameters'] / 1e6:.1f} M transformer parameters). "
        f"Gate: {escape_markdown(gate_text(report))}.", "",
    ]  # fmt: skip
    if point is not None:
        lines += [f"Chosen: **{escape_markdown(point['name'])}**, which {kept_text(point['density'])} of the pairs in "
                  f"sparse calls; over the whole run it {kept_text(point['run_density'])}.", ""]  # fmt: skip
    lines += ["## Points", "", markdown_table(HEADINGS, rows), "", LIMIT, ""]
    if point is not None and point["measured"] is not None:
        spreads = markdown_table(("metric", "mean", "95 % interval of the mean", "worst"), spread_rows(point))
        lines += ["## The chosen plan on held-out prompts", "", spreads, ""]
    if against := rival_rows(report):
        cells = [tuple(map(escape_markdown, row)) for row in against]
        lines += ["## Against uniform patterns", "", ABOUT, "", markdown_table(RIVAL_HEADINGS, cells), ""]
    if yardsticks := yardstick_rows(report):
        lines += ["## Yardsticks", "", markdown_table(("what differs", "PSNR dB", "SSIM", "LPIPS"), yardsticks), ""]
    if densities := group_densities(report):
        names = [group_name(report, group) for group in range(len(request["step_edges"]) - 1)]
        shares = [(escape_markdown(name), *(number(d, ".3f") for d in of)) for name, of in densities.items()]
        lines += ["## Mean density by share of the schedule", "", markdown_table(("transformer", *names), shares), ""]
    lines += ["## How", ""]
    lines += [f"- {name}: {escape_markdown(text)}" for name, text in facts(report)]
    lines += ["", "## Held-out prompts", ""]
    lines += [f"{i}. {escape_markdown(prompt)}" for i, prompt in enumerate(request["held_out_prompts"], 1)]
    if report["notes"]:
        lines += ["", "## Notes", "", *(f"- {escape_markdown(note)}" for note in report["notes"])]
    lines += ["", "## Environment", "", *environment_lines(report["environment"])]
    lines += ["", "## Reproduce", "", "```", report["command"], "```", ""]
    return "\n".join(lines)


def facts(report: Report) -> list[tuple[str, str]]:
    """Return what a reader needs to know of the request and the way it was answered, (name, text)."""
    request, job, grid, prices = report["request"], report["request"]["job"], report["grid"], report["prices"]
    size = " × ".join(str(job[axis] or "default") for axis in ("frames", "height", "width"))
    place = "unknown"
    if grid is not None:
        place = f"{grid['frames']} × {grid['height']} × {grid['width']} (frames × rows × columns), "
        place += f"{grid['tokens']:,} tokens with text"
    aims = [f"at {what.replace('_', ' ')} {times(request[key])}" for key, what in
            (("max_speedup", "most"), ("target_speedup", "least")) if request.get(key) is not None]  # fmt: skip
    took = {name.removesuffix("_s"): value for name, value in report["timing"].items() if value is not None}
    shipped = ": predictions, not measured on this machine" if prices["shipped"] else ""
    return [
        ("created", report["created"]),
        ("transformers", ", ".join(report["model"]["transformers"])),
        ("job", f"{job['steps'] or 'default'} steps, {size}, guidance {number(job['guidance'], 'g')}"),
        ("grid", place),
        ("gate", ", ".join([gate_text(report), *aims])),
        ("seeds", ", ".join(map(str, request["seeds"]))),
        ("calibration prompts", str(len(request["calibration_prompts"]))),
        ("candidates", ", ".join(request["specs"] or ["what the patterns suggest"])),
        ("at densities", ", ".join(f"{density:g}" for density in request["densities"])),
        ("backend", request["backend"]),
        ("budget", "none" if request["minutes"] is None else f"{request['minutes']:g} minutes"),
        ("prices", prices["where"] + shipped + _errors(price_errors(report))),
        ("search took", ", ".join(f"{name} {seconds(value)} s" for name, value in took.items()) or "–"),
    ]  # fmt: skip


def _row(report: Report, point: Point, chosen: bool) -> tuple[str, ...]:
    measured = point["measured"]
    spreads = [measured and measured[name] for name in ("ssim", "lpips")]
    return (
        point["name"] + " (chosen)" * chosen,
        point["kind"],
        times(measured_speedup(report, point)),
        times(point["predicted_speedup"]),
        times(end_to_end(report, point)),
        f"{point['density']:.3f}",
        f"{point['run_density']:.3f}",
        psnr_text(point),
        psnr_text(point, "worst"),
        *(number(spread and spread["mean"], ".3f") for spread in spreads),
        "not rendered" if measured is None else "passes" if measured["passes"] else "fails",
    )


def _errors(errors: list[float]) -> str:
    if not errors:
        return ""
    return f"; predicted attention was {100 * min(errors):+.1f} to {100 * max(errors):+.1f} % off in {len(errors)} runs"


def _interval(spread: Mapping[str, Any] | None, form: str) -> str:
    if spread is None or spread["low"] is None or spread["high"] is None:
        return "–"
    return f"{spread['low']:{form}} to {spread['high']:{form}}"


def _short(report: Report, prompt: int) -> str:
    return textwrap.shorten(report["request"]["held_out_prompts"][prompt], PROMPT_CHARACTERS, placeholder=" …")


def _references(report: Report) -> Iterator[tuple[str, int, int, str]]:
    """Yield every number that names something elsewhere in a report: its place, itself, of how many, of what."""
    prompts = len(report["request"]["held_out_prompts"])
    if report["chosen"] is not None:
        yield "/chosen", report["chosen"], len(report["points"]), "points"
    for i, point in enumerate(report["points"]):
        if point["measured"] is None:
            continue
        yield f"/points/{i}/measured/worst_prompt", point["measured"]["worst_prompt"], prompts, "held-out prompts"
        for j, clip in enumerate(point["measured"]["clips"]):
            yield f"/points/{i}/measured/clips/{j}/prompt", clip["prompt"], prompts, "held-out prompts"
    groups = len(report["request"]["step_edges"]) - 1
    for i, unit in enumerate(report["map"]):
        yield f"/map/{i}/group", unit["group"], groups, "step groups"
    by_group = report["sensitivity"]["by_group"] or []
    yield "/sensitivity/by_group", max(0, len(by_group) - 1), groups, "step groups"
