"""Uniform patterns that were rendered, held against the searched plans of the same clips."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dit_sparse.search.planner.gate import MOST_DB
from dit_sparse.search.planner.points import Point, Report, interval, measured_speedup, psnr_text
from dit_sparse.search.report_parts import times

ABOUT = (
    "Of the plans that were rendered on the same clips: the fastest that loses no more than a uniform pattern, and the "
    "best that is no slower. Attention time as measured; differences are paired, their intervals over prompts."
)
RIVAL_HEADINGS = (
    "uniform pattern", "attention", "PSNR dB", "losing no more: faster", "dB more (95 %)", "no slower: faster",
    "dB more (95 %)",
)  # fmt: skip


def rival_rows(report: Report) -> list[tuple[str, ...]]:
    """Return one row of text for each uniform pattern that was rendered, under RIVAL_HEADINGS."""
    found = []
    for one in rivals(report["points"]):
        rival, cells = one["rival"], []
        for held in (one["at_its_loss"], one["at_its_time"]):
            if held is None:
                cells += ["no plan was", "–"]
            else:
                db = held["db"]
                cells += [
                    f"{held['times_faster']:.2f}× ({held['plan']})",
                    f"{db['mean']:+.1f} ({db['low']:+.1f} to {db['high']:+.1f})",
                ]
        found.append((rival["name"], times(measured_speedup(report, rival)), psnr_text(rival), *cells))
    return found


def paired_db(one: Point, other: Point) -> dict[str, float]:
    """Return by how much PSNR `one` is above `other` on the same clips: mean and 95 % interval over prompts.

    Each prompt counts once, as the mean of its seeds; an identical clip counts as MOST_DB.
    """
    of_prompts: dict[int, list[float]] = {}
    for mine, its in zip(one["measured"]["clips"], other["measured"]["clips"], strict=True):
        assert (mine["prompt"], mine["seed"]) == (its["prompt"], its["seed"])
        of_prompts.setdefault(mine["prompt"], []).append(_clip_db(mine) - _clip_db(its))
    return interval(np.array([np.mean(of_prompt) for of_prompt in of_prompts.values()]))


def rivals(points: Sequence[Point]) -> list[dict[str, Any]]:
    """Hold every uniform pattern that was rendered against the searched plans of the same clips, the fastest first.

    at_its_loss: of the plans whose mean PSNR is no less, the fastest; at_its_time: of those whose attention is no
    slower, the one of most PSNR. Each with times_faster, of measured attention, and db, as `paired_db`; or None.
    """
    timed = [point for point in points if point["measured"] and point["measured"]["attention_seconds"]]
    plans = [point for point in timed if point["kind"] == "searched"]
    found = []
    for rival in sorted((p for p in timed if p["kind"] == "uniform"), key=_attention):
        as_good = [plan for plan in plans if _mean_db(plan) >= _mean_db(rival)]
        as_fast = [plan for plan in plans if _attention(plan) <= _attention(rival)]
        at_its_loss = min(as_good, key=_attention) if as_good else None
        at_its_time = max(as_fast, key=_mean_db) if as_fast else None
        found.append({
            "rival": rival,
            "at_its_loss": None if at_its_loss is None else _held_against(at_its_loss, rival),
            "at_its_time": None if at_its_time is None else _held_against(at_its_time, rival),
        })  # fmt: skip
    return found


def _held_against(plan: Point, rival: Point) -> dict[str, Any]:
    return {
        "plan": plan["name"],
        "times_faster": _attention(rival) / _attention(plan),
        "db": paired_db(plan, rival),
    }


def _attention(point: Point) -> float:
    return float(point["measured"]["attention_seconds"])


def _mean_db(point: Point) -> float:
    return float(np.mean([_clip_db(clip) for clip in point["measured"]["clips"]]))


def _clip_db(clip: Mapping[str, Any]) -> float:
    return MOST_DB if clip["psnr_db"] is None else float(clip["psnr_db"])
