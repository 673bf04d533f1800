"""Sampled query rows: what exact attention of a few of them tells of a whole mask."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_sparse.order import Layout


def sample_rows(layout: Layout, count: int, seed: int) -> Tensor:
    """Draw `count` kernel positions of video tokens, int64 [count]: one in each of as many equal strata.

    A hash of place and seed draws them on the layout's device, so nothing is copied and nobody waits.
    """
    place = torch.arange(count, device=layout.start.device)
    word = (place * 2654435761 + (seed % 1000003 + 1) * 40503) & 0xFFFFFFFF
    for _ in range(2):
        word = ((word >> 16) ^ word) * 73244475 & 0xFFFFFFFF
    within = ((word >> 16) ^ word).double() / 2**32
    rows = ((place + within) * (layout.grid.video_tokens / count)).long()
    return rows.clamp_(max=layout.grid.video_tokens - 1)


def recall_of(
    computed_lse: Tensor,  # [B, Sq, H] in kernel order
    rows: Tensor,  # int64 [R]
    exact_lse: Tensor,  # [B, R, H]
) -> Tensor:
    """Return the share of the exact softmax mass that was read, mean over the rows, fp32 [B, H].

    A row's denominator over the keys that it read is exp(computed_lse); over all keys, exp(exact_lse).
    """
    return (computed_lse[:, rows] - exact_lse).exp().clamp(max=1.0).mean(1)
