"""Strided: each head reads every n-th tile, and the heads share the tiles among them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from dit_sparse.grid import AXES, Grid, per_axis
from dit_sparse.masks import Rule
from dit_sparse.order import TokenOrder
from dit_sparse.patterns.base import SAMPLED_BLOCKS, StaticPattern

SPARSEST_STRIDE = 48
# Phases that tell the density where only some query blocks do: phases differ by a tile or so.
SAMPLED_PHASES = 4


@dataclass(frozen=True, eq=False)
class Strided(StaticPattern):
    """Keep the tiles around the query's own, and of all others those whose turn it is for the head.

    Tile (a, b, c) on the grid of tiles has its turn in phase (a + b + c) mod stride, so that each line of tiles holds
    all phases. Head h takes phase h mod stride: `stride` heads in a row read everything between them. Fewer heads take
    phases that are spread evenly. Heads are counted among those that have this pattern.
    stride: phases; the knob. tile: tokens of a tile, one value or (frames, height, width); those at the far borders
    may be smaller. local: tiles on either side that every head reads, one value or (frames, height, width).
    phase: fix one phase for all heads, e.g. where a plan names the heads; None lets them take turns.
    order: token order for the kernel; one with the same tiles reads whole blocks.

    Cost: the masks of all phases are built once per grid. The density is about 1 / stride plus the share of the local
    tiles. Limits: it takes at least `stride` heads to cover everything, and a head has one phase in all layers. The
    paper trains with the mask, on runs of text and with dense first layers.

    Raises: ValueError for a stride or tile below 1, a negative local or a phase outside 0..stride - 1.
    Paper: S2-Attention (arXiv 2407.17678), section 3: context shared among heads.
    """

    name: ClassVar[str] = "strided"
    exact: ClassVar[str] = "token"
    knob: ClassVar[str | None] = "stride"

    stride: int = 4
    tile: int | tuple[int, int, int] = (4, 4, 8)
    local: int | tuple[int, int, int] = 1
    phase: int | None = None
    order: str = "tile:4x4x8"

    def __post_init__(self) -> None:
        _check_count(self.stride, 1, "stride")
        for axis, size, local in zip(AXES, per_axis(self.tile, "tile"), per_axis(self.local, "local"), strict=True):
            _check_count(size, 1, f"tile ({axis})")
            _check_count(local, 0, f"local ({axis})")
        if self.phase is not None:
            _check_count(self.phase, 0, "phase")
            if self.phase >= self.stride:
                raise ValueError(
                    f"Strided phase must be in 0..stride - 1 = {self.stride - 1}, or None for heads that take turns, "
                    f"got {self.phase}"
                )
        TokenOrder.parse(self.order)

    def variants(self, grid: Grid) -> Sequence[Strided]:
        return (self,) if self.phase is not None else [replace(self, phase=turn) for turn in range(self.stride)]

    def knob_settings(self, grid: Grid) -> Sequence[Strided]:
        strides = range(max(SPARSEST_STRIDE, (self.phase or 0) + 1), self.phase or 0, -1)
        return [replace(self, stride=stride) for stride in strides]

    def densities(
        self, grid: Grid, device: torch.device | str = "cpu", sampled_blocks: int | None = SAMPLED_BLOCKS
    ) -> tuple[float, float]:
        if self.phase is not None or sampled_blocks is None or self.stride <= SAMPLED_PHASES:
            return super().densities(grid, device, sampled_blocks)
        turns = [turn * self.stride // SAMPLED_PHASES for turn in range(SAMPLED_PHASES)]
        found = [replace(self, phase=turn).densities(grid, device, sampled_blocks) for turn in turns]
        return sum(one[0] for one in found) / len(found), sum(one[1] for one in found) / len(found)

    def token_rule(self, grid: Grid, device: torch.device | str) -> Rule:
        """Return the definition for the one phase; where heads take turns, for the first head."""
        tiles, local = per_axis(self.tile, "tile"), per_axis(self.local, "local")
        turn, steps_to_next = self.phase or 0, (grid.frame_tokens, grid.width, 1)

        def keep(q_index: Tensor, k_index: Tensor) -> Tensor:
            near = torch.ones((), dtype=torch.bool, device=q_index.device)
            number = torch.zeros_like(k_index)
            for tokens, after, size, reach in zip(grid.shape, steps_to_next, tiles, local, strict=True):
                key_tile = k_index // after % tokens // size
                near = near & ((q_index // after % tokens // size - key_tile).abs() <= reach)
                number = number + key_tile
            return near | (number % self.stride == turn)

        return keep


def _check_count(value: object, least: int, what: str) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"Strided {what} must be an int >= {least}, got {value!r}")
