"""Logits hundreds above and below those of a row's first block, where a shift that is kept has to be given up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from dit_sparse.kernels import reference
from dit_sparse.kernels.gate import ERROR_FACTOR
from dit_sparse.kernels.indices import random_indices


def check_far_logits(
    run: Callable[..., Any], head_dim: int, partial: float, compensate: bool, dtype: torch.dtype, device: str
) -> None:
    """Compare a backend with FP64, within a multiple of what a low-precision reference loses."""
    q, k, v = (torch.randn(1, 1280, 3, head_dim) for _ in range(3))
    for place, factor in ((slice(300, 310), 60), (slice(700, 710), -40), (5, 90), (130, -90)):
        k[:, place] *= factor
    q[:, 100:164] *= 4
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    seed = int(torch.randint(1 << 30, ()))
    indices = random_indices(1, 3, [1280], [1280], density=0.6, partial=partial, seed=seed)
    scale = head_dim**-0.5
    exact, *exact_lse = reference.attention(q.double(), k.double(), v.double(), indices, scale, None, compensate)
    rough, *rough_lse = reference.attention(q, k, v, indices, scale, None, compensate, round_weights=True)
    out, *lse = run(q.to(device), k.to(device), v.to(device), indices.to(device), scale, None, compensate)
    for found, low, right in zip((out, *lse), (rough, *rough_lse), (exact, *exact_lse), strict=True):
        finite = right.isfinite()
        assert torch.equal(found.cpu().isfinite(), finite)
        error, allowed = ((x.double() - right)[finite].abs().max() for x in (found.cpu(), low))
        assert error <= ERROR_FACTOR * allowed + torch.finfo(torch.float32).eps * right[finite].abs().max()
