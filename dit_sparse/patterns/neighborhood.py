"""3-D neighborhood attention: each query reads a window of keys around it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dit_sparse.grid import AXES, Grid, axis_tokens, check_axis_size, per_axis
from dit_sparse.order import TokenOrder
from dit_sparse.patterns.base import StaticPattern

AxisSize = int | float | tuple[int | float, int | float, int | float]


@dataclass(frozen=True)
class Neighborhood(StaticPattern):
    """Attend to `window` keys per axis around the query; at borders the window is shifted inwards, never cut.

    window: tokens (int) or fraction of the axis (float), one value or (frames, height, width).
    stride: queries per group that share one window, the window of the group's leader.
    dilation: distance between the keys of a window; only keys of the query's residue class are visible.
    causal: per axis, no key after the query; such a window shrinks at the near border.
    order: token order for the kernel.

    Raises: ValueError for sizes out of range; for a window or window times dilation beyond an axis; stride > window.
    Paper: Generalized Neighborhood Attention (arXiv 2504.16922), section 3.
    """

    name: ClassVar[str] = "neighborhood"
    exact: ClassVar[str] = "token"

    window: AxisSize = 0.5
    stride: int | tuple[int, int, int] = 1
    dilation: int | tuple[int, int, int] = 1
    causal: bool | tuple[bool, bool, bool] = False
    order: str = "tile"

    def __post_init__(self) -> None:
        for axis, size in zip(AXES, per_axis(self.window, "window"), strict=True):
            check_axis_size(size, f"Neighborhood window ({axis})")
        for field_name in ("stride", "dilation"):
            for axis, size in zip(AXES, per_axis(getattr(self, field_name), field_name), strict=True):
                if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                    raise ValueError(f"Neighborhood {field_name} ({axis}) must be an int >= 1, got {size!r}")
        for axis, flag in zip(AXES, per_axis(self.causal, "causal"), strict=True):
            if not isinstance(flag, bool):
                raise ValueError(f"Neighborhood causal ({axis}) must be True or False, got {flag!r}")
        TokenOrder.parse(self.order)

    def window_tokens(self, grid: Grid) -> tuple[int, int, int]:
        """Return the window in tokens on this grid."""
        frames, height, width = per_axis(self.window, "window")
        return (
            axis_tokens(frames, grid.frames), axis_tokens(height, grid.height), axis_tokens(width, grid.width)
        )  # fmt: skip

    def check(self, grid: Grid) -> None:
        windows, strides = self.window_tokens(grid), per_axis(self.stride, "stride")
        dilations = per_axis(self.dilation, "dilation")
        for axis, tokens, window, stride, dilation in zip(AXES, grid.shape, windows, strides, dilations, strict=True):
            if window > tokens:
                raise ValueError(
                    f"Neighborhood window must fit the axis, got {axis} window={window} on {tokens} tokens "
                    f"(grid {grid}); use at most {tokens}, or a fraction such as 0.5"
                )
            if window * dilation > tokens:
                raise ValueError(
                    f"Neighborhood window * dilation must fit the axis, got {axis} {window} * {dilation} on {tokens}"
                )
            if stride > window:
                raise ValueError(f"Neighborhood stride must be <= window, got {axis} stride={stride}, window={window}")

    def token_rule(self, grid: Grid, device: torch.device | str) -> Callable[[Tensor, Tensor], Tensor]:
        # Kept pairs are the product of three one-axis rules, so each is a small table that the indices look up.
        sizes = zip(
            grid.shape, self.window_tokens(grid), per_axis(self.stride, "stride"), per_axis(self.dilation, "dilation"),
            per_axis(self.causal, "causal"), strict=True,
        )  # fmt: skip
        tables = [axis_mask(*arguments) for arguments in sizes]
        axes = [
            (table.to(device), tokens, tokens_after)
            for table, tokens, tokens_after in zip(tables, grid.shape, (grid.frame_tokens, grid.width, 1), strict=True)
            if not bool(table.all())
        ]

        def keep(q_index: Tensor, k_index: Tensor) -> Tensor:
            kept = torch.ones((), dtype=torch.bool, device=device)
            for table, tokens, after in axes:
                kept = kept & table[q_index // after % tokens, k_index // after % tokens]
            return kept.expand(torch.broadcast_shapes(q_index.shape, k_index.shape))

        return keep


def axis_mask(tokens: int, window: int, stride: int = 1, dilation: int = 1, causal: bool = False) -> Tensor:
    """Return the one-axis rule, bool [tokens, tokens] (query, key)."""
    place = torch.arange(tokens)
    group, inner = place % dilation, place // dilation
    group_tokens = (tokens - group + dilation - 1) // dilation
    first_of_stride = inner // stride * stride
    leader = torch.minimum(first_of_stride + (stride - 1 if causal else stride // 2), group_tokens - 1)
    if causal:
        start, end = (leader - window + 1).clamp(min=0), inner + 1
    else:
        start = torch.minimum((leader - window // 2).clamp(min=0), group_tokens - window)
        end = start + window
    inside = (inner >= start[:, None]) & (inner < end[:, None])
    return inside & (group == group[:, None])
