"""The two ends: attend to everything, or to nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dit_sparse.grid import Grid
from dit_sparse.patterns.base import StaticPattern


@dataclass(frozen=True, eq=False)
class Dense(StaticPattern):
    """Attend to every key. In a plan this runs the model's own dense attention."""

    name: ClassVar[str] = "dense"
    exact: ClassVar[str] = "block"

    def token_rule(self, grid: Grid, device: torch.device | str) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda q, k: torch.ones(torch.broadcast_shapes(q.shape, k.shape), dtype=torch.bool, device=device)
