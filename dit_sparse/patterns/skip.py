"""Leave a head out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dit_sparse.grid import Grid
from dit_sparse.patterns.base import StaticPattern


@dataclass(frozen=True)
class Skip(StaticPattern):
    """Give zeros for video queries: they read nothing, not even text. Text queries stay exact.

    Paper: Sparse-vDiT (arXiv 2506.03065), the skip mode.
    """

    name: ClassVar[str] = "skip"
    exact: ClassVar[str] = "block"
    reads_text: ClassVar[bool] = False

    def keep(self, q_index: Tensor, k_index: Tensor, grid: Grid) -> Tensor:
        shape = torch.broadcast_shapes(q_index.shape, k_index.shape)
        return torch.zeros(shape, dtype=torch.bool, device=q_index.device)
