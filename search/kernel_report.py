"""What the kernel benchmark found, from its events: JSON, tables, and a word on everything that has no figure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from dit_sparse.search.kernel_findings import Event, Rows, derived, findings

ROW_HEADINGS = ("section", "unit", "contender", "ms", "low", "high", "TFLOP/s", "realised", "MHz", "error", "allowed")
FINDING_HEADINGS = ("what", "contender", "goal", "worst", "where", "met", "all")
FAILURES = ("error", "failed", "left_out")
ROW_FIELDS = (
    "section", "unit", "contender", "ms", "ms_low", "ms_high", "rounds", "repeats", "sm_mhz", "watts", "celsius",
    "error", "allowed", "numbers",
)  # fmt: skip


def to_json(events: Sequence[Event]) -> dict[str, Any]:
    """Put everything heard in order: environment, gate, rows with what follows from them, findings, what failed."""
    by_key = {}
    for event in events:
        if event["kind"] == "row":  # a unit that was tried again replaces its rows
            by_key[event["section"], event["unit"], event["contender"]] = event
    rows = Rows(by_key.values())
    shown = [{name: row[name] for name in ROW_FIELDS} | derived(row, rows) for row in rows.all]
    found = {"environment": next((_without(e, "kind") for e in events if e["kind"] == "environment"), None)}
    return found | {
        "gate": [_without(e, "kind", "section", "unit") for e in events if e["kind"] == "gate"],
        "refused": _distinct(_without(e, "kind") for e in events if e["kind"] in ("refused", "gate_refused")),
        "failed": [e for e in events if e["kind"] in FAILURES],
        "rows": shown,
        "findings": [asdict(one) | {"met": one.met} for one in findings(rows)],
        "notes": ["every launch writes the LSE: there is none without it to compare with"],
    }


def row_cells(report: dict[str, Any]) -> list[list[str]]:
    """Return the cells of the rows under ROW_HEADINGS."""
    return [
        [
            row["section"], row["unit"], row["contender"], f"{row['ms']:.3f}", f"{row['ms_low']:.3f}",
            f"{row['ms_high']:.3f}", _text(row["tflops"], ".0f"), _text(row["realised"], ".2f"),
            _text(row["sm_mhz"], ".0f"), _text(row["error"], ".1e"), _text(row["allowed"], ".1e"),
        ]
        for row in report["rows"]
    ]  # fmt: skip


def finding_cells(report: dict[str, Any]) -> list[list[str]]:
    """Return the cells of the findings that have a goal under FINDING_HEADINGS: a line for each figure and contender.

    The worst one is that which comes least near to its goal, or misses it most.
    """
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for one in report["findings"]:
        if one["goal"] is not None:
            groups.setdefault((one["what"], one["contender"]), []).append(one)
    cells = []
    for (what, contender), found in groups.items():
        worst = min(found, key=_margin)
        sign = "≥" if worst["at_least"] else "≤"
        met = sum(one["met"] for one in found)
        shown = " ".join(f"{one['measured']:.3g}" for one in found)
        cells.append(
            [what, contender, f"{sign} {worst['goal']:.3g}", f"{worst['measured']:.3f}", worst["unit"],
             f"{met}/{len(found)}", shown]
        )  # fmt: skip
    return cells


def _margin(one: dict[str, Any]) -> float:
    """Return by how much of its goal a finding beats it, negative where it misses."""
    miss = (one["measured"] - one["goal"]) / max(abs(one["goal"]), 1e-9)
    return float(miss if one["at_least"] else -miss)


def failure_lines(report: dict[str, Any]) -> list[str]:
    """Say what has no figure and why: gate first, then who refused, then what failed."""
    lines = []
    for row in report["gate"]:
        if not row["passed"]:
            lines.append(f"gate failed: {row['backend']} {row['dtype']} {row['case']}: {row.get('error') or row}")
    for one in report["refused"]:
        if "case" not in one:  # cases of the gate that a backend refuses are in the JSON alone
            lines.append(f"not run: {one['section']} {one['unit']} {one['contender']}: {one['reason']}")
    for one in report["failed"]:
        reason = one.get("error") or one["reason"]
        lines.append(f"{one['kind']}: {one['section']} {one['unit']} {one.get('contender') or ''}: {reason.strip()}")
    return lines


def sound(report: dict[str, Any]) -> bool:
    """Tell whether there is a result at all (peers have no gate), the gate passed and nothing failed."""
    return (
        bool(report["gate"] or report["rows"]) and all(row["passed"] for row in report["gate"]) and not report["failed"]
    )


def _text(value: float | None, how: str) -> str:
    return "" if value is None else format(value, how)


def _without(event: Event, *names: str) -> Event:
    return {name: value for name, value in event.items() if name not in names}


def _distinct(events: Iterable[Event]) -> list[Event]:
    found: list[Event] = []
    for event in events:
        if event not in found:
            found.append(event)
    return found
