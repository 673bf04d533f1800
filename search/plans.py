"""Plans for people: what there is, what one does, and a picture of its blocks."""

from __future__ import annotations

from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from dit_sparse.grid import Grid
from dit_sparse.patterns import PATTERNS, Dense, Pattern, StaticPattern
from dit_sparse.pipelines.presets import FOLDER, MACHINES, shipped_plans
from dit_sparse.plan import Plan, format_indices
from dit_sparse.search import pictures
from dit_sparse.spec import PRESETS, parse_spec

MOST_TOKENS = 200_000  # above this even some rows of blocks take minutes on a CPU


def list_specs() -> list[str]:
    """Name every preset with its rules, and every pattern with its fields and their defaults."""
    lines = ["presets (--plan NAME):"]
    lines += [f"  {name}: {'; '.join(rule_lines(plan))}" for name, plan in PRESETS.items()]
    for machine in MACHINES:
        known = shipped_plans(FOLDER / machine)
        lines += [f"that mean a searched plan on {machine} and this model (in {FOLDER / machine}):"] * bool(known)
        lines += [f"  {name}: {model}" for name, model in known]
    lines.append("patterns (--plan NAME:field=value,field=value):")
    for name, cls in PATTERNS.items():
        shown = [f.name if f.default is MISSING else f"{f.name}={f.default}" for f in fields(cls)]
        lines.append(f"  {name}: {', '.join(shown) or 'no options'}")
    return lines


def rule_lines(plan: Plan) -> list[str]:
    """Return one line of text for each rule of a plan."""
    rules = []
    for rule in plan.rules:
        where = [f"steps {rule.steps[0]:.0%}-{rule.steps[1]:.0%}"]
        where += [f"layers {format_indices(rule.layers)}"] if rule.layers is not None else []
        where += [f"heads {format_indices(rule.heads)}"] if rule.heads is not None else []
        where += [rule.transformer] if rule.transformer is not None else []
        rules.append(f"{', '.join(where)}: {rule.pattern}")
    return rules or ["everything dense"]


def parse_grid(text: str) -> Grid:
    """Read a token grid such as 21x30x52, or 21x30x52+226 with that many text tokens behind the video.

    Raises:
        ValueError: not three positive integers, or more tokens than a mask is counted for.
    """
    video, plus, tokens = text.lower().partition("+")
    parts = video.split("x")
    if len(parts) != 3 or not all(part.strip().isdigit() for part in [*parts, *([tokens] if plus else [])]):
        raise ValueError(
            f"grid must be frames x rows x columns, e.g. 21x30x52, or with text 21x30x52+226, got {text!r}"
        )
    frames, height, width = map(int, parts)
    grid = Grid(frames, height, width, suffix=int(tokens or 0))
    if grid.tokens > MOST_TOKENS:
        raise ValueError(f"grid {text} has {grid.tokens:,} tokens; masks are counted for at most {MOST_TOKENS:,}")
    return grid


def describe(spec: str, grid: Grid) -> dict[str, Any]:
    """Return a plan's JSON form and lines that tell its rules and the density of each of its patterns on a grid.

    Raises:
        ValueError: an unknown or broken spec, or a pattern that does not fit the grid.
    """
    plan = parse_spec(spec)
    lines = [f"plan {plan.name}", *(f"  {rule}" for rule in rule_lines(plan)), f"on the grid {grid}:"]
    for pattern in dict.fromkeys(rule.pattern for rule in plan.rules):
        pattern.check(grid)
        lines.append(f"  {pattern}: {_density(pattern, grid)}")
    return {"plan": plan.to_dict(), "lines": lines}


def draw(spec: str, grid: Grid, path: Path) -> None:
    """Draw the blocks of a plan's first pattern that is not dense, or of the dense one: see `pictures.draw`.

    Raises:
        ValueError: a pattern that does not fit the grid, or a file that cannot be written.
    """
    patterns = [rule.pattern for rule in parse_spec(spec).rules]
    sparse = [pattern for pattern in patterns if not isinstance(pattern, Dense)]
    pictures.draw([*sparse, *patterns, Dense()][0], grid, path)


def _density(pattern: Pattern, grid: Grid) -> str:
    small = grid.tokens <= pictures.MOST_MADE_UP_TOKENS
    if isinstance(pattern, StaticPattern):
        # a large grid is told from some of its query blocks: counting all of them takes minutes
        kept, computed = pattern.densities(grid) if not small else pattern.densities(grid, sampled_blocks=None)
        about = "" if small else "about "
        return f"keep {about}{kept:.1%} (skip {1 - kept:.1%}), in whole blocks {computed:.1%}"
    if not small:
        return (
            "chosen from the content at run time; see the densities of a report, or a grid of at most "
            f"{pictures.MOST_MADE_UP_TOKENS:,} tokens for those on a made-up input"
        )
    look = pictures.look_at(pattern, grid)
    return (
        f"keep {look.density:.1%} (skip {1 - look.density:.1%}), in whole blocks {look.computed_density:.1%}, "
        "on a made-up input: the content decides at run time"
    )
