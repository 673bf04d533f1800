"""What a search may choose from: every pattern's own suggestions, each at several densities."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dit_sparse.grid import Grid
from dit_sparse.patterns import PATTERNS, Cached, Dense, Pattern, StaticPattern, pattern_from_text
from dit_sparse.search.fitting import fit
from dit_sparse.search.planner.problem import MOST_FAMILIES

DENSITIES = (0.03, 0.06, 0.1, 0.16, 0.25, 0.4, 0.6)
REFRESH_STEPS = 3
FARTHEST = 0.5  # from the density asked for, as a share of it: what lies farther off serves another density


def suggested() -> tuple[str, ...]:
    """Return the patterns, as text, that the classes of PATTERNS suggest for a search."""
    return tuple(text for cls in PATTERNS.values() for text in cls.suggestions)


def candidates(
    grid: Grid,
    specs: Sequence[str] | None = None,
    densities: Sequence[float] = DENSITIES,
    refresh_steps: Sequence[int] = (1, REFRESH_STEPS),
    device: torch.device | str = "cpu",
) -> tuple[Pattern, ...]:
    """Fit every spec (default: `suggested`) to every density on a grid; dense comes first.

    Patterns that choose by content come once for each of refresh_steps: 1 chooses in every step, more keeps the choice
    for so many. A density that a pattern does not come near is left out, and so is a pattern that the grid refuses.

    Raises: ValueError for an unknown spec, for densities outside (0, 1] or where nothing is left to choose from.
    """
    for density in densities:
        if not 0.0 < density <= 1.0:
            raise ValueError(f"densities must be shares in (0, 1], got {density!r}")
    found: dict[Pattern, None] = {}
    refusals: list[str] = []
    for pattern in map(pattern_from_text, suggested() if specs is None else specs):
        for density in densities:
            try:
                fitted = fit(pattern, grid, density, device)
            except ValueError as refused:
                refusals.append(str(refused))
                continue
            if isinstance(fitted, Cached) and (fitted.residual or fitted.recall is not None):
                raise ValueError(
                    f"{fitted} cannot be scored call by call: its residual and its drift live over steps; give the "
                    "pattern alone, a search adds the reuse"
                )
            if isinstance(fitted, Dense) or not _near(fitted, grid, density, device):
                continue
            found |= dict.fromkeys(_refreshed(fitted, refresh_steps))
    if not found:
        why = f": {refusals[0]}" if refusals else ""
        raise ValueError(f"no candidate pattern fits the grid {grid} at densities {list(densities)}{why}")
    families = {pattern.family() for pattern in found if not isinstance(pattern, StaticPattern)}
    if len(families) >= MOST_FAMILIES:
        raise ValueError(
            f"{len(families)} families of patterns that choose by content, at most {MOST_FAMILIES - 1} can be weighed "
            "against each other beside dense; those with and without reuse count as two: offer fewer"
        )
    return (Dense(), *found)


def _near(pattern: Pattern, grid: Grid, density: float, device: torch.device | str) -> bool:
    if not isinstance(pattern, StaticPattern):
        return True
    return abs(pattern.densities(grid, device)[1] - density) <= FARTHEST * density


def _refreshed(pattern: Pattern, refresh_steps: Sequence[int]) -> list[Pattern]:
    if isinstance(pattern, (StaticPattern, Cached)):
        return [pattern]
    return [pattern if steps == 1 else Cached(pattern, steps) for steps in refresh_steps]
