"""The Pareto plot of a search report as inline SVG: text stays text, the same report gives the same bytes."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dit_sparse.search.planner.points import Report, by_speed, chosen_point, front, measured_speedup, psnr_db

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Each is told from both a white and a black page.
GREY, GATE, RING = "#888888", "#d62728", "#e377c2"
KINDS = {"searched": ("o", "#2f8fd0"), "uniform": ("s", "#e08a1e")}  # kind: mark, colour
YARDSTICKS = {"another seed": ":", "another dense kernel": "-."}
WIDTH_INCHES, PANEL_INCHES, LEGEND_INCHES = 4.6, 3.0, 1.0
SETTINGS: Any = {
    "svg.fonttype": "none", "svg.hashsalt": "dit-sparse", "font.size": 9, "text.color": GREY, "axes.edgecolor": GREY,
    "axes.labelcolor": GREY, "xtick.color": GREY, "ytick.color": GREY, "axes.spines.top": False,
    "axes.spines.right": False
}  # fmt: skip
MOST_NUMBERED = 12
EMPTY_LEVEL_DB, LEVEL_GAP = 40.0, 0.08


@dataclass(frozen=True)
class Mark:
    """Place a point: its number in the table, x and y, how far the 95 % interval goes to both sides (0: unknown)."""

    number: int
    kind: str
    x: float
    y: float
    chosen: bool
    interval: tuple[float, float] = (0.0, 0.0)


def pareto(report: Report) -> str:
    """Draw every point: those that were rendered by PSNR; all of them by predicted loss where some were not.

    Returns an empty text where there is no point.
    """
    import matplotlib
    from matplotlib.figure import Figure

    rendered = any(point["measured"] for point in report["points"])
    missing = any(not point["measured"] for point in report["points"])
    panels = rendered + missing
    if not panels:
        return ""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # a reader's own settings change nothing
        matplotlib.rcParams.update(SETTINGS)
        height = PANEL_INCHES * panels + LEGEND_INCHES
        figure = Figure(figsize=(WIDTH_INCHES, height), layout="constrained")
        axes = list(figure.subplots(panels, 1, squeeze=False)[:, 0])
        if rendered:
            _draw_quality(axes[0], report)
        if missing:
            _draw_loss(axes[-1], report)
        shown = [pair for one in axes for pair in zip(*one.get_legend_handles_labels(), strict=True)]
        unique = {label: handle for handle, label in shown}
        figure.legend(unique.values(), unique.keys(), loc="outside lower center", ncols=2, frameon=False, fontsize=8)
        file = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    return _inline(file.getvalue())


def _draw_quality(axes: Axes, report: Report) -> None:
    """Draw the rendered points, their intervals, the gate and the yardsticks."""
    chosen = chosen_point(report)
    shown = [(number, point) for number, point in enumerate(by_speed(report), 1) if point["measured"]]
    speeds = [measured_speedup(report, point) for _, point in shown]
    all_timed = None not in speeds
    gate = report["request"]["gate"].get("psnr_db")
    yardsticks = {name: found["psnr_db"] for name, found in report["yardsticks"].items()}
    levels = [value for value in (gate, *yardsticks.values()) if value is not None]
    ends = [psnr_db(point, what) for _, point in shown for what in ("mean", "low", "high")]
    finite = [value for value in (*levels, *ends) if value is not None and math.isfinite(value)]
    top = max(finite) + max(1.0, LEVEL_GAP * (max(finite) - min(finite))) if finite else EMPTY_LEVEL_DB
    marks = []
    for (number, point), speed in zip(shown, speeds, strict=True):
        mean, low, high = (psnr_db(point, what) for what in ("mean", "low", "high"))
        assert mean is not None
        y = min(mean, top)
        known = mean < math.inf and low is not None and high is not None
        interval = (max(y - (low or 0.0), 0.0), max((high or 0.0) - y, 0.0)) if known else (0.0, 0.0)
        x = speed if all_timed and speed is not None else point["predicted_speedup"]
        marks.append(Mark(number, point["kind"], x, y, point is chosen, interval))
    _draw(axes, marks, [(mark.x, mark.y) for mark in marks])
    if any(mark.y == top for mark in marks):
        axes.axhline(top, color=GREY, linewidth=0.7, linestyle=(0, (1, 4)), label="identical to dense (PSNR infinite)")
    if gate is not None:
        axes.axhline(gate, color=GATE, linewidth=1, linestyle="--", label=f"gate: mean {gate:g} dB")
    for name, value in yardsticks.items():
        if value is not None:
            axes.axhline(value, color=GREY, linewidth=1.2, linestyle=YARDSTICKS[name], label=f"{name}: {value:.1f} dB")
    how = "measured" if all_timed else "predicted"
    axes.set(xlabel=f"attention speed-up over dense, {how}", ylabel="PSNR against dense, dB")


def _draw_loss(axes: Axes, report: Report) -> None:
    """Draw all points where a search expects them."""
    chosen = chosen_point(report)
    marks = [
        Mark(number, point["kind"], point["predicted_speedup"], point["predicted_loss"], point is chosen)
        for number, point in enumerate(by_speed(report), 1)
    ]
    _draw(axes, marks, [(mark.x, -mark.y) for mark in marks])
    positive = [mark.y for mark in marks if mark.y > 0]
    if positive and max(positive) > 30 * min(positive):
        axes.set_yscale("symlog", linthresh=min(positive))  # a loss may be 0
        axes.yaxis.set_major_formatter("{x:g}")
    axes.set(xlabel="attention speed-up over dense, predicted", ylabel="predicted loss (less is better)")


def _draw(axes: Axes, marks: Sequence[Mark], ranked: Sequence[tuple[float, float]]) -> None:
    best = front(ranked)
    for kind, (sign, colour) in KINDS.items():
        for leads, shade, label in ((False, GREY, f"{kind}, dominated"), (True, colour, kind)):
            some = [mark for i, mark in enumerate(marks) if mark.kind == kind and (i in best) == leads]
            if some:
                _scatter(axes, some, sign, shade, label, 4 if leads else 3)
    line = [marks[i] for i in best]
    axes.plot([m.x for m in line], [m.y for m in line], color=GREY, linewidth=2, alpha=0.6, zorder=1, label="front")
    for mark in marks:
        if mark.chosen:
            _ring(axes, mark)
        if mark.chosen or (mark in line and len(line) <= MOST_NUMBERED):
            axes.annotate(str(mark.number), (mark.x, mark.y), (7, 5), textcoords="offset points", fontsize=8)
    axes.axvline(1.0, color=GREY, linewidth=0.7, label="dense, 1×")
    axes.margins(0.1)
    axes.grid(color=GREY, alpha=0.2, linewidth=0.5)


def _ring(axes: Axes, mark: Mark) -> None:
    axes.scatter(
        [mark.x], [mark.y], s=150, facecolors="none", edgecolors=RING, linewidths=2, zorder=5, label="chosen"
    )  # fmt: skip


def _scatter(axes: Axes, marks: Sequence[Mark], sign: str, colour: str, label: str, zorder: int) -> None:
    places = [m.x for m in marks], [m.y for m in marks]
    axes.scatter(*places, s=30, marker=sign, color=colour, label=label, zorder=zorder)
    barred = [mark for mark in marks if any(mark.interval)]
    if barred:
        axes.errorbar(
            [m.x for m in barred], [m.y for m in barred], list(zip(*(m.interval for m in barred), strict=True)),
            fmt="none", ecolor=colour, elinewidth=1, capsize=2, zorder=2, alpha=0.8,
        )  # fmt: skip


def _inline(svg: str) -> str:
    """Return an SVG file as an element of a page, which gives it its size."""
    element = svg[svg.index("<svg") :]
    return re.sub(r' (width|height)="[\d.]+pt"', "", element, count=2)
