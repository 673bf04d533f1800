"""3-D neighborhood attention: each query reads a window of keys around it."""

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
CLAMPS = ("token", "tile")
SETTINGS = 48


@dataclass(frozen=True, eq=False)
class Neighborhood(StaticPattern):
    """Attend to `window` keys per axis around the query; at borders the window is shifted inwards, never cut.

    window: tokens (int) or fraction of the axis (float), one value or (frames, height, width).
    stride: queries per group that share one window, the window of the group's leader.
    dilation: distance between the keys of a window; only keys of the query's residue class are visible.
    causal: per axis, no key after the query; such a window shrinks at the near border.
    clamp: what is shifted at borders. `token` is the rule above, generalized neighborhood attention. `tile` is sliding
    tile attention: tiles of `stride` tokens per axis, the last one possibly smaller; the n tiles of an axis and a
    window of k of them keep the key tiles at most k // 2 from the query's tile, or from the nearest tile that lies
    k // 2 from both ends. So an even k sees k + 1 tiles, except that k = n sees all n. With odd k and tiles that
    divide the axis the two rules agree. A fraction is then one of n; a window in tokens must be whole tiles.
    order: token order for the kernel; with clamp='tile', tiles that divide `stride` read whole blocks.
    `with_density` sets the same fraction on all axes.

    Cost: built once per grid, the density is the product of window / axis. Limits: in whole blocks of 128 small windows
    cost several times that. Sizes of 1 are fine, unlike in NATTEN.

    Raises: ValueError for sizes out of range; for a window or window times dilation beyond an axis; stride > window;
    dilation or causal with clamp='tile', or a window there that is not whole tiles.
    Paper: Generalized Neighborhood Attention (arXiv 2504.16922), section 3; Fast Video Generation with Sliding Tile
    Attention (arXiv 2502.04507), section 3.
    """

    name: ClassVar[str] = "neighborhood"
    exact: ClassVar[str] = "token"
    knob: ClassVar[str | None] = "window"
    suggestions: ClassVar[tuple[str, ...]] = ("neighborhood",)

    window: AxisSize = 0.5
    stride: int | tuple[int, int, int] = 1
    dilation: int | tuple[int, int, int] = 1
    causal: bool | tuple[bool, bool, bool] = False
    order: str = "tile"
    clamp: str = "token"

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
        if self.clamp not in CLAMPS:
            raise ValueError(f"Neighborhood clamp must be one of {', '.join(CLAMPS)}, got {self.clamp!r}")
        plain = set(per_axis(self.dilation, "dilation")) == {1} and not any(per_axis(self.causal, "causal"))
        if self.clamp == "tile" and not plain:
            raise ValueError(
                "Neighborhood clamp='tile' knows neither dilation nor causal windows, got "
                f"dilation={self.dilation}, causal={self.causal}; use clamp='token'"
            )
        TokenOrder.parse(self.order)

    def window_tokens(self, grid: Grid) -> tuple[int, int, int]:
        """Return the window in tokens on this grid; with clamp='tile' always whole tiles, the last one's too."""
        sizes = zip(
            per_axis(self.window, "window"), grid.shape, per_axis(self.stride, "stride"),
            per_axis(self.dilation, "dilation"), strict=True,
        )  # fmt: skip
        frames, height, width = (self._axis_window(*arguments) for arguments in sizes)
        return frames, height, width

    def _axis_window(self, window: int | float, tokens: int, stride: int, dilation: int) -> int:
        if self.clamp == "tile":
            return window if isinstance(window, int) else axis_tokens(window, -(-tokens // stride)) * stride
        rounded = axis_tokens(window, tokens)
        # half of an axis with every other key fits, also where the half was rounded up
        fits = isinstance(window, float) and window * dilation <= 1.0
        return max(1, min(rounded, tokens // dilation)) if fits else rounded

    def check(self, grid: Grid) -> None:
        windows, strides = self.window_tokens(grid), per_axis(self.stride, "stride")
        dilations = per_axis(self.dilation, "dilation")
        for axis, tokens, window, stride, dilation in zip(AXES, grid.shape, windows, strides, dilations, strict=True):
            room = tokens if self.clamp == "token" else -(-tokens // stride) * stride
            if window > room:
                raise ValueError(
                    f"Neighborhood window must fit the axis, got {axis} window={window} on {tokens} tokens "
                    f"(grid {grid}); use at most {room}, or a fraction such as 0.5"
                )
            if self.clamp == "tile" and window % stride:
                raise ValueError(
                    f"Neighborhood window must be whole tiles with clamp='tile', got {axis} window={window} and tiles "
                    f"of stride={stride} tokens; use {max(1, window // stride) * stride}, or a fraction such as 0.5"
                )
            if window * dilation > room:
                raise ValueError(
                    f"Neighborhood window * dilation must fit the axis, got {axis} {window} * {dilation} on {tokens}"
                )
            if stride > window:
                raise ValueError(f"Neighborhood stride must be <= window, got {axis} stride={stride}, window={window}")

    def knob_settings(self, grid: Grid) -> Sequence[Neighborhood]:
        settings: dict[tuple[int, int, int], Neighborhood] = {}
        for step in range(1, SETTINGS + 1):
            one = replace(self, window=round(step / SETTINGS, 4))
            try:
                one.check(grid)
            except ValueError:  # smaller than the stride, or too large with the dilation
                continue
            settings.setdefault(one.window_tokens(grid), one)
        return list(settings.values())

    def token_rule(self, grid: Grid, device: torch.device | str) -> Rule:
        # Kept pairs are the product of three one-axis rules, so each is a small table that the indices look up.
        windows, strides = self.window_tokens(grid), per_axis(self.stride, "stride")
        if self.clamp == "tile":
            tables = [tile_axis_mask(*sizes) for sizes in zip(grid.shape, windows, strides, strict=True)]
        else:
            dilations, causals = per_axis(self.dilation, "dilation"), per_axis(self.causal, "causal")
            tables = [axis_mask(*sizes) for sizes in zip(grid.shape, windows, strides, dilations, causals, strict=True)]
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


def tile_axis_mask(tokens: int, window: int, tile: int) -> Tensor:
    """Return the one-axis rule of clamp='tile', bool [tokens, tokens] (query, key); window: tokens, whole tiles."""
    tile_of = torch.arange(tokens) // tile
    tiles, reach = -(-tokens // tile), window // tile // 2
    # where the range is empty (an even window of all tiles) its upper end counts, and all tiles are near enough
    centre = tile_of.clamp(min=reach, max=tiles - 1 - reach)
    return (centre[:, None] - tile_of).abs() <= reach
