"""Powers: each axis is read at distances that double."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from dit_sparse.grid import AXES, Grid, axis_tokens, check_axis_size, per_axis
from dit_sparse.masks import Rule
from dit_sparse.order import TokenOrder
from dit_sparse.patterns.base import StaticPattern

AxisSize = int | float | tuple[int | float, int | float, int | float]
SETTINGS = 48


@dataclass(frozen=True, eq=False)
class Powers(StaticPattern):
    """Keep keys whose distance on every axis is, in units, 0 or a power of two, or lies in a local window.

    With coordinates a, b of query and key on one axis and u its unit in tokens, the axis lets the pair pass when
    |a // u - b // u| is 0, 1, 2, 4, 8, ..., or when |a - b| <= window; a pair is kept when all three axes let it pass.
    One layer carries something over a power of two, d layers over any distance with d bits set.
    unit: tokens of a unit, one value or (frames, height, width). An order whose tiles are the units reads whole blocks.
    window: tokens on either side (0: none) or share of the axis, one value or (frames, height, width); the knob.
    sink: keys of frame 0 are visible to all queries. order: token order for the kernel.

    Cost: the mask is built once per grid; each axis of n units lets about (2 log2(n) + 1) / n of the pairs pass, in
    all O(log^3 N) keys a query. Limits: on the few units that an axis of a video has, the logarithm saves little: of
    blocks that are cubes of 4x4x8 tokens 41 % stay at 21x30x52, of the flat default units 26 %; units smaller than the
    kernel's tiles keep fewer tokens in as many blocks. The paper's rule is causal and 1-D, on blocks of text.

    Raises: ValueError for a unit below 1, or a window that is neither tokens >= 0 nor a share in (0, 1].
    Paper: PowerAttention (arXiv 2503.03588), section 3; the product over three axes is ours.
    """

    name: ClassVar[str] = "powers"
    exact: ClassVar[str] = "token"
    knob: ClassVar[str | None] = "window"

    unit: int | tuple[int, int, int] = (1, 4, 32)
    window: AxisSize = 0
    sink: bool = False
    order: str = "tile:1x4x32"

    def __post_init__(self) -> None:
        for axis, size in zip(AXES, per_axis(self.unit, "unit"), strict=True):
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise ValueError(f"Powers unit ({axis}) must be an int >= 1, got {size!r}")
        for axis, reach in zip(AXES, per_axis(self.window, "window"), strict=True):
            if isinstance(reach, bool) or reach != 0:
                check_axis_size(reach, f"Powers window ({axis}), where it is not 0,")
        if not isinstance(self.sink, bool):
            raise ValueError(f"Powers sink must be True or False, got {self.sink!r}")
        TokenOrder.parse(self.order)

    def knob_settings(self, grid: Grid) -> Sequence[Powers]:
        shares = [round((step / SETTINGS) ** 2, 5) for step in range(1, SETTINGS + 1)]
        return [replace(self, window=0), *(replace(self, window=share) for share in shares)]

    def token_rule(self, grid: Grid, device: torch.device | str) -> Rule:
        sizes = zip(grid.shape, per_axis(self.unit, "unit"), per_axis(self.window, "window"), strict=True)
        frames, height, width = (
            power_axis_mask(tokens, unit, axis_tokens(window, tokens) if window else 0).to(device)
            for tokens, unit, window in sizes
        )
        frame_tokens, row_tokens = grid.frame_tokens, grid.width

        def keep(q_index: Tensor, k_index: Tensor) -> Tensor:
            key_frame = k_index // frame_tokens
            kept = frames[q_index // frame_tokens, key_frame]
            kept = kept & height[q_index // row_tokens % grid.height, k_index // row_tokens % grid.height]
            kept = kept & width[q_index % row_tokens, k_index % row_tokens]
            return kept | (key_frame == 0) if self.sink else kept

        return keep


def power_axis_mask(tokens: int, unit: int, window: int) -> Tensor:
    """Return the one-axis rule, bool [tokens, tokens] (query, key)."""
    place = torch.arange(tokens)
    units = (place[:, None] // unit - place // unit).abs()
    return ((units & (units - 1)) == 0) | ((place[:, None] - place).abs() <= window)
