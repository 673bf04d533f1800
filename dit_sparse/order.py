"""The order in which tokens reach the kernel, and the 128-token blocks they form there."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from dit_sparse.curves import gilbert, hilbert, morton, strips
from dit_sparse.grid import Grid
from dit_sparse.kernels.indices import BLOCK, segment_blocks

AXIS_LETTERS = "fhw"
KINDS = ("raster", "axes", "tile", "column", "strips", "morton", "hilbert", "gilbert")
# A tile may cost this much more padded work than the cheapest one when it is closer to a cube: near tokens then share
# a block, which is what block selection and windows live on.
TILE_SLACK = 1.07
# Frames of a block of strips times the cube root of a frame's tokens: the more tokens show the same picture, the more
# of them are alike side by side, and the fewer frames are left in a block. Fitted to the bundled model: of the strips
# tried on seven grids of 17 frames, this depth is the best in the mean of each group of grids (docs/measurements.md).
STRIP_DEPTH = 60.0


@dataclass(frozen=True)
class Layout:
    """Hold one grid in kernel order: video tokens permuted, then the text (prefix, suffix) as a segment of its own.

    `order` [N] int64 gives for each kernel position the token's index in the grid's own order (None: identity);
    `start`, `length` [K] int32 cut kernel positions in blocks of at most 128 that never straddle video and text.
    """

    grid: Grid
    order: Tensor | None
    start: Tensor
    length: Tensor
    video_blocks: int
    # video blocks grouped by their tokens: block numbers int64 [n], kernel positions of their tokens int64 [n, tokens]
    by_length: tuple[tuple[Tensor, Tensor], ...]

    @cached_property
    def inverse(self) -> Tensor | None:
        return None if self.order is None else torch.argsort(self.order)

    @cached_property
    def video_order(self) -> Tensor | None:
        """Return `order` for the video tokens alone, counted from the first of them."""
        return None if self.order is None else self.order[: self.grid.video_tokens] - self.grid.prefix

    @cached_property
    def video_inverse(self) -> Tensor | None:
        return None if self.video_order is None else torch.argsort(self.video_order)

    @cached_property
    def video_length(self) -> Tensor:
        """Return the tokens of each video block, fp32 [video_blocks]."""
        return self.length[: self.video_blocks].float()

    @cached_property
    def log_video_length(self) -> Tensor:
        return self.video_length.log()

    @property
    def blocks(self) -> int:
        return self.start.numel()

    def to_kernel(self, x: Tensor) -> Tensor:
        """Reorder [B, S, ...], where S is all tokens or the video tokens alone."""
        order = self.order if x.shape[1] == self.grid.tokens else self.video_order
        return x if order is None else x.index_select(1, order)

    def from_kernel(self, x: Tensor) -> Tensor:
        """Undo `to_kernel`."""
        inverse = self.inverse if x.shape[1] == self.grid.tokens else self.video_inverse
        return x if inverse is None else x.index_select(1, inverse)

    def video_index(self) -> Tensor:
        """Return [video_blocks, 128] int64: raster index of each video token by block, -1 past a short one."""
        video, row = self.grid.video_tokens, torch.arange(BLOCK, device=self.start.device)
        start, length = self.start[: self.video_blocks, None].long(), self.length[: self.video_blocks, None].long()
        position = (start + row).clamp(max=video - 1)
        raster = position if self.order is None else self.order[position] - self.grid.prefix
        return torch.where(row < length, raster, -1)


@dataclass(frozen=True)
class TokenOrder:
    """Choose the layout of video tokens for the kernel; the pattern's definition never changes with it.

    raster: as they come.
    axes: `axes` names f, h and w in the order in which they vary, the slowest first: fhw is raster, hwf puts the
        frames of a place side by side (the token-major order of Sparse VideoGen), all six are those of PAROAttention.
    tile: 3-D tiles of at most 128 tokens, ragged at the far borders, without a padding copy; `tile` fixes their
        (frames, height, width), None picks them per grid.
    column: tiles that span all frames, or as many as fit, over a patch as square as possible (VMoBA's 2-D chunks).
    strips: bars as wide as the grid, walked to and fro; `strip` says about how many (frames, rows) thick, None picks
        that per grid. Blocks are boxes but for their ends, and whole on any grid but for the last one.
    morton, hilbert, gilbert: space-filling curves, see `curves`.
    Blocks of all but `tile` and `column` are runs of 128 tokens.

    Raises:
        ValueError: unknown kind, a tile or strip of more than 128 tokens, or axes that are no permutation of fhw.
    Papers: PAROAttention (arXiv 2506.16054); Sparse VideoGen (arXiv 2502.01776); VMoBA (arXiv 2506.23858);
    Hilbert: DFSAttn (arXiv 2605.23445); generalised Hilbert: Jenga (arXiv 2505.16864).
    """

    kind: str = "raster"
    tile: tuple[int, int, int] | None = None
    axes: str | None = None
    strip: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"token order must be one of {', '.join(KINDS)}, got {self.kind!r}")
        if self.tile is not None:
            if self.kind != "tile":
                raise ValueError(f"only the order 'tile' takes a tile, got order {self.kind!r} with tile {self.tile}")
            if len(self.tile) != 3 or min(self.tile) < 1 or math.prod(self.tile) > BLOCK:
                raise ValueError(f"tile must be three sizes >= 1 of at most {BLOCK} tokens in all, got {self.tile}")
        if self.strip is not None:
            if self.kind != "strips":
                raise ValueError(f"only the order 'strips' takes a strip, got order {self.kind!r}, strip {self.strip}")
            if len(self.strip) != 2 or min(self.strip) < 1 or math.prod(self.strip) > BLOCK:
                raise ValueError(f"strip must be frames and rows >= 1, product at most {BLOCK}, got {self.strip}")
        if (self.kind == "axes") != (self.axes is not None):
            raise ValueError(f"the order 'axes' and no other takes axes, as in 'axes:hwf', got {self.kind!r}")
        if self.axes is not None and sorted(self.axes) != sorted(AXIS_LETTERS):
            raise ValueError(f"axes of a token order must name f, h and w once each, got {self.axes!r}")

    @classmethod
    def parse(cls, text: str) -> TokenOrder:
        """Read a kind, `tile:2x8x8`, `strips:4x4` or `axes:hwf`."""
        if not isinstance(text, str):
            raise ValueError(f"token order must be text such as 'tile:2x8x8', got {text!r}")
        kind, _, detail = text.partition(":")
        if not detail:
            return cls(kind)
        if kind == "axes":
            return cls(kind, axes=detail)
        try:
            sizes = tuple(int(part) for part in detail.split("x"))
        except ValueError:
            sizes = ()
        if len(sizes) != (2 if kind == "strips" else 3):
            raise ValueError(f"token order must look like 'tile:2x8x8', 'strips:4x4' or 'axes:hwf', got {text!r}")
        if kind == "strips":
            return cls(kind, strip=(sizes[0], sizes[1]))
        return cls(kind, (sizes[0], sizes[1], sizes[2]))

    def __str__(self) -> str:
        sizes = self.tile or self.strip
        detail = self.axes if sizes is None else "x".join(map(str, sizes))
        return self.kind if detail is None else f"{self.kind}:{detail}"

    def layout(self, grid: Grid, device: torch.device | str = "cpu") -> Layout:
        """Lay the grid out: see `Layout`."""
        video, lengths = self._video(grid)
        start, length = segment_blocks(lengths)
        video_blocks = start.numel()
        if grid.text_tokens:
            text_start, text_length = segment_blocks([grid.text_tokens])
            start = torch.cat([start, text_start + grid.video_tokens])
            length = torch.cat([length, text_length])
        prefix = torch.arange(grid.prefix)
        suffix = torch.arange(grid.prefix + grid.video_tokens, grid.tokens)
        order = torch.cat([video + grid.prefix, prefix, suffix])
        identity = bool((order == torch.arange(grid.tokens)).all())
        video_length = length[:video_blocks]
        by_length = []
        for tokens in video_length.unique():
            members = (video_length == tokens).nonzero().flatten()
            positions = start[members].long()[:, None] + torch.arange(int(tokens))
            by_length.append((members.to(device), positions.to(device)))
        kernel_order = None if identity else order.to(device)
        return Layout(grid, kernel_order, start.to(device), length.to(device), video_blocks, tuple(by_length))

    def _video(self, grid: Grid) -> tuple[Tensor, list[int]]:
        """Return the raster index of each video token in this order, and the lengths of runs that share no block."""
        match self.kind:
            case "tile":
                return _tile_order(grid, self.tile or choose_tile(grid.shape))
            case "column":
                return _tile_order(grid, choose_column(grid.shape))
        raster = torch.arange(grid.video_tokens)
        match self.kind:
            case "axes":
                order = raster.view(grid.shape).permute([AXIS_LETTERS.index(a) for a in self.axes or ""]).flatten()
            case "strips":
                order = strips(grid.shape, self.strip or choose_strip(grid.shape))
            case "morton":
                order = morton(grid.shape)
            case "hilbert":
                order = hilbert(grid.shape)
            case "gilbert":
                order = gilbert(grid.shape)
            case _:
                order = raster
        return order, [grid.video_tokens]


def choose_tile(shape: tuple[int, int, int]) -> tuple[int, int, int]:
    """Return the tile (frames, height, width) of at most 128 tokens with the least padded work on this grid.

    The work is the number of blocks; among tiles within 7 % of the fewest, the most cube-like one wins, because block
    selection and windows profit from tokens that are near in all three axes.
    """
    return _cheapest(shape, range(1, min(shape[0], BLOCK) + 1))


def choose_column(shape: tuple[int, int, int]) -> tuple[int, int, int]:
    """Return the tile of at most 128 tokens that spans all frames, or an equal share of them where they are more."""
    return _cheapest(shape, [math.ceil(shape[0] / math.ceil(shape[0] / BLOCK))])


def choose_strip(shape: tuple[int, int, int]) -> tuple[int, int]:
    """Return the strip (frames, rows) of blocks as wide as high: 9x4 on 17x16x16, 5x5 on 21x30x52, 1x11 on an image."""
    wanted = round(STRIP_DEPTH / (shape[1] * shape[2]) ** (1 / 3))
    frames = max(1, min(shape[0], wanted, BLOCK))
    return frames, max(1, round(math.sqrt(BLOCK / frames)))


def _cheapest(shape: tuple[int, int, int], frames: Iterable[int]) -> tuple[int, int, int]:
    """Choose among the tiles of so many frames."""
    candidates = [
        (t, h, w)
        for t in frames
        for h in range(1, min(shape[1], BLOCK // t) + 1)
        for w in range(1, min(shape[2], BLOCK // (t * h)) + 1)
    ]

    def blocks(tile: tuple[int, int, int]) -> int:
        return math.prod(math.ceil(n / size) for n, size in zip(shape, tile, strict=True))

    fewest = min(map(blocks, candidates))
    near = [tile for tile in candidates if blocks(tile) <= fewest * TILE_SLACK]
    return min(near, key=lambda tile: (sum(1 / size for size in tile), blocks(tile), tile))


def _tile_order(grid: Grid, tile: tuple[int, int, int]) -> tuple[Tensor, list[int]]:
    """Return the raster index of each token, tile after tile (tiles and tokens in them row-major), and tile lengths."""
    sizes = [[min(size, n - at) for at in range(0, n, size)] for n, size in zip(grid.shape, tile, strict=True)]
    lengths = [t * h * w for t, h, w in itertools.product(*sizes)]
    axes = torch.meshgrid(*(torch.arange(n) // size for n, size in zip(grid.shape, tile, strict=True)), indexing="ij")
    _, rows, columns = (len(axis) for axis in sizes)
    tile_index = (axes[0] * rows + axes[1]) * columns + axes[2]
    return torch.argsort(tile_index.flatten(), stable=True), lengths
