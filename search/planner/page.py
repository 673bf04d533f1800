"""The HTML page of a search report: what its template shows, made from the report."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dit_sparse.search.heads_map import COLOURS, Cell, draw, kind_of, kinds_of, shade_names, shade_of
from dit_sparse.search.planner.charts import pareto
from dit_sparse.search.planner.points import (
    Report,
    by_speed,
    chosen_point,
    end_to_end,
    gate_line,
    psnr_db,
    psnr_text,
    speedup,
)
from dit_sparse.search.planner.report import (
    HEADINGS,
    LIMIT,
    METRICS,
    facts,
    group_densities,
    group_name,
    kept_text,
    spread_rows,
    table_rows,
    verdict_line,
    yardstick_rows,
)
from dit_sparse.search.planner.rivals import ABOUT, RIVAL_HEADINGS, rival_rows
from dit_sparse.search.report_parts import number, seconds, times

TEMPLATE = Path(__file__).with_name("report.html")
PNG = b"\x89PNG\r\n\x1a\n"
CHUNK = 5  # layers in a row of the sensitivity table


def render(report: Report, pictures: Mapping[str, bytes]) -> str:
    """Fill the template with a valid report.

    Raises:
        ValueError: a picture is missing or no PNG.
    """
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    above, gate = gate_line(report)
    point = chosen_point(report)
    shown = {
        "report": report,
        "verdict": verdict_line(report),
        "why": " ".join(report["why"].split()),
        "tiles": _tiles(report),
        "chart": Markup(pareto(report)),  # our own drawing; the only text in it is numbers and fixed words
        "headings": ("#", *HEADINGS),
        "rows": [(str(i), *row) for i, row in enumerate(table_rows(report), 1)],
        "specs": [one["spec"] for one in by_speed(report)],
        "chosen_row": None if point is None else [one is point for one in by_speed(report)].index(True),
        "gate_after": above,
        "gate": gate,
        "yardsticks": yardstick_rows(report),
        "rival_headings": RIVAL_HEADINGS,
        "rivals": rival_rows(report),
        "about_rivals": ABOUT,
        "limit": LIMIT,
        "spreads": spread_rows(point) if point and point["measured"] else [],
        "metrics": METRICS,
        "clips": _clips(report),
        "maps": _maps(report),
        "legend": kinds_of([head["pattern"] for unit in report["map"] for head in unit["heads"]]),
        "colours": COLOURS,
        "shades": shade_names(),
        "strips": _strips(report),
        "dense_share": _dense_share(report),
        "bars": _bars(report),
        "worst": [_worst(one, pictures) for one in report["worst"]],
        "by_group": _by_group(report),
        "by_layer": {name: _chunks(values) for name, values in (report["sensitivity"]["by_layer"] or {}).items()},
        "facts": facts(report),
    }
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(shown)


def _tiles(report: Report) -> list[tuple[str, str, str]]:
    """Return the headline's figures: label, figure, what it is."""
    point = chosen_point(report)
    if point is None:
        return [("chosen", "nothing", "the model runs dense")]
    found, how = speedup(report, point)
    whole, measured = end_to_end(report, point), point["measured"]
    clip = "not rendered"
    spread = "not rendered"
    if measured is not None:
        clip = f"prompt {measured['worst_prompt'] + 1}, seed {measured['worst_seed']}"
        low, high = psnr_db(point, "low"), psnr_db(point, "high")
        spread = "against dense" if low is None or high is None else f"95 %: {low:.1f} to {high:.1f}"
    dense = report["dense"]["seconds"]
    runs = "not timed" if whole is None else f"{seconds(dense)} s → {seconds(measured['seconds'])} s"
    return [
        ("attention", times(found), how),
        ("end to end", times(whole), runs),
        ("PSNR, dB, mean", psnr_text(point), spread),
        ("PSNR, dB, worst", psnr_text(point, "worst"), clip),
        ("density kept", f"{100 * point['density']:.1f} %",
         f"skips {100 * (1 - point['density']):.1f} % in sparse calls; the run {kept_text(point['run_density'])}"),
    ]  # fmt: skip


def _clips(report: Report) -> list[tuple[str, ...]]:
    """Return each clip of the chosen point, the farthest from dense first."""
    point = chosen_point(report)
    clips = point["measured"]["clips"] if point and point["measured"] else []
    ordered = sorted(clips, key=lambda clip: (clip["psnr_db"] is None, clip["psnr_db"] or 0.0))
    return [
        (str(clip["prompt"] + 1), str(clip["seed"]),
         "identical" if clip["psnr_db"] is None else f"{clip['psnr_db']:.1f}",
         *(number(clip[name], ".4f") for name in METRICS if name != "psnr_db"))
        for clip in ordered
    ]  # fmt: skip


