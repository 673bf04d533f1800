"""The patterns, one file each, and the one table that names them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any

from dit_sparse.nearest import did_you_mean
from dit_sparse.patterns.base import Pattern, PatternState, StaticPattern
from dit_sparse.patterns.cached import Cached
from dit_sparse.patterns.dense import Dense
from dit_sparse.patterns.frames import AutoFrames, Frames
from dit_sparse.patterns.neighborhood import Neighborhood
from dit_sparse.patterns.powers import Powers
from dit_sparse.patterns.radial import Radial
from dit_sparse.patterns.skip import Skip
from dit_sparse.patterns.strided import Strided
from dit_sparse.patterns.stripes import Stripes
from dit_sparse.patterns.topblocks import TopBlocks
from dit_sparse.selection import Selection

PATTERNS: dict[str, type[Pattern]] = {
    "dense": Dense,
    "skip": Skip,
    "neighborhood": Neighborhood,
    "radial": Radial,
    "frames": Frames,
    "autoframes": AutoFrames,
    "stripes": Stripes,
    "powers": Powers,
    "strided": Strided,
    "topblocks": TopBlocks,
    "cached": Cached,
}

__all__ = [
    "PATTERNS", "AutoFrames", "Cached", "Dense", "Frames", "Neighborhood", "Pattern", "PatternState", "Powers",
    "Radial", "Selection", "Skip", "StaticPattern", "Strided", "Stripes", "TopBlocks", "pattern_from_dict",
    "pattern_from_text",
]  # fmt: skip


def pattern_from_dict(values: object, where: str = "pattern") -> Pattern:
    """Build a pattern from its JSON form, e.g. {"name": "topblocks", "keep": 0.2}.

    Raises: ValueError that names the place, what was found and what is known.
    """
    if not isinstance(values, Mapping) or not isinstance(values.get("name"), str):
        raise ValueError(f'{where} must be an object with a "name", got {values!r}')
    name = values["name"]
    if name not in PATTERNS:
        raise ValueError(
            f"{where}: unknown pattern {name!r}{did_you_mean(name, PATTERNS)}; known: {', '.join(PATTERNS)}"
        )
    cls = PATTERNS[name]
    known = [item.name for item in fields(cls)]
    options: dict[str, Any] = {}
    for key, value in values.items():
        if key == "name":
            continue
        if key not in known:
            has = f"its fields are {', '.join(known)}" if known else "it has no fields"
            raise ValueError(f"{where}: pattern {name!r} has no field {key!r}{did_you_mean(str(key), known)}; {has}")
        if isinstance(value, Mapping):
            value = pattern_from_dict(value, f"{where}.{key}")
        options[key] = tuple(value) if isinstance(value, list) else value
    for item in fields(cls):
        if item.name not in options and item.default is MISSING and item.default_factory is MISSING:
            raise ValueError(f"{where}: pattern {name!r} needs the field {item.name!r}")
    try:
        return cls(**options)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where}: {error}") from error


def pattern_from_text(text: str) -> Pattern:
    """Read `topblocks:keep=0.2`, `neighborhood:window=5x0.5x0.5`, `cached:refresh_steps=4,pattern=topblocks:keep=0.2`.

    Values are numbers, true/false, words, or several values joined by `x` (one alone: `0.2x`); options of an inner
    pattern are separated by semicolons. `str(pattern)` writes this form.

    Raises: ValueError for an unknown name, field or value.
    """
    return pattern_from_dict(_text_to_dict(text, ","), repr(text))


def _text_to_dict(text: str, separator: str) -> dict[str, Any]:
    name, _, options = text.partition(":")
    values: dict[str, Any] = {"name": name.strip()}
    for item in filter(None, options.split(separator)):
        key, equals, value = item.partition("=")
        if not equals:
            raise ValueError(f"{text!r}: options look like name=value, got {item!r}")
        values[key.strip()] = _text_to_dict(value, ";") if key.strip() == "pattern" else _text_to_value(value.strip())
    return values


def _text_to_value(text: str) -> Any:
    parts = [_text_to_value(part.strip()) for part in text.removesuffix("x").split("x")] if "x" in text else []
    if parts and not any(isinstance(value, str) for value in parts):
        return parts
    match text.lower():
        case "true" | "false":
            return text.lower() == "true"
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    return text
