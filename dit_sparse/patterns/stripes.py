"""Stripes: the three static shapes that the attention maps of video transformers show."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from dit_sparse.grid import Grid, axis_tokens, check_axis_size
from dit_sparse.kernels.indices import BLOCK
from dit_sparse.masks import Rule
from dit_sparse.order import TokenOrder
from dit_sparse.patterns.base import StaticPattern

# The order in which each kind is a band of few blocks: the same place in all frames stands together in axes:hwf.
ORDER_OF_KIND = {"diagonal": "raster", "multi-diagonal": "axes:hwf", "vertical": "raster"}
SETTINGS = 48


@dataclass(frozen=True, eq=False)
class Stripes(StaticPattern):
    """Keep a band around the diagonal, the same band in every pair of frames, or a few columns of keys.

    With q, k raster indices of N video tokens, s of them in a frame, and w the width in tokens:
    `diagonal`: |q - k| <= w; a float width is a share of N.
    `multi-diagonal`: |q mod s - k mod s| <= w, the same places in every frame; a float width is a share of s.
    `vertical`: every query reads ceil(w / 128) stripes of 128 keys, spread evenly over the raster order from its first
    token on, and the keys within 128 of itself; a float width is a share of N.
    order: token order for the kernel; None is raster, and axes:hwf (all frames of one place) for multi-diagonal.

    Cost: the mask is built once per grid; its density is about 2 width - width^2 for the bands and width for the
    columns. Limits: the paper gives the shapes and no numbers, so band edges and columns are ours; its columns are
    found by an offline search per head, these are not. The paper's skip mode is `Skip`, its search is a plan's work.

    Raises: ValueError for an unknown kind, or a width that is neither tokens >= 1 nor a share in (0, 1].
    Paper: Sparse-vDiT (arXiv 2506.03065), section 3.
    """

    name: ClassVar[str] = "stripes"
    exact: ClassVar[str] = "token"
    knob: ClassVar[str | None] = "width"
    suggestions: ClassVar[tuple[str, ...]] = (
        "stripes:kind=diagonal",
        "stripes:kind=multi-diagonal",
        "stripes:kind=vertical",
    )

    kind: str = "multi-diagonal"
    width: int | float = 0.1
    order: str | None = None

    def __post_init__(self) -> None:
        if self.kind not in ORDER_OF_KIND:
            raise ValueError(f"Stripes kind must be one of {', '.join(ORDER_OF_KIND)}, got {self.kind!r}")
        check_axis_size(self.width, "Stripes width")
        self.token_order()

    def token_order(self) -> TokenOrder:
        return TokenOrder.parse(ORDER_OF_KIND[self.kind] if self.order is None else self.order)

    def width_tokens(self, grid: Grid) -> int:
        """Return the width in tokens on this grid."""
        return axis_tokens(self.width, grid.frame_tokens if self.kind == "multi-diagonal" else grid.video_tokens)

    def knob_settings(self, grid: Grid) -> Sequence[Stripes]:
        return [replace(self, width=round((step / SETTINGS) ** 2, 5)) for step in range(1, SETTINGS + 1)]

    def token_rule(self, grid: Grid, device: torch.device | str) -> Rule:
        width = self.width_tokens(grid)
        if self.kind == "diagonal":
            return lambda q, k: (q - k).abs() <= width
        if self.kind == "multi-diagonal":
            place = grid.frame_tokens
            return lambda q, k: (q % place - k % place).abs() <= width
        columns = self.stripe_columns(grid).to(device)
        return lambda q, k: columns[k // BLOCK] | ((q - k).abs() <= BLOCK)

    def stripe_columns(self, grid: Grid) -> Tensor:
        """Return which runs of 128 raster tokens are the columns of kind `vertical`, bool [runs]."""
        runs = -(-grid.video_tokens // BLOCK)
        count = min(runs, -(-self.width_tokens(grid) // BLOCK))
        chosen = torch.zeros(runs, dtype=torch.bool)
        chosen[torch.arange(count) * runs // count] = True
        return chosen