def _maps(report: Report) -> list[dict[str, Any]]:
    """Return for each transformer and step group its window and the drawing of its heads."""
    from markupsafe import Markup

    places = sorted({(unit["transformer"], unit["group"]) for unit in report["map"]})
    found = []
    for transformer, group in places:
        units = [unit for unit in report["map"] if (unit["transformer"], unit["group"]) == (transformer, group)]
        units.sort(key=lambda unit: unit["layer"])
        rows = [
            (unit["layer"], [_cell(unit["layer"], i, head) for i, head in enumerate(unit["heads"])]) for unit in units
        ]
        window = group_name(report, group)
        svg = Markup(draw(rows, f"{transformer}, steps {window}"))  # which escapes what it is given
        found.append({"transformer": transformer, "window": window, "svg": svg})
    return found


def _cell(layer: int, number_of_head: int, head: Mapping[str, Any]) -> Cell:
    told = f"layer {layer}, head {number_of_head}: {head['pattern']}, density {head['density']:.3f}"
    told += f", recall {number(head['recall'], '.3f')}, error {number(head['error'], '.3g')}"
    return Cell(head["density"], kind_of(head["pattern"])[0], told)


def _strips(report: Report) -> list[dict[str, Any]]:
    """Return for each transformer the step groups: share of the schedule, window, shade and mean density or None."""
    edges = report["request"]["step_edges"]
    return [
        {
            "transformer": name,
            "parts": [
                (100 * (edges[group + 1] - edges[group]), group_name(report, group),
                 None if mean is None else shade_of(min(mean, 1.0)), mean)
                for group, mean in enumerate(means)
            ],
        }
        for name, means in group_densities(report).items()
    ]  # fmt: skip


def _dense_share(report: Report) -> float:
    """Return the share of the schedule in which every head of every called transformer is dense."""
    edges = report["request"]["step_edges"]
    called = [
        [mean for mean in means if mean is not None] for means in zip(*group_densities(report).values(), strict=True)
    ]
    dense = [bool(means) and min(means) >= 1.0 for means in called]
    return sum(edges[group + 1] - edges[group] for group, all_of in enumerate(dense) if all_of)


def _bars(report: Report) -> dict[str, Any]:
    """Return the bars of seconds: name, [(part, seconds, percent of the longest bar)]; predicted where not timed."""
    dense, point = report["dense"], chosen_point(report)
    measured = None if point is None else point["measured"]
    timed = dense["seconds"] is not None and (point is None or measured is not None)
    runs: list[tuple[str, list[tuple[str, float]]]]
    if timed:
        runs = [("dense", _parts(dense["seconds"], dense["attention_seconds"]))]
        if measured is not None:
            runs.append(("chosen", _parts(measured["seconds"], measured["attention_seconds"])))
    else:
        runs = [("dense", [("attention", dense["attention_ms"] / 1000)])]
        if point is not None:
            runs.append(("chosen", [("attention", point["predicted_ms"] / 1000)]))
    longest = max(sum(value for _, value in parts) for _, parts in runs)
    rows = [(name, [(part, value, 100 * value / (longest or 1.0)) for part, value in parts]) for name, parts in runs]
    return {"timed": timed, "rows": rows}


def _parts(whole: float, attention: float | None) -> list[tuple[str, float]]:
    if attention is None:
        return [("whole run", whole)]
    return [("attention", attention), ("rest", max(whole - attention, 0.0))]


def _worst(one: Mapping[str, Any], pictures: Mapping[str, bytes]) -> dict[str, Any]:
    shown = []
    for label, name in one["pictures"]:
        data = pictures.get(name)
        if data is None or not data.startswith(PNG):
            what = "is not among the pictures" if data is None else "is no PNG"
            raise ValueError(f"picture {name!r} of the report's worst prompts {what}; known: {', '.join(pictures)}")
        shown.append((label, "data:image/png;base64," + base64.b64encode(data).decode("ascii")))
    return {**one, "pictures": shown}


def _by_group(report: Report) -> list[tuple[str, str]]:
    values = report["sensitivity"]["by_group"] or []
    return [(group_name(report, group), f"{value:.3g}") for group, value in enumerate(values)]


def _chunks(values: list[float]) -> list[tuple[str, list[str]]]:
    """Return rows of a few layers each: which, their values as text."""
    starts = range(0, len(values), CHUNK)
    rows = [(start, values[start : start + CHUNK]) for start in starts]
    return [(f"{start}–{start + len(some) - 1}", [f"{value:.3g}" for value in some]) for start, some in rows]
