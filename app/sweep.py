"""One prompt over several plans: the table, the Pareto plot and a report that stands alone."""

from __future__ import annotations

import base64
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dit_sparse.app.axes import (
    ACCENT,
    BOTTOM,
    FONT,
    HEIGHT,
    LEFT,
    RIGHT,
    SECOND,
    TOP,
    WIDTH,
    Scale,
    axes,
    chart,
    line,
    mark,
    polyline,
    text,
    text_width,
)
from dit_sparse.app.stored import Report, Run
from dit_sparse.search.planner.points import front
from dit_sparse.search.report import HEADINGS as COMPARISON_HEADINGS
from dit_sparse.search.report import summary_lines, table_rows
from dit_sparse.search.report_parts import times
from dit_sparse.search.staging import write_text

TEMPLATE = Path(__file__).with_name("sweep.html")
HEADINGS = (*COMPARISON_HEADINGS, "not dominated")
MOST_LETTERS = 26  # of a plan's name in the plot; all of it is told by its point
EMPTY_LEVEL_DB, LEAST_ROOM_DB = 40.0, 3.0
BEAD = 3.0  # pixels: lines are strings of beads to the labels that keep clear of them
Line = tuple[tuple[float, float], tuple[float, float]]
# What may be plotted across: field of a run, what it is, whether more is better.
ACROSS = {
    "attention": ("attention_speedup", "speed-up of attention over dense", True),
    "whole": ("speedup", "speed-up of the whole run over dense", True),
    "seconds": ("seconds", "seconds of the whole run", False),
}


@dataclass(frozen=True)
class Point:
    """Place a run: speed or seconds across, PSNR against dense upwards, infinite where the clips are identical."""

    name: str
    across: float
    psnr_db: float


def points_of(report: Report, by: str = "attention") -> tuple[list[Point], list[str]]:
    """Return dense and the plans as points, and the names of those of which `by` was not measured.

    Raises:
        ValueError: `by` is no key of ACROSS.
    """
    if by not in ACROSS:
        raise ValueError(f"by must be one of {', '.join(ACROSS)}, got {by!r}")
    field = ACROSS[by][0]
    dense = report["dense"]["seconds"] if by == "seconds" else 1.0
    found = [Point("dense", float(dense), math.inf)]
    timed = [run for run in report["sparse"] if run[field] is not None]
    found += [Point(run["name"], float(run[field]), _psnr_db(run)) for run in timed]
    return found, [run["name"] for run in report["sparse"] if run[field] is None]


def not_dominated(points: Sequence[Point], by: str = "attention") -> list[Point]:
    """Return the points than which no other is both faster and nearer to dense, from the slowest to the fastest."""
    sign = 1 if ACROSS[by][2] else -1
    return [points[i] for i in front([(sign * point.across, point.psnr_db) for point in points])]


def sweep_rows(report: Report, by: str = "attention") -> list[tuple[str, ...]]:
    """Return rows of text under HEADINGS, the fastest first; the last column says which plans no other one beats.

    Raises:
        ValueError: `by` is no key of ACROSS.
    """
    points, _ = points_of(report, by)
    best = {point.name for point in not_dominated(points, by)}
    sign = -1 if ACROSS[by][2] else 1
    place = {point.name: sign * point.across for point in points}
    rows = sorted(table_rows(report), key=lambda row: place.get(row[0], math.inf))
    return [(*row, "yes" if row[0] in best else "unknown" if row[0] not in place else "no") for row in rows]


def pareto(report: Report, by: str = "attention") -> str:
    """Draw every plan by its speed and its PSNR as SVG, the front linked, with lines for dense and for identical.

    Raises:
        ValueError: `by` is no key of ACROSS.
    """
    points, missing = points_of(report, by)
    best = not_dominated(points, by)
    finite = [point.psnr_db for point in points if point.psnr_db < math.inf]
    room = max(LEAST_ROOM_DB, 0.15 * (max(finite) - min(finite))) if finite else 0.0
    top = max(finite) + room if finite else EMPTY_LEVEL_DB
    across = Scale.around([point.across for point in points], LEFT, WIDTH - RIGHT, margin=0.15)
    up = Scale.around([*finite, top, *([] if finite else [top - LEAST_ROOM_DB])], HEIGHT - BOTTOM, TOP)
    places = {point: (across.at(point.across), up.at(min(point.psnr_db, top))) for point in points}
    dense_x, identical_y = places[points[0]]
    link = [places[point] for point in best]
    parts = axes(across, up, ACROSS[by][1], "PSNR against dense, dB")
    parts += [
        line(LEFT, identical_y, WIDTH - RIGHT, identical_y, dash="2 4"),
        line(dense_x, HEIGHT - BOTTOM, dense_x, TOP, dash="2 4"),
        text(WIDTH - RIGHT, identical_y - 6, "identical to dense", anchor="end"),
        polyline(link, SECOND),
    ]
    for point in points:
        colour = ACCENT if point in best else SECOND
        parts.append(mark(*places[point], _told(point, by), colour, filled=point in best))
    named = [(_shortened(point.name), *places[point]) for point in points]
    lines = [*itertools.pairwise(link), ((dense_x, float(TOP)), (dense_x, float(HEIGHT - BOTTOM))),
             ((float(LEFT), identical_y), (float(WIDTH - RIGHT), identical_y))]  # fmt: skip
    parts += [text(x, y, words) for words, x, y in _labels(named, identical_y, lines)]
    if missing:
        parts.append(text(LEFT, HEIGHT + FONT, f"not shown, not measured: {', '.join(map(_shortened, missing))}"))
    told = "; ".join(_told(point, by) for point in points)
    description = f"{told}. Not dominated: {', '.join(point.name for point in best)}."
    title = f"Quality of each plan by its {ACROSS[by][1]}"
    return chart(title, description, parts, HEIGHT + (2 * FONT if missing else 0))


