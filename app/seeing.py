"""Pictures of a plan for the page: its heads as a map, and the blocks that one head reads."""

from __future__ import annotations

import functools
import html
from collections.abc import Iterable

import torch
from PIL import Image

from dit_sparse.app.choice import Choice, static_part
from dit_sparse.grid import Grid
from dit_sparse.patterns import Cached, Dense, Pattern, StaticPattern, TopBlocks
from dit_sparse.plan import Plan, format_indices
from dit_sparse.search.heads_map import COLOURS, UNKNOWN_COLOUR, Cell, draw, kind_of, kinds_of, shade_names
from dit_sparse.search.pictures import MOST_MADE_UP_TOKENS, block_shades, enlarged

MAP_SCALE = 1.6
WORDS = {"full": "black", "partial": "grey", "stood for": "light grey", "empty": "white"}  # the shades of PALETTE
DENSITIES_KEPT = 256
SWATCH = "display:inline-block;width:1em;height:1em;border:1px solid #888;vertical-align:-.1em"
LIST = "list-style:none;display:flex;flex-wrap:wrap;gap:.2em .9em;margin:.5em 0;padding:0"


def plan_map(
    plan: Plan, grid: Grid, layers: int, heads: int, fraction: float | None, transformer: str = "transformer"
) -> str:
    """Draw the heads of a transformer at a part of the schedule, as HTML: a map, its legend, and the same as text.

    The shade is what `known_density` says; heads whose density the content decides have a colour of their own.

    Raises:
        ValueError: a pattern does not fit the grid.
    """
    plan = plan.for_depth(layers)
    patterns = [plan.patterns_at(fraction, transformer, layer, heads) for layer in range(layers)]
    here = {pattern: known_density(pattern, grid) for row in patterns for pattern in row}
    rows = [
        (layer, [_cell(layer, head, pattern, here[pattern]) for head, pattern in enumerate(row)])
        for layer, row in enumerate(patterns)
    ]
    when = "" if fraction is None else f" at {100 * fraction:.0f} % of the steps"
    kinds = kinds_of([str(pattern) for row in patterns for pattern in row])
    shades = [*zip(COLOURS, shade_names(), strict=True)]
    shades += [(UNKNOWN_COLOUR, "the content decides")] if None in here.values() else []
    lines = [line for layer, row in enumerate(patterns) for line in _lines(layer, row, here)]
    return "\n".join(
        [
            '<figure style="margin:0">',
            f"<figcaption>{html.escape(transformer)}{when}: layers down, heads across</figcaption>",
            draw(rows, f"Pattern of each layer and head of {transformer}{when}", MAP_SCALE),
            f'<ul style="{LIST}" aria-label="Letters">',
            *(f"<li><b>{letter}</b> {html.escape(name)} ({count} heads)</li>" for letter, name, count in kinds),
            "</ul>",
            f'<ul style="{LIST}" aria-label="Shades"><li>pairs computed:</li>',
            *(f'<li><i style="{SWATCH};background:{colour}"></i> {html.escape(name)}</li>' for colour, name in shades),
            "</ul>",
            "<details><summary>The map as text</summary><ul>",
            *(f"<li>{html.escape(line)}</li>" for line in lines),
            "</ul></details>",
            "</figure>",
        ]
    )


def known_density(pattern: Pattern, grid: Grid) -> float | None:
    """Return the computed density of a static pattern, or the budget of `TopBlocks`; None where the content decides.

    A large grid is told from some of its query blocks, as `plans show` does.

    Raises:
        ValueError: the pattern does not fit the grid.
    """
    static = static_part(pattern)
    if static is not None:
        return 1.0 if isinstance(static, Dense) else _computed_density(static, grid)
    inner = pattern.pattern if isinstance(pattern, Cached) and pattern.densities is None else pattern
    if isinstance(inner, TopBlocks) and inner.heads == "equal" and isinstance(inner.keep, (int, float)):
        return float(inner.keep)
    return None


def mask_image(choice: Choice) -> Image.Image:
    """Draw a head's blocks in the shades of `PALETTE`: query blocks down, key blocks across, in kernel order."""
    shades = enlarged(block_shades(choice.indices, choice.compensate)[0])
    return Image.fromarray(shades.to(torch.uint8).numpy())


def mask_text(choice: Choice) -> str:
    """Say what a mask image shows: its legend with the number of blocks of each shade."""
    read, partial = choice.indices.block_mask()[0], choice.indices.partial_mask()[0]
    skipped = "left out, their means stand for them" if choice.compensate else "left out"
    shown = {
        "full": ("read whole", int((read & ~partial).sum())),
        "partial": ("read in part", int(partial.sum())),
        "stood for" if choice.compensate else "empty": (skipped, int((~read).sum())),
    }
    counts = "; ".join(f"{WORDS[name]}: {what} ({count:,})" for name, (what, count) in shown.items())
    of_text = choice.layout.blocks - choice.layout.video_blocks
    last = f", the last {of_text} of them text" if of_text else ""
    return (
        f"{choice.pattern} on the grid {choice.grid}: {read.shape[0]} query blocks down, {read.shape[1]} key blocks "
        f"across{last}. Of the blocks, {counts}."
    )


def _cell(layer: int, head: int, pattern: Pattern, density: float | None) -> Cell:
    return Cell(density, kind_of(str(pattern))[0], f"layer {layer}, head {head}: {pattern}, {_density_text(density)}")


def _lines(layer: int, row: Iterable[Pattern], densities: dict[Pattern, float | None]) -> list[str]:
    """Return a line of text for each pattern in a layer."""
    heads: dict[Pattern, list[int]] = {}
    for head, pattern in enumerate(row):
        heads.setdefault(pattern, []).append(head)
    return [
        f"layer {layer}, heads {format_indices(tuple(some))}: {pattern}, {_density_text(densities[pattern])}"
        for pattern, some in heads.items()
    ]


def _density_text(density: float | None) -> str:
    return "density decided by the content" if density is None else f"density {density:.3f}"


@functools.lru_cache(maxsize=DENSITIES_KEPT)
def _computed_density(pattern: StaticPattern, grid: Grid) -> float:
    if grid.tokens > MOST_MADE_UP_TOKENS:
        return pattern.densities(grid)[1]
    return pattern.densities(grid, sampled_blocks=None)[1]
