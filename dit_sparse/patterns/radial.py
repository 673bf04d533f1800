"""Radial attention: the spatial window halves each time the distance in frames doubles."""

from __future__ import annotations

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

    def keep(self, q_index: Tensor, k_index: Tensor, grid: Grid) -> Tensor:
        if self.kind == "block":
            return self.block_mask(grid).to(q_index.device)[q_index // BLOCK, k_index // BLOCK]
        tokens = grid.frame_tokens
        key_frame = k_index // tokens
        distance = (q_index // tokens - key_frame).abs()
        offset = (q_index % tokens - k_index % tokens).abs()
        power = _power_of_two_below(distance, grid.frames)
        near = (offset + 1) * power <= tokens
        every = (power + tokens - 1) // tokens
        far = (power > tokens) & (offset == 0) & (distance % every == 0)
        kept = near | far
        return kept | (key_frame == 0) if self.sink else kept

    def block_mask(self, grid: Grid) -> Tensor:
        """Return the published block mask, bool [Q, Q] over raster blocks of 128 video tokens."""
        video, tokens = grid.video_tokens, grid.frame_tokens
        blocks = -(-video // BLOCK)
        lane = torch.arange(blocks * BLOCK).view(blocks, BLOCK)
        kept = torch.empty(blocks, blocks, dtype=torch.bool)
        slab = max(1, PAIRS_PER_CHUNK // (BLOCK * BLOCK * blocks))
        for at in range(0, blocks, slab):
            q_index, k_index = lane[at : at + slab, None, :, None], lane[None, :, None, :]
            pairs = self._published_keep(q_index, k_index, tokens) & (q_index < video) & (k_index < video)
            share = pairs.sum(2) / (lane[at : at + slab] < video).sum(1)[:, None, None]  # [slab, blocks, 128]
            columns = (share > 0).sum(-1)
            kept[at : at + slab] = (share > COLUMN_SHARE).sum(-1) > BLOCK_SHARE * columns
        return kept

    def _published_keep(self, q_index: Tensor, k_index: Tensor, tokens: int) -> Tensor:
        key_frame = k_index // tokens
        distance = (q_index // tokens - key_frame).abs()
        offset = (q_index % tokens - k_index % tokens).abs()
        bits = torch.where(distance > 0, torch.log2(distance.clamp(min=1).double()).floor() + 1, 0)
        width = 2.0 ** (tokens.bit_length() - bits)
        window = torch.where(distance <= 1, float(tokens), (width * self.decay).clamp(min=BLOCK))
        every = torch.where(width < BLOCK, (BLOCK / width).long(), 1)
        kept = (offset <= window) & (distance % every == 0)
        return kept | (key_frame == 0) if self.sink else kept


def _power_of_two_below(distance: Tensor, frames: int) -> Tensor:
    """Return 2^floor(log2 max(distance, 1)) through a table of integers: no rounding at powers of two."""
    table = torch.tensor([1 << (max(d, 1).bit_length() - 1) for d in range(frames)], device=distance.device)
    return table[distance]
