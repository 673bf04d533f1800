"""Radial attention: the spatial window halves each time the distance in frames doubles."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from dit_sparse.grid import Grid
from dit_sparse.kernels.indices import BLOCK
from dit_sparse.masks import PAIRS_PER_CHUNK, Rule
from dit_sparse.order import TokenOrder
from dit_sparse.patterns.base import StaticPattern

KINDS = ("token", "block")
SETTINGS = 32


@dataclass(frozen=True, eq=False)
class Radial(StaticPattern):
    """Keep O(n log n) pairs: attention energy decays with distance in space and time, so does the window.

    kind `token` is the paper's rule: for frames at distance d and e = floor(log2 max(d, 1)), with s tokens a frame,
    keep |k - l| + 1 <= s / 2^e; where 2^e > s keep k = l only when d is a multiple of ceil(2^e / s).
    kind `block` is the rule of the published code, in raster blocks of 128: sparser, with `decay` narrowing the
    windows beyond neighbouring frames (Wan2.1-14B .2, Wan2.2 .8, HunyuanVideo .95).
    sink: keys of frame 0 are visible to all queries. order: token order for the kernel; `block` has raster only.

    Cost: built once per grid; in raster order `token` needs 1,757 distinct bit tiles at 21x30x52 and 863 at 21x45x80.
    Limits: `token` has no knob, its density follows from the grid (.51 at 21 frames; `with_density` names it); that of
    `block` follows `decay` down to where all windows are 128 tokens wide.

    Raises: ValueError for an unknown kind, a decay outside (0, 1], or a `block` in another order than raster.
    Paper: Radial Attention (arXiv 2506.19852), section 4; `block`: its released code, 2025-11.
    """

    name: ClassVar[str] = "radial"
    exact: ClassVar[str] = "token"
    knob: ClassVar[str | None] = "decay"
    suggestions: ClassVar[tuple[str, ...]] = ("radial:kind=block",)

    kind: str = "token"
    decay: float = 0.2
    sink: bool = True
    order: str = "raster"

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"Radial kind must be one of {', '.join(KINDS)}, got {self.kind!r}")
        if isinstance(self.decay, bool) or not isinstance(self.decay, (int, float)) or not 0.0 < self.decay <= 1.0:
            raise ValueError(f"Radial decay must be in (0, 1], got {self.decay!r}")
        if not isinstance(self.sink, bool):
            raise ValueError(f"Radial sink must be True or False, got {self.sink!r}")
        if TokenOrder.parse(self.order).kind != "raster" and self.kind == "block":
            raise ValueError(f"Radial kind='block' is made of raster blocks: use order='raster', got {self.order!r}")

    def check(self, grid: Grid) -> None:
        if self.kind == "block" and not bool(self.block_mask(grid).any(1).all()):
            raise ValueError(
                f"Radial kind='block' leaves queries without any key on the grid {grid}: frames of {grid.frame_tokens} "
                "tokens are too small for its rule; use kind='token'"
            )

    def knob_settings(self, grid: Grid) -> Sequence[Radial]:
        if self.kind == "token":
            return ()
        # below this decay every window beyond neighbouring frames has its least width
        floor = min(1.0, BLOCK / 2.0 ** (grid.frame_tokens.bit_length() - 2))
        steps = range(SETTINGS) if floor < 1.0 else (SETTINGS - 1,)
        return [replace(self, decay=round(floor ** (1 - step / (SETTINGS - 1)), 5)) for step in steps]

    def token_rule(self, grid: Grid, device: torch.device | str) -> Rule:
        if self.kind == "block":
            kept_blocks = self.block_mask(grid, device)
            return lambda q_index, k_index: kept_blocks[q_index // BLOCK, k_index // BLOCK]
        tokens, table = grid.frame_tokens, torch.tensor(token_windows(grid), device=device)

        def keep(q_index: Tensor, k_index: Tensor) -> Tensor:
            key_frame = k_index // tokens
            distance = (q_index // tokens - key_frame).abs()
            kept = (q_index % tokens - k_index % tokens).abs() <= table[distance]
            return kept | (key_frame == 0) if self.sink else kept

        return keep

    def block_mask(self, grid: Grid, device: torch.device | str = "cpu") -> Tensor:
        """Return the published block mask, bool [Q, Q] over raster blocks of 128 video tokens.

        A column of a block counts as dense where more than 1/3 of the block's queries see its key; the block is kept
        where more than .6 of the columns that are seen at all are dense.
        """
        table = torch.tensor(published_windows(grid, self.decay), device=device)
        first = torch.arange(0, grid.video_tokens, BLOCK, device=device)[:, None]  # of each query block
        slabs = first.split(max(1, PAIRS_PER_CHUNK // grid.video_tokens))
        return torch.cat([self._block_rows(grid, table, some) for some in slabs])

    def _block_rows(self, grid: Grid, table: Tensor, first: Tensor) -> Tensor:
        """Return rows of `block_mask`, bool [q, Q], for the query blocks that begin at raster tokens first [q, 1]."""
        tokens, video = grid.frame_tokens, grid.video_tokens
        last = (first + BLOCK).clamp(max=video) - 1
        key = torch.arange(video, device=first.device)[None]
        frame, place = key // tokens, key % tokens
        seen = torch.zeros(len(first), video, dtype=torch.int64, device=first.device)  # queries that see the key
        # The queries of a block are a run of places in each frame they touch: those within a window are counted.
        for touched in range(-(-(BLOCK - 1) // tokens) + 1):
            query_frame = first // tokens + touched
            low, high = query_frame * tokens, (query_frame + 1) * tokens - 1
            window = table[(query_frame - frame).abs().clamp(max=grid.frames - 1)]
            if self.sink:
                window = torch.where(frame == 0, tokens, window)
            begin = torch.maximum(torch.maximum(first, low) - low, place - window)
            end = torch.minimum(torch.minimum(last, high) - low, place + window)
            seen += (end - begin + 1).clamp(min=0)
        dense = seen * 3 > last - first + 1
        some, many = (
            torch.nn.functional.pad(flags, (0, -video % BLOCK)).unflatten(1, (-1, BLOCK)).sum(2)
            for flags in (seen > 0, dense)
        )
        return many * 5 > some * 3


def token_windows(grid: Grid) -> list[int]:
    """Return the paper's window for each distance in frames: |k - l| <= window; -1 keeps nothing."""
    tokens, windows = grid.frame_tokens, []
    for distance in range(grid.frames):
        power = 1 << (max(distance, 1).bit_length() - 1)
        if power <= tokens:
            windows.append(tokens // power - 1)
        else:
            windows.append(0 if distance % -(-power // tokens) == 0 else -1)
    return windows


def published_windows(grid: Grid, decay: float) -> list[int]:
    """Return the released code's window for each distance in frames: |k - l| <= window; -1 keeps nothing."""
    tokens, windows = grid.frame_tokens, []
    for distance in range(grid.frames):
        width = 2.0 ** (tokens.bit_length() - distance.bit_length())
        left_out = width < BLOCK and distance % int(BLOCK / width) != 0
        reach = float(tokens) if distance <= 1 else max(width * decay, float(BLOCK))
        windows.append(-1 if left_out else math.floor(reach))
    return windows
