"""What the points of a search report say: speed-ups, PSNR, order, front."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

Report = Mapping[str, Any]
Point = Mapping[str, Any]

# metric: how a gate's limit on it reads
LIMITS = {
    "psnr_db": ("PSNR", "at least", " dB"),
    "ssim": ("SSIM", "at least", ""),
    "flicker": ("flicker", "at most", ""),
    "warp_error": ("warp error", "at most", ""),
    "lpips": ("LPIPS", "at most", ""),
}


def measured_speedup(report: Report, point: Point) -> float | None:
    """Return the measured speed-up of attention, None where one of both sides was not timed."""
    measured = point["measured"]
    return None if measured is None else _ratio(report["dense"]["attention_seconds"], measured["attention_seconds"])


def speedup(report: Report, point: Point) -> tuple[float, str]:
    """Return the speed-up of attention, measured where it was or else predicted, and which of both it is."""
    found = measured_speedup(report, point)
    return (point["predicted_speedup"], "predicted") if found is None else (found, "measured")


def end_to_end(report: Report, point: Point) -> float | None:
    """Return the speed-up of whole renders, None where they were not timed."""
    measured = point["measured"]
    return None if measured is None else _ratio(report["dense"]["seconds"], measured["seconds"])


def psnr_db(point: Point, what: str = "mean") -> float | None:
    """Return the "mean", "low", "high" or "worst" PSNR against dense, infinite where clips are identical.

    None where nothing was rendered, or an end of the interval is not known.
    """
    measured = point["measured"]
    if measured is None:
        return None
    spread = None if measured["identical"] else measured["psnr_db"]
    found = None if spread is None else spread[what]
    if found is not None:
        return float(found)
    return None if what in ("low", "high") else math.inf


def by_speed(report: Report) -> list[Point]:
    """Return the points from the fastest to the slowest."""
    return sorted(report["points"], key=lambda point: -speedup(report, point)[0])


def chosen_point(report: Report) -> Point | None:
    return None if report["chosen"] is None else report["points"][report["chosen"]]


def gate_line(report: Report) -> tuple[int, str]:
    """Return how many of the points `by_speed` are faster than all that pass the gate, and what to write there."""
    passing = [bool(point["measured"] and point["measured"]["passes"]) for point in by_speed(report)]
    above = passing.index(True) if True in passing else len(passing)
    return above, f"gate: {gate_text(report)}; what stands above is faster, but fails it or was not rendered"


def gate_text(report: Report) -> str:
    """Say what the gate asks for."""
    parts = []
    for name, bound in report["request"]["gate"].items():
        worst, metric = name.startswith("worst_"), name.removeprefix("worst_")
        label, side, unit = LIMITS.get(metric, (metric, "bounded by", ""))
        if bound is not None:
            parts.append(f"{'worst' if worst else 'mean'} {label} {side} {bound:g}{unit}")
    return ", ".join(parts) or "nothing is asked for"


def front(places: Sequence[tuple[float, float]]) -> list[int]:
    """Return the places (x, y) than which no other is better in one and at least as good in the other, by x.

    More is better in both. Of equal places all are returned.
    """
    order = sorted(range(len(places)), key=lambda i: (-places[i][0], -places[i][1]))
    kept: list[int] = []
    for i in order:
        if not kept or places[i][1] > places[kept[-1]][1] or places[i] == places[kept[-1]]:
            kept.append(i)
    return kept[::-1]


def _ratio(dense: float | None, sparse: float | None) -> float | None:
    return dense / sparse if dense and sparse else None
