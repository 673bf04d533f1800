"""Radial attention: the spatial window halves each time the distance in frames doubles."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dit_sparse.grid import Grid
from dit_sparse.kernels.indices import BLOCK
from dit_sparse.patterns.base import PAIRS_PER_CHUNK, StaticPattern

KINDS = ("token", "block")
# The published code keeps a block where more than .6 of its non-empty columns are more than a third full.
COLUMN_SHARE, BLOCK_SHARE = 1 / 3, 0.6


@dataclass(frozen=True)
class Radial(StaticPattern):
    """Keep O(n log n) pairs: attention energy decays with distance in space and time, so does the window.

    kind `token` is the paper's rule: for frames at distance d and e = floor(log2 max(d, 1)), with s tokens a frame,
    keep |k - l| + 1 <= s / 2^e; where 2^e > s keep k = l only when d is a multiple of ceil(2^e / s).
    kind `block` is the rule of the published code, in raster blocks of 128: sparser, with `decay` narrowing the
    windows beyond neighbouring frames (Wan2.1-14B .2, Wan2.2 .8, HunyuanVideo .95).
    sink: keys of frame 0 are visible to all queries.

    Paper: Radial Attention (arXiv 2506.19852), section 4; `block`: its released code, 2025-11.
    """

    name: ClassVar[str] = "radial"
    exact: ClassVar[str] = "token"

    kind: str = "token"
    decay: float = 0.2
    sink: bool = True

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"Radial kind must be one of {', '.join(KINDS)}, got {self.kind!r}")
        if not isinstance(self.decay, (int, float)) or not 0.0 < self.decay <= 1.0:
            raise ValueError(f"Radial decay must be in (0, 1], got {self.decay!r}")
        if not isinstance(self.sink, bool):
            raise ValueError(f"Radial sink must be True or False, got {self.sink!r}")

    def token_rule(self, grid: Grid, device: torch.device | str) -> Callable[[Tensor, Tensor], Tensor]:
        if self.kind == "block":
            kept_blocks = self.block_mask(grid, device)
            return lambda q_index, k_index: kept_blocks[q_index // BLOCK, k_index // BLOCK]
        tokens = grid.frame_tokens
        powers = [1 << (max(distance, 1).bit_length() - 1) for distance in range(grid.frames)]
        window = [tokens // power - 1 for power in powers]  # |k - l| + 1 <= s / 2^e; -1 where no offset passes
        every = [-(-power // tokens) if power > tokens else 0 for power in powers]  # 0: the spatial rule holds
        far = [distance % step == 0 if step else False for distance, step in enumerate(every)]
        return self._frame_rule(grid, [max(w, 0) if f else w for w, f in zip(window, far, strict=True)], device)

    def block_mask(self, grid: Grid, device: torch.device | str = "cpu") -> Tensor:
        """Return the published block mask, bool [Q, Q] over raster blocks of 128 video tokens."""
        keep = self._published_rule(grid, device)
        video, blocks = grid.video_tokens, -(-grid.video_tokens // BLOCK)
        lane = torch.arange(blocks * BLOCK, device=device).view(blocks, BLOCK)
        kept = torch.empty(blocks, blocks, dtype=torch.bool, device=device)
        slab = max(1, PAIRS_PER_CHUNK // (BLOCK * BLOCK * blocks))
        for at in range(0, blocks, slab):
            q_index, k_index = lane[at : at + slab, None, :, None], lane[None, :, None, :]
            inside = (q_index < video) & (k_index < video)
            pairs = keep(q_index.clamp(max=video - 1), k_index.clamp(max=video - 1)) & inside
            share = pairs.sum(2) / (lane[at : at + slab] < video).sum(1)[:, None, None]  # [slab, blocks, 128]
            columns = (share > 0).sum(-1)
            kept[at : at + slab] = (share > COLUMN_SHARE).sum(-1) > BLOCK_SHARE * columns
        return kept

    def _published_rule(self, grid: Grid, device: torch.device | str) -> Callable[[Tensor, Tensor], Tensor]:
        tokens, window = grid.frame_tokens, []
        for distance in range(grid.frames):
            width = 2.0 ** (tokens.bit_length() - distance.bit_length())
            left_out = width < BLOCK and distance % int(BLOCK / width) != 0
            reach = float(tokens) if distance <= 1 else max(width * self.decay, float(BLOCK))
            window.append(-1 if left_out else math.floor(reach))
        return self._frame_rule(grid, window, device)

    def _frame_rule(
        self, grid: Grid, window: list[int], device: torch.device | str
    ) -> Callable[[Tensor, Tensor], Tensor]:
        """Return the rule |k - l| <= window[distance in frames], with the sink; a window of -1 keeps nothing."""
        tokens, table = grid.frame_tokens, torch.tensor(window, device=device)

        def keep(q_index: Tensor, k_index: Tensor) -> Tensor:
            key_frame = k_index // tokens
            distance = (q_index // tokens - key_frame).abs()
            kept = (q_index % tokens - k_index % tokens).abs() <= table[distance]
            return kept | (key_frame == 0) if self.sink else kept

        return keep
