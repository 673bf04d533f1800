"""Patterns for comparisons: each set to one computed density, as near as it comes."""

from __future__ import annotations

import torch

from dit_sparse.grid import Grid
from dit_sparse.patterns import Pattern, StaticPattern


def fit(pattern: Pattern, grid: Grid, density: float, device: torch.device | str) -> Pattern:
    """Set a pattern's knob for a computed density on a grid, to the nearest that it reaches.

    Raises: ValueError where the pattern does not fit the grid at all.
    """
    if not isinstance(pattern, StaticPattern):
        targets = ("mass", "threshold", "recall", "error")
        free = pattern.knob == "keep" and all(getattr(pattern, name, None) is None for name in targets)
        return pattern.with_density(grid, density) if free else pattern
    if not pattern.knob_settings(grid) or (pattern.name, getattr(pattern, "clamp", "")) == ("neighborhood", "tile"):
        pattern.check(grid)
        return pattern
    return pattern.nearest(grid, density, device)[0]
