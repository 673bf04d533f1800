"""Sinks: the blocks of a layout that are kept whatever their score, named by words."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dit_sparse.order import Layout

SINKS = ("text", "first_frame", "diagonal")


class Sinks(NamedTuple):
    """Hold the blocks that no score decides on."""

    always: Tensor  # bool [K]: read by every row, outside the budget
    forced: Tensor | None  # bool [Q, K]: kept, inside the budget
    competing: int  # key blocks that are not always read


def parse_sinks(text: str) -> frozenset[str]:
    """Read `text+diagonal` or `none`.

    Raises: ValueError for unknown or repeated words.
    """
    words = text.split("+") if isinstance(text, str) else [repr(text)]
    if words == ["none"]:
        return frozenset()
    if len(set(words)) != len(words) or not set(words) <= set(SINKS):
        raise ValueError(f"TopBlocks sinks must be {', '.join(SINKS)} joined by +, or none, got {text!r}")
    return frozenset(words)


def sinks_of(text: str, layout: Layout, scored: int) -> Sinks:
    """Find the blocks that the words name in a layout whose first `scored` query blocks get scores."""
    words, device, video = parse_sinks(text), layout.start.device, layout.video_blocks
    always = torch.zeros(layout.blocks, dtype=torch.bool, device=device)
    if "text" in words:
        always[video:] = True
    competing = video if "text" in words else layout.blocks
    if not words - {"text"}:
        return Sinks(always, None, competing)
    forced = torch.zeros(scored, layout.blocks, dtype=torch.bool, device=device)
    if "diagonal" in words:
        forced.fill_diagonal_(True)
    if "first_frame" in words:
        raster = layout.video_index()
        forced[:, :video] |= ((raster >= 0) & (raster < layout.grid.frame_tokens)).any(-1)
    return Sinks(always, forced & ~always, competing)