def sweep_page(report: Report, folder: Path) -> str:
    """Return a page with the table, the plots, the first frames and all that is needed to repeat the sweep.

    It asks the network for nothing. The frames are those of `folder`/stills.png, left out where there is none.
    """
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    stills = folder / "stills.png"
    charts = [by for by in ("attention", "whole") if len(points_of(report, by)[0]) > 1]
    shown = {
        "report": report,
        "headline": headline(report),
        "charts": [(ACROSS[by][1], Markup(pareto(report, by))) for by in charts],  # which escapes every name
        "headings": HEADINGS,
        "rows": sweep_rows(report),
        "lines": summary_lines({**report, "notes": []}),
        "stills": base64.b64encode(stills.read_bytes()).decode("ascii") if stills.is_file() else None,
    }
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(shown)


def write_sweep(report: Report, folder: Path, path: Path) -> None:
    """Write `sweep_page` to a file in one step."""
    write_text(path, sweep_page(report, folder))


def headline(report: Report) -> str:
    """Say in a line which plan is the fastest and which comes nearest to dense."""
    runs = report["sparse"]
    fastest = min(runs, key=lambda run: run["seconds"])
    nearest = max(runs, key=_psnr_db)
    close = "identical to dense" if nearest["metrics"]["identical"] else f"{_psnr_db(nearest):.1f} dB"
    faster = f"{fastest['name']} is the fastest ({times(fastest['speedup'])} over dense)"
    nearer = "the nearest to dense" if nearest is fastest else f"{nearest['name']} the nearest to dense"
    return f"{len(runs)} plan{'s' * (len(runs) > 1)}: {faster} and {nearer} ({close})."


def _psnr_db(run: Run) -> float:
    metrics = run["metrics"]
    return math.inf if metrics["identical"] or metrics["psnr_db"] is None else float(metrics["psnr_db"])


def _told(point: Point, by: str) -> str:
    value = f"{point.across:.2f} s" if by == "seconds" else times(point.across)
    close = "identical to dense" if point.psnr_db == math.inf else f"PSNR {point.psnr_db:.1f} dB"
    return f"{point.name}: {value}, {close}" if point.name != "dense" else f"dense: {value}"


def _shortened(name: str) -> str:
    return name if len(name) <= MOST_LETTERS else f"{name[: MOST_LETTERS - 1]}…"


def _labels(
    named: Sequence[tuple[str, float, float]], identical_y: float, lines: Sequence[Line]
) -> list[tuple[str, float, float]]:
    """Place a label beside each point: where it covers least of points, lines and other words."""
    taken = [(x - 6, y - 6, x + 6, y + 6) for _, x, y in named]
    for (x, y), (u, v) in lines:
        count = max(1, math.ceil(math.hypot(u - x, v - y) / BEAD))
        beads = [(x + (u - x) * i / count, y + (v - y) * i / count) for i in range(count + 1)]
        taken += [(cx - BEAD / 2, cy - BEAD / 2, cx + BEAD / 2, cy + BEAD / 2) for cx, cy in beads]
    words_of_line = "identical to dense"
    taken.append((WIDTH - RIGHT - text_width(words_of_line), identical_y - 6 - FONT, WIDTH - RIGHT, identical_y - 4))
    placed = []
    for words, x, y in named:
        width = text_width(words)
        offsets: list[tuple[float, float]] = [(9, 4), (-9 - width, 4), (-width / 2, -10), (-width / 2, 20)]
        for down in (1.0, -1.0, 1.5, -1.5, 2.5, -2.5, 3.5, -3.5):
            offsets += [(9, 4 + FONT * down), (-9 - width, 4 + FONT * down)]
        boxes = [(x + dx, y + dy - FONT, x + dx + width, y + dy + 3) for dx, dy in offsets]
        inside = [box for box in boxes if box[0] >= LEFT and box[2] <= WIDTH and box[1] >= 0 and box[3] <= HEIGHT]
        box = min(inside or boxes, key=lambda box: sum(_overlap(box, other) for other in taken))
        taken.append(box)
        placed.append((words, box[0], box[3] - 3))
    return placed


def _overlap(one: tuple[float, float, float, float], other: tuple[float, float, float, float]) -> float:
    across = min(one[2], other[2]) - max(one[0], other[0])
    down = min(one[3], other[3]) - max(one[1], other[1])
    return max(across, 0.0) * max(down, 0.0)
