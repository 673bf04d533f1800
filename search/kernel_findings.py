"""The figures that the kernel benchmark sets goals for, worked out from its rows."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

Event = dict[str, Any]

OWN = ("hopper", "triton")


@dataclass(frozen=True)
class Finding:
    """Hold one figure that the issue sets a goal for."""

    what: str
    unit: str
    contender: str
    measured: float
    goal: float | None  # None: measured for its own sake
    at_least: bool = True  # or at most

    @property
    def met(self) -> bool | None:
        if self.goal is None:
            return None
        return self.measured >= self.goal if self.at_least else self.measured <= self.goal


class Rows:
    """Find rows by section, unit and contender."""

    def __init__(self, rows: Iterable[Event]) -> None:
        self.all = list(rows)
        self._by_key = {(row["section"], row["unit"], row["contender"]): row for row in self.all}

    def get(self, section: str, unit: str, contender: str) -> Event | None:
        return self._by_key.get((section, unit, contender))

    def ms(self, section: str, unit: str, contender: str) -> float | None:
        row = self.get(section, unit, contender)
        return None if row is None else float(row["ms"])

    def units(self, section: str) -> list[str]:
        return list(dict.fromkeys(row["unit"] for row in self.all if row["section"] == section))


def findings(rows: Rows) -> list[Finding]:
    """Work out every figure of the issue's list that the rows allow."""
    found: list[Finding] = []
    for own in OWN:
        found += _against_fa4(rows, own) + _realised(rows, own)
        for unit in rows.units("partial"):
            found += _masked_cost(rows, unit, own)
        for unit in rows.units("ragged"):
            found += _per_pair(rows, "ragged", unit, own, "even", "time per pair over the even grid", 1.10, False)
        for unit in rows.units("uneven"):
            found += _per_pair(rows, "uneven", unit, own, "even", "throughput over even heads", 0.95, True)
        for unit in rows.units("compensation"):
            found += _compensation(rows, unit, own)
    found += _triton(rows)
    for unit in rows.units("selection"):
        found += _selection(rows, unit)
    for unit in rows.units("host"):
        mine = [row for row in rows.all if row["section"] == "host" and row["unit"] == unit]
        found += [
            Finding("host µs of a launch", unit, row["contender"], row["numbers"]["host_us"], None) for row in mine
        ]
    return found


def derived(row: Event, rows: Rows) -> dict[str, float | None]:
    """Return TFLOP/s on visited pairs and the fraction of cuDNN's dense speed that they realise."""
    numbers = row["numbers"]
    if "pairs" not in numbers:
        return {"tflops": None, "realised": None}
    dense = row["contender"].endswith(" dense")
    pairs = numbers["pairs"] / numbers["density"] if dense else numbers["pairs"]
    cudnn = rows.ms(row["section"], row["unit"], "cudnn dense")
    share = 1.0 if dense else numbers["density"]
    return {
        "tflops": 4e-9 * pairs * numbers["head_dim"] / row["ms"],
        "realised": None if cudnn is None else cudnn * share / row["ms"],
    }


def _against_fa4(rows: Rows, own: str) -> list[Finding]:
    ratios, found = [], []
    places = [("full", "fa4", unit) for unit in rows.units("full")]
    for section, other, unit in places + [("dense", "fa4 dense", unit) for unit in rows.units("dense")]:
        mine, peer, dense = rows.get(section, unit, own), rows.ms(section, unit, other), section == "dense"
        if mine is None or peer is None:
            continue
        wide = mine["numbers"]["head_dim"] == 128
        ratio = peer / mine["ms"]
        if wide and not dense:
            ratios.append(ratio)
        goal = None if own != "hopper" else 0.97 if wide and dense else 1.0
        found.append(Finding("speed over fa4", unit, own, ratio, goal))
    if ratios:
        mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
        found.append(
            Finding("speed over fa4, geometric mean", "d128 sparse", own, mean, 1.05 if own == "hopper" else None)
        )
    return found


def _realised(rows: Rows, own: str) -> list[Finding]:
    found = []
    for unit in rows.units("full"):
        row = rows.get("full", unit, own)
        if row is None:
            continue
        share = derived(row, rows)["realised"]
        if share is not None:
            goal = 1.0 if own == "hopper" and row["numbers"]["head_dim"] == 128 else None
            found.append(Finding("realised fraction of cuDNN × density", unit, own, share, goal))
    return found


def _triton(rows: Rows) -> list[Finding]:
    found = []
    for unit in rows.units("full"):
        row, flex = rows.get("full", unit, "triton"), rows.ms("full", unit, "flex")
        if row is not None and unit == "wan_480p@0.1":
            found.append(Finding("TFLOP/s", unit, "triton", derived(row, rows)["tflops"] or 0.0, 480.0))
        if row is not None and flex is not None:
            found.append(Finding("speed over FlexAttention", unit, "triton", flex / row["ms"], 1.0))
    return found


def _masked_cost(rows: Rows, unit: str, own: str) -> list[Finding]:
    row, whole = rows.get("partial", unit, own), rows.ms("partial", unit, f"{own} whole")
    if row is None or whole is None:
        return []
    share = row["numbers"]["masked_share"]
    ratio = row["ms"] / whole  # both visit the same number of blocks
    found = [Finding("share of visited blocks that are masked", unit, own, share, None)]
    if share > 0:
        cost = (ratio - (1 - share)) / share
        found.append(Finding("masked block over full block", unit, own, cost, 1.25, at_least=False))
    return found


def _per_pair(
    rows: Rows, section: str, unit: str, own: str, other: str, what: str, goal: float, speed: bool
) -> list[Finding]:
    """Compare time per pair with that of the same contender on other inputs; speed is its inverse."""
    row, twin = rows.get(section, unit, own), rows.get(section, unit, f"{own} {other}")
    if row is None or twin is None:
        return []
    ratio = (row["ms"] / row["numbers"]["pairs"]) / (twin["ms"] / twin["numbers"]["pairs"])
    return [Finding(what, unit, own, 1 / ratio if speed else ratio, goal, at_least=speed)]


def _compensation(rows: Rows, unit: str, own: str) -> list[Finding]:
    row, plain = rows.get("compensation", unit, f"{own} means"), rows.ms("compensation", unit, own)
    if row is None or plain is None:
        return []
    numbers = row["numbers"]
    allowed = 1.3 * numbers["pooled_blocks"] / numbers["kept_blocks"] + 0.02
    return [Finding("compensation's share on top", unit, own, row["ms"] / plain - 1.0, allowed, at_least=False)]


def _selection(rows: Rows, unit: str) -> list[Finding]:
    found = []
    mine = [row for row in rows.all if row["section"] == "selection" and row["unit"] == unit]
    for row in mine:
        label, _, what = row["contender"].partition(" ")
        if what not in ("choose", "choose replayed"):
            continue
        goal = 1.5 if unit == "wan_720p" and what == "choose replayed" else None
        found.append(Finding("selection, ms", unit, row["contender"], row["ms"], goal, at_least=False))
        for own in OWN:
            kernel = rows.ms("selection", unit, f"{label} {own}")
            if kernel is not None:
                goal = 0.10 if own == "hopper" and what == "choose replayed" else None
                share = Finding(
                    "selection over its kernel", unit, f"{row['contender']} / {own}", row["ms"] / kernel, goal, False
                )
                found.append(share)
    return found
