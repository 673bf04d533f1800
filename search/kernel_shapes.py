"""The attention calls of real models that kernels are timed at, and lists and inputs for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dit_sparse.grid import Grid
from dit_sparse.kernels.bench import block_indices, kept_blocks
from dit_sparse.kernels.contenders import Inputs
from dit_sparse.kernels.indices import BLOCK


@dataclass(frozen=True)
class Shape:
    """Name one call, batch 1, bf16."""

    heads: int
    tokens: int
    head_dim: int
    densities: tuple[float, ...]  # of the section of full blocks

    @property
    def blocks(self) -> int:
        return -(-self.tokens // BLOCK)


SHAPES = {
    "wan_480p": Shape(12, 32768, 128, (0.25, 0.10, 0.05)),
    "wan_720p": Shape(40, 75648, 128, (0.25, 0.10, 0.05)),
    "hunyuan": Shape(24, 119040, 128, (0.25, 0.10, 0.05)),
    "cogvideox": Shape(48, 17792, 64, (0.25,)),
    # LTX-Video at diffusers' default size, 161 frames of 512×704: 21×16×22 tokens, the last block has 96
    "ltx": Shape(32, 7392, 64, (0.25,)),
}

# grids whose axes no 128-token tile divides, with the heads of a model that has them
GRIDS = {
    "wan_480p": (Grid(21, 30, 52), 12),
    "wan_720p": (Grid(21, 45, 80), 40),
    "hunyuan": (Grid(33, 45, 80), 24),
}


def draw(tokens: int, heads: int, head_dim: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Draw fresh q, k, v [1, tokens, heads, head_dim] in bf16."""
    q, k, v = (torch.randn((1, tokens, heads, head_dim), device=device, dtype=torch.bfloat16) for _ in range(3))
    return q, k, v


def even_inputs(shape: Shape, counts: Sequence[int], device: str) -> Inputs:
    """Draw inputs over 128-blocks in order, of which every row of head h keeps counts[h]."""
    mask = kept_blocks(counts, shape.blocks, device)
    drawn = draw(shape.tokens, shape.heads, shape.head_dim, device)
    return Inputs(*drawn, block_indices(mask, shape.tokens, shape.tokens))


def pairs_of(inputs: Inputs) -> float:
    """Count the query-key pairs in visited blocks over all heads, lanes without a token left out."""
    indices = inputs.indices
    per_row = (indices.block_mask() * indices.kv_len.double()).sum(-1) @ indices.q_len.double()  # [U]
    return float(per_row[indices.head_of.long()].sum())


def blocks_of(inputs: Inputs) -> tuple[float, float]:
    """Count visited blocks over all heads, and those of them that a kernel must mask: bit tiles and short blocks."""
    indices = inputs.indices
    visited = indices.block_mask()
    short = indices.kv_len < BLOCK
    masked = indices.partial_mask() | (visited & short)
    rows = indices.head_of.long()
    return tuple(float(x.sum((1, 2), dtype=torch.float64)[rows].sum()) for x in (visited, masked))  # type: ignore[return-value]
