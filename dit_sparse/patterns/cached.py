"""Reuse a selection over denoising steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from dit_sparse.grid import Grid
from dit_sparse.order import TokenOrder
from dit_sparse.patterns.base import Pattern, PatternState, Selection


@dataclass(frozen=True)
class Cached(Pattern):
    """Select with `pattern` every `refresh_steps` denoising steps and reuse the blocks in between.

    What is remembered belongs to one run, branch (conditional, unconditional or both in a batch), layer, transformer
    and shape; a new run starts afresh. Where no step is known, calls are counted instead.

    Raises: ValueError for refresh_steps < 1 or a pattern that is none.
    Paper: AdaSpa (arXiv 2502.21079), section 4: masks change slowly over the steps.
    """

    name: ClassVar[str] = "cached"
    exact: ClassVar[str] = "block"

    pattern: Pattern
    refresh_steps: int = 4

    def __post_init__(self) -> None:
        if not isinstance(self.pattern, Pattern):
            raise ValueError(f"Cached pattern must be a Pattern, got {self.pattern!r}")
        if isinstance(self.refresh_steps, bool) or not isinstance(self.refresh_steps, int) or self.refresh_steps < 1:
            raise ValueError(f"Cached refresh_steps must be an int >= 1, got {self.refresh_steps!r}")

    def check(self, grid: Grid) -> None:
        self.pattern.check(grid)

    def token_order(self) -> TokenOrder:
        return self.pattern.token_order()

    def select(self, q: Tensor, k: Tensor, grid: Grid, state: PatternState) -> Selection:
        calls = state.memory.get("calls", 0)
        step = calls if state.step is None else state.step
        state.memory["calls"] = calls + 1
        age = step - state.memory.get("step", step)
        if "selection" not in state.memory or not 0 <= age < self.refresh_steps:
            state.memory["selection"] = self.pattern.select(q, k, grid, state)
            state.memory["step"] = step
        selection: Selection = state.memory["selection"]
        return selection
