"""What the points of a search report say: speed-ups, PSNR, order, front."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from dit_sparse.search.planner.problem import Floats

CONFIDENCE = 0.95

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


def psnr_text(point: Point, what: str = "mean") -> str:
    """Write a PSNR of a point as text."""
    found = psnr_db(point, what)
    if found is None:
        return "–"
    if found < float("inf"):
        return f"{found:.1f}"
    return "identical" if point["measured"]["identical"] else "∞"


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


def price_errors(report: Report) -> list[float]:
    """Return predicted over measured attention time of everything that was timed, dense first, less 1."""
    pairs = [(report["dense"]["attention_ms"], report["dense"]["attention_seconds"])]
    pairs += [(p["predicted_ms"], p["measured"]["attention_seconds"]) for p in report["points"] if p["measured"]]
    return [ms / 1e3 / seconds - 1.0 for ms, seconds in pairs if ms and seconds]


def interval(values: Floats) -> dict[str, float]:
    """Return the mean of values [n] and its 95 % interval (Student's t; no width for one value)."""
    from scipy.stats import t

    mean, half = float(values.mean()), 0.0
    if len(values) > 1:
        half = float(t.ppf((1 + CONFIDENCE) / 2, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5)
    return {"mean": mean, "low": mean - half, "high": mean + half}


def _ratio(dense: float | None, sparse: float | None) -> float | None:
    return dense / sparse if dense and sparse else None
