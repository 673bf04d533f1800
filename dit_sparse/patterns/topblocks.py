"""Top-k blocks by the score of block means: the content decides."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dit_sparse.grid import Grid
from dit_sparse.order import Layout, TokenOrder
from dit_sparse.patterns.base import Pattern, PatternState, Selection, block_selection


@dataclass(frozen=True)
class TopBlocks(Pattern):
    """Keep, for each block of 128 queries, the `keep` share of key blocks with the highest estimated mass.

    The estimate of a block pair is the product of the mean query and the mean key, scaled, plus the log of the key
    block's tokens, so that a short block is not overrated. At least one block is kept; ties go to the lower index.
    Text keys are always read and text queries are dense.
    keep: share of video key blocks per row, in (0, 1]. order: token order; 3-D tiles make block means meaningful.

    Raises: ValueError for a keep outside (0, 1].
    Paper: MoBA (arXiv 2502.13189), section 2.2; for video DiTs VMoBA (arXiv 2506.23858), section 3.
    """

    name: ClassVar[str] = "topblocks"
    exact: ClassVar[str] = "block"

    keep: float = 0.25
    order: str = "tile"

    def __post_init__(self) -> None:
        if isinstance(self.keep, bool) or not isinstance(self.keep, (int, float)) or not 0.0 < self.keep <= 1.0:
            raise ValueError(f"TopBlocks keep must be a share in (0, 1], got {self.keep!r}")
        TokenOrder.parse(self.order)

    def kept_blocks(self, key_blocks: int) -> int:
        """Return how many of key_blocks a row keeps: the nearest whole number, at least one."""
        return max(1, math.floor(self.keep * key_blocks + 0.5))

    def select(self, q: Tensor, k: Tensor, grid: Grid, state: PatternState) -> Selection:
        layout = state.layout
        score = block_scores(q, k, layout, state.scale)  # [B, H, Q, K]
        # A stable sort of one row of blocks; topk promises no order among equal scores.
        best = score.sort(dim=-1, descending=True, stable=True).indices[..., : self.kept_blocks(layout.video_blocks)]
        return block_selection(torch.zeros_like(score, dtype=torch.bool).scatter_(-1, best, True), q, layout)


def block_scores(q: Tensor, k: Tensor, layout: Layout, scale: float) -> Tensor:
    """Estimate the log mass of each pair of video blocks, fp32 [B, H, Q, K], from q, k [B, S, H, D] in kernel order."""
    heads, kv_heads = q.shape[2], k.shape[2]
    mean_k = block_means(k, layout).repeat_interleave(heads // kv_heads, 2)
    score = torch.einsum("bqhd,bkhd->bhqk", block_means(q, layout), mean_k) * scale
    return score + layout.log_video_length


def block_means(x: Tensor, layout: Layout) -> Tensor:
    """Average the tokens of each video block: [B, S, H, D] in kernel order -> fp32 [B, video_blocks, H, D]."""
    means = x.new_empty(x.shape[0], layout.video_blocks, *x.shape[2:], dtype=torch.float32)
    for members, positions in layout.by_length:
        means[:, members] = x[:, positions].mean(2, dtype=torch.float32)
    return means
