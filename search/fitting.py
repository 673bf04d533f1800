"""Patterns for comparisons: each set to one computed density, as near as it comes."""

from __future__ import annotations

import torch

from dit_sparse.grid import Grid
from dit_sparse.patterns import Pattern, StaticPattern

TARGETS = ("mass", "threshold", "recall", "error")  # with these the density follows from the content


def fit(pattern: Pattern, grid: Grid, density: float, device: torch.device | str) -> Pattern:
    """Set a pattern's knob for a computed density on a grid, to the nearest that it reaches.

    Raises: ValueError where the pattern does not fit the grid at all.
    """
    if not isinstance(pattern, StaticPattern):
        follows_content = any(getattr(pattern, name, None) is not None for name in TARGETS)
        return pattern if follows_content else pattern.with_density(grid, density, device)
    if not pattern.knob_settings(grid) or (pattern.name, getattr(pattern, "clamp", "")) == ("neighborhood", "tile"):
        pattern.check(grid)
        return pattern
    return pattern.nearest(grid, density, device)[0]
