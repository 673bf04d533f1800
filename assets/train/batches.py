"""Batches of training clips. On a GPU the 1,500 small launches that paint one are recorded once and replayed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dit_sparse.assets.train.clips import CLIP_FRAMES, caption_ids, scene
from dit_sparse.assets.train.measure import to_latents
from dit_sparse.assets.train.render import render

SEED = 1


@dataclass(frozen=True)
class Size:
    """One kind of step: the first `frames` frames of square clips of `height` pixels, `batch` on each device."""

    height: int
    batch: int
    frames: int = CLIP_FRAMES
    context_tokens: int = 64  # to which captions are padded

    @property
    def tokens(self) -> int:
        return (self.frames // 2 + 1) * (self.height // 4) ** 2

    @property
    def name(self) -> str:
        return f"{self.frames}x{self.height}"


@torch.no_grad()
def draw(size: Size, index: Tensor) -> tuple[Tensor, Tensor]:
    """Return latents [batch, 24, T, h, w] and caption ids [batch, 64] of the training clips `index` [batch]."""
    clips = scene(SEED, index)
    return to_latents(render(clips, size.frames, size.height, size.height)), caption_ids(clips)


class Batches:
    """Do what `draw` does; on CUDA through one graph a size, whose outputs hold until the next call for that size."""

    def __init__(self) -> None:
        self.graphs: dict[Size, tuple[torch.cuda.CUDAGraph, Tensor, tuple[Tensor, Tensor]]] = {}

    def __call__(self, size: Size, index: Tensor) -> tuple[Tensor, Tensor]:
        if index.device.type != "cuda":
            return draw(size, index)
        if size not in self.graphs:
            self.graphs[size] = _record(size, index.clone())
        graph, given, drawn = self.graphs[size]
        given.copy_(index)
        graph.replay()
        return drawn


def _record(size: Size, given: Tensor) -> tuple[torch.cuda.CUDAGraph, Tensor, tuple[Tensor, Tensor]]:
    draw(size, given)  # copies the tables of numbers to the device
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    # "thread_local": NCCL's own thread asks about events meanwhile
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        drawn = draw(size, given)
    return graph, given, drawn
