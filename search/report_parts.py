"""What all reports share: the check against a schema, Markdown tables, numbers as text."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def check_schema(report: Mapping[str, Any], schema: Path) -> None:
    """Hold a report against a JSON schema.

    Raises:
        ValueError: names the place in the report and what the schema asks for there.
    """
    import jsonschema

    found = jsonschema.Draft202012Validator(json.loads(schema.read_text(encoding="utf-8"))).iter_errors(report)
    error = jsonschema.exceptions.best_match(found)
    if error is not None:
        place = "/".join(str(step) for step in error.absolute_path) or "the report"
        raise ValueError(f"report does not follow its schema at {place}: {error.message}")
    bad = [place for place, value in _numbers(report, "") if not math.isfinite(value)]
    if bad:
        raise ValueError(f"report holds a number that JSON cannot hold (infinite or NaN) at {', '.join(bad)}")


def markdown_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lay out rows of text, which must be escaped already."""
    bars = [headings, ("---",) * len(headings), *rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in bars)


def escape_markdown(text: str) -> str:
    """Return text on one line that Markdown shows as it is."""
    for mark in "\\`*_<>|#":
        text = text.replace(mark, f"\\{mark}")
    return " ".join(text.split())


def number(value: float | None, form: str) -> str:
    """Format a number, a dash where there is none."""
    return "–" if value is None else format(value, form)


def seconds(value: float | None) -> str:
    """Format seconds, a dash where there are none."""
    return number(value, ".2f" if value is None or value < 100 else ".0f")


def times(value: float | None) -> str:
    """Format a speed-up, a dash where there is none."""
    return "–" if value is None else f"{value:.2f}×"


def _numbers(value: Any, place: str) -> list[tuple[str, float]]:
    if isinstance(value, Mapping):
        return [found for key, item in value.items() for found in _numbers(item, f"{place}/{key}")]
    if isinstance(value, list):
        return [found for i, item in enumerate(value) for found in _numbers(item, f"{place}/{i}")]
    return [(place, value)] if isinstance(value, float) else []
