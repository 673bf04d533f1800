"""Leave a head out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dit_sparse.grid import Grid
from dit_sparse.patterns.base import StaticPattern


@dataclass(frozen=True, eq=False)
class Skip(StaticPattern):
    """Give zeros for video queries: they read nothing, not even text. Text queries stay exact.

    Paper: Sparse-vDiT (arXiv 2506.03065), the skip mode.
    """

    name: ClassVar[str] = "skip"
    exact: ClassVar[str] = "block"
    reads_text: ClassVar[bool] = False

    def token_rule(self, grid: Grid, device: torch.device | str) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda q, k: torch.zeros(torch.broadcast_shapes(q.shape, k.shape), dtype=torch.bool, device=device)
