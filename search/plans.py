"""Plans for people: what there is, what one does, and a picture of its blocks."""

from __future__ import annotations

from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from dit_sparse.grid import Grid
from dit_sparse.kernels.indices import unpack_bits
from dit_sparse.patterns import PATTERNS, Pattern, StaticPattern
from dit_sparse.patterns.base import static_selection
from dit_sparse.plan import Plan, format_indices
from dit_sparse.search.staging import check_writable, staged
from dit_sparse.spec import PRESETS, parse_spec

MOST_TOKENS = 200_000  # a static mask is counted pair by pair: above this it takes minutes on a CPU
PICTURE_PIXELS = 512
EMPTY, PARTIAL, FULL = 245, 140, 20


def list_specs() -> list[str]:
    """Name every preset with its rules, and every pattern with its fields and their defaults."""
    lines = ["presets (--plan NAME):"]
    lines += [f"  {name}: {'; '.join(_rules(plan))}" for name, plan in PRESETS.items()]
    lines.append("patterns (--plan NAME:field=value,field=value):")
    for name, cls in PATTERNS.items():
        shown = [f.name if f.default is MISSING else f"{f.name}={f.default}" for f in fields(cls)]
        lines.append(f"  {name}: {', '.join(shown) or 'no options'}")
    return lines


def parse_grid(text: str) -> Grid:
    """Read a token grid such as 21x30x52.

    Raises:
        ValueError: not three positive integers, or more tokens than a mask is counted for.
    """
    parts = text.lower().split("x")
    if len(parts) != 3 or not all(part.strip().isdigit() for part in parts):
        raise ValueError(f"grid must be frames x rows x columns, e.g. 21x30x52, got {text!r}")
    grid = Grid(*(int(part) for part in parts))
    if grid.tokens > MOST_TOKENS:
        raise ValueError(f"grid {text} has {grid.tokens:,} tokens; masks are counted for at most {MOST_TOKENS:,}")
    return grid


def describe(spec: str, grid: Grid) -> dict[str, Any]:
    """Return a plan's JSON form and lines that tell its rules and the density of each of its patterns on a grid.

    Raises:
        ValueError: an unknown or broken spec, or a pattern that does not fit the grid.
    """
    plan = parse_spec(spec)
    lines = [f"plan {plan.name}", *(f"  {rule}" for rule in _rules(plan)), f"on the grid {grid}:"]
    for pattern in dict.fromkeys(rule.pattern for rule in plan.rules):
        pattern.check(grid)
        lines.append(f"  {pattern}: {_density(pattern, grid)}")
    return {"plan": plan.to_dict(), "lines": lines}


def draw(spec: str, grid: Grid, path: Path) -> None:
    """Draw the 128-token blocks of a plan's first static pattern in kernel order: dark full, grey partial, light empty.

    Raises:
        ValueError: no pattern of the plan is static, or the file cannot be written.
    """
    static = [rule.pattern for rule in parse_spec(spec).rules if isinstance(rule.pattern, StaticPattern)]
    if not static:
        raise ValueError(f"{spec} has no pattern that is known without content, so there is no mask to draw")
    check_writable(path.parent)
    layout = static[0].token_order().layout(grid, torch.device("cpu"))
    indices = static_selection(static[0], grid, layout).indices
    visited = unpack_bits(indices.bits, indices.key_blocks)[0]
    shades = torch.where(visited, FULL, EMPTY)
    if indices.partial_bits is not None:
        shades[unpack_bits(indices.partial_bits, indices.key_blocks)[0]] = PARTIAL
    scale = max(1, PICTURE_PIXELS // shades.shape[0])
    picture = Image.fromarray(shades.to(torch.uint8).numpy()).resize(
        (shades.shape[1] * scale, shades.shape[0] * scale), Image.Resampling.NEAREST
    )
    with staged(path.parent) as folder:
        picture.save(folder / path.name, format="PNG")


def _rules(plan: Plan) -> list[str]:
    rules = []
    for rule in plan.rules:
        where = [f"steps {rule.steps[0]:.0%}-{rule.steps[1]:.0%}"]
        where += [f"layers {format_indices(rule.layers)}"] if rule.layers is not None else []
        where += [f"heads {format_indices(rule.heads)}"] if rule.heads is not None else []
        where += [rule.transformer] if rule.transformer is not None else []
        rules.append(f"{', '.join(where)}: {rule.pattern}")
    return rules or ["everything dense"]


def _density(pattern: Pattern, grid: Grid) -> str:
    if not isinstance(pattern, StaticPattern):
        return "chosen from the content at run time; see the densities of a report"
    found = static_selection(pattern, grid, pattern.token_order().layout(grid, torch.device("cpu")))
    pairs = float(grid.video_tokens) ** 2
    kept, computed = float(found.kept_pairs) / pairs, float(found.visited_pairs) / pairs
    return f"keep {kept:.1%} (skip {1 - kept:.1%}), in whole blocks {computed:.1%}"
