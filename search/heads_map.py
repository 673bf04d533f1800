"""A map of layers and heads as SVG: a letter for the kind of pattern, a shade for its density."""

from __future__ import annotations

import functools
import html
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from dit_sparse.patterns import PATTERNS

CELL, LEFT, TOP = 12, 30, 16  # pixels of a head, of the layers' numbers, of the heads' numbers
# Upper ends of the shades of density, the palest first; the last one is dense alone.
SHADES = (0.05, 0.1, 0.15, 0.2, 0.3, 0.45, 0.65, math.nextafter(1.0, 0.0), 1.0)
# All are pale enough for black letters, on a white page and on a black one.
COLOURS = ("#f2f7fd", "#e1edf8", "#cfe1f2", "#b7d4ea", "#9ac8e0", "#7cb7da", "#61a5d2", "#4a90c4", "#a3a3a3")
UNKNOWN_COLOUR, LETTER_COLOUR = "#f3dfae", "#111"
MOST_NUMBERED_ROWS, MOST_NUMBERED_HEADS = 12, 8


@dataclass(frozen=True)
class Cell:
    """Describe one head: its density (None: the content decides), the letter of its kind, what a reader is told."""

    density: float | None
    letter: str
    told: str


def draw(rows: Sequence[tuple[int, Sequence[Cell]]], label: str, scale: float = 1.0) -> str:
    """Draw layers down, each a number and its heads, and heads across; every cell tells what it is."""
    heads, many = max((len(cells) for _, cells in rows), default=0), len(rows) > MOST_NUMBERED_ROWS
    width, height = LEFT + CELL * heads, TOP + CELL * len(rows)
    parts = [
        f'<svg class="map" viewBox="0 0 {width} {height}" width="{scale * width:g}" height="{scale * height:g}" '
        f'role="img" aria-label="{html.escape(label)}" font-size="9" text-anchor="middle" fill="currentColor" '
        'style="max-width: 100%; height: auto">'
    ]
    for head in range(0, heads, 4 if heads > MOST_NUMBERED_HEADS else 1):
        parts.append(f'<text x="{_middle(head)}" y="10">{head}</text>')
    for number, (layer, cells) in enumerate(rows):
        y = TOP + CELL * number
        if not many or layer % 5 == 0:
            parts.append(f'<text x="14" y="{y + 9}">{layer}</text>')
        for head, cell in enumerate(cells):
            name, colour = shade_name_and_colour(cell.density)
            parts.append(
                f'<rect class="{name}" x="{LEFT + CELL * head}" y="{y}" width="{CELL}" height="{CELL}" fill="{colour}" '
                f'stroke="#fff" stroke-width="0.5"><title>{html.escape(cell.told)}</title></rect>'
            )
        places = " ".join(str(_middle(head)) for head in range(len(cells)))
        letters_of_row = html.escape("".join(cell.letter for cell in cells))
        parts.append(
            f'<text class="marks" y="{y + 9}" x="{places}" fill="{LETTER_COLOUR}" '
            f'pointer-events="none">{letters_of_row}</text>'
        )
    return "\n".join([*parts, "</svg>"])


@functools.cache
def letters() -> dict[str, str]:
    """Return a letter for each pattern of PATTERNS: the first of its name that no earlier one has."""
    found: dict[str, str] = {}
    for name in PATTERNS:
        free = [letter for letter in (*name.upper(), *"ABCDEFGHIJKLMNOPQRSTUVWXYZ") if letter not in found.values()]
        found[name] = free[0]
    return found


def kind_of(pattern: str) -> tuple[str, str]:
    """Return the letter and the name of a pattern's kind, from its text; a small letter keeps its choice."""
    name, _, options = pattern.partition(":")
    inner = options.partition("pattern=")[2].partition(":")[0].partition(",")[0] if name == "cached" else ""
    letter = letters().get(inner or name, "?")
    return (letter.lower(), f"cached {inner}") if inner else (letter, name)


def kinds_of(patterns: Sequence[str]) -> list[tuple[str, str, int]]:
    """Return the kinds among the patterns of heads: letter, name, number of heads; the most frequent first."""
    counts: dict[tuple[str, str], int] = {}
    for pattern in patterns:
        kind = kind_of(pattern)
        counts[kind] = counts.get(kind, 0) + 1
    return sorted(((*kind, count) for kind, count in counts.items()), key=lambda one: (-one[2], one[1]))


def shade_of(density: float) -> int:
    return next(i for i, most in enumerate(SHADES) if density <= most)


def shade_name_and_colour(density: float | None) -> tuple[str, str]:
    """Return the class of a cell and its colour."""
    if density is None:
        return "unknown", UNKNOWN_COLOUR
    return f"s{shade_of(density)}", COLOURS[shade_of(density)]


def shade_names() -> list[str]:
    """Return what each shade of density stands for."""
    ends = [f"{100 * most:g}" for most in SHADES[:-2]]
    between = [f"{low}–{high} %" for low, high in itertools.pairwise(ends)]
    return [f"up to {ends[0]} %", *between, f"over {ends[-1]} %", "all"]


def _middle(head: int) -> int:
    return LEFT + CELL * head + CELL // 2
