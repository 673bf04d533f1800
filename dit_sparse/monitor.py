"""Measure what a mask costs while it is used: recall and output error on a few exactly computed rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dit_sparse.order import Layout
from dit_sparse.rows import recall_of, sample_rows
from dit_sparse.selection import Attended, Exact

# Two of a hundred at a recall of .9 is what a mean over so many rows is good for.
ROWS = 128


@dataclass(frozen=True)
class Measured:
    """Hold what was measured of one sparse call: step, heads, and for each of them recall and error, fp32 [heads].

    recall: softmax mass of the keys that were read, text included, before compensation, mean over the sampled rows
    and the batch. error: relative L2 of the output on these rows, after compensation. They describe one attention
    call; neither ranks patterns by the quality of the clip.
    """

    step: int | None
    heads: tuple[int, ...]
    recall: Tensor
    error: Tensor


def measure(
    attended: Attended,
    out: Tensor,  # [B, Sq, H, D], what the call returns, in kernel order
    q: Tensor,
    layout: Layout,
    exact: Exact,
    heads: tuple[int, ...],
    step: int | None,
    seed: int,
) -> Measured:
    """Compare sampled rows of one call with exact attention; nothing is read by the host."""
    rows = sample_rows(layout, min(ROWS, layout.grid.video_tokens), seed)
    exact_out, exact_lse = exact(q[:, rows])
    wrong = (out[:, rows].float() - exact_out.float()).square().sum((0, 1, 3))
    full = exact_out.float().square().sum((0, 1, 3))
    error = (wrong / full.clamp(min=torch.finfo(torch.float32).tiny)).sqrt()
    return Measured(step, heads, recall_of(attended.computed_lse, rows, exact_lse).mean(0), error)
