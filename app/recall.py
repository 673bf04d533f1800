"""Recall and output error of a monitored run, step by step, as a chart."""

from __future__ import annotations

import html
from dataclasses import dataclass

from dit_sparse.app.axes import (
    ACCENT,
    BOTTOM,
    HEIGHT,
    LEFT,
    RIGHT,
    SECOND,
    TOP,
    WIDTH,
    Scale,
    axes,
    chart,
    mark,
    polyline,
    text,
)
from dit_sparse.app.stored import Report, Run, run_of

NOT_MEASURED = (
    "Recall and output error were not measured in this comparison. Ask for it under More before "
    "generating, or give --monitor to dit-sparse compare. It runs each plan once more."
)


@dataclass(frozen=True)
class StepMean:
    """Sum up what was measured in one step over layers, heads and branches."""

    step: int
    recall: float
    lowest_recall: float
    error: float


def step_means(run: Run) -> list[StepMean]:
    """Return the means of each step that had sparse calls, in order; calls whose step nobody knew are left out."""
    measured = run.get("measured")
    recalls: dict[int, list[float]] = {}
    errors: dict[int, list[float]] = {}
    for layer in () if measured is None else measured["layers"]:
        for call in layer["calls"]:
            if call["step"] is not None:
                recalls.setdefault(call["step"], []).extend(call["recall"])
                errors.setdefault(call["step"], []).extend(call["error"])
    return [
        StepMean(step, _mean(recalls[step]), min(recalls[step]), _mean(errors[step]))
        for step in sorted(recalls)
        if recalls[step]
    ]


def recall_chart(report: Report, name: str) -> str:
    """Draw mean and lowest recall and the mean output error of each step as SVG; a sentence where none was measured.

    Raises:
        ValueError: the report has no such plan.
    """
    run = run_of(report, name)
    means = step_means(run)
    if not means:
        return f"<p>{html.escape(NOT_MEASURED)}</p>"
    steps, errors = [one.step for one in means], [one.error for one in means]
    across = Scale(min(steps) - 0.5, max(steps) + 0.5, LEFT, WIDTH - RIGHT, least_step=1)
    share = Scale(0.0, 1.0, HEIGHT - BOTTOM, TOP + 18)
    wrong = Scale(0.0, max(*errors, 1e-3) * 1.1, 2 * HEIGHT - BOTTOM, HEIGHT + TOP + 18)
    parts = [*axes(across, share, "step", "recall"), *axes(across, wrong, "step", "output error")]
    lines = [
        ("mean recall", [(one.step, one.recall) for one in means], share, ACCENT, ""),
        ("lowest recall of a head", [(one.step, one.lowest_recall) for one in means], share, SECOND, "5 4"),
        ("mean output error", [(one.step, one.error) for one in means], wrong, ACCENT, ""),
    ]
    for number, (what, values, up, colour, dash) in enumerate(lines):
        places = [(across.at(step), up.at(value)) for step, value in values]
        parts.append(polyline(places, colour, dash))
        parts += [
            mark(x, y, f"step {step}: {what} {value:.3f}", colour, filled=not dash, radius=3)
            for (x, y), (step, value) in zip(places, values, strict=True)
        ]
        x = LEFT + (0, 150, 0)[number]
        y = up.end - 8
        parts += [polyline([(x, y - 4), (x + 18, y - 4)], colour, dash), text(x + 24, y, what)]
    found = run["measured"]
    return chart(
        f"Recall and output error of {name}, step by step",
        f"Mean recall {found['recall']:.3f}, lowest {found['lowest_recall']:.3f}, mean output error "
        f"{found['error']:.3f}. They describe single attention calls; neither ranks plans by the quality of the clip.",
        parts,
        2 * HEIGHT,
    )


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
