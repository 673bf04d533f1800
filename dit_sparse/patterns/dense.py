"""The two ends: attend to everything, or to nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dit_sparse.grid import Grid
from dit_sparse.patterns.base import StaticPattern


@dataclass(frozen=True)
class Dense(StaticPattern):
    """Attend to every key. In a plan this runs the model's own dense attention."""

    name: ClassVar[str] = "dense"
    exact: ClassVar[str] = "block"

    def keep(self, q_index: Tensor, k_index: Tensor, grid: Grid) -> Tensor:
        return torch.ones(torch.broadcast_shapes(q_index.shape, k_index.shape), dtype=torch.bool, device=q_index.device)
