"""Every score by its definition, with loops and in float64."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from dit_sparse.estimate.blocks import Blocks
from dit_sparse.estimate.row_scores import quantised, rows_of_blocks

Definition = Callable[[Tensor, Tensor, Blocks, int], Tensor]


class Scene:
    """Hold one call as plain lists of token numbers: queries of each scored block, visible keys of each block."""

    def __init__(self, q: Tensor, k: Tensor, blocks: Blocks) -> None:
        layout = blocks.layout
        self.q, self.k, self.scale = q.double(), k.double(), blocks.scale
        spans = [range(int(s), int(s + n)) for s, n in zip(layout.start, layout.length, strict=True)]
        self.queries = [list(span) for span in spans[: blocks.scored]]
        batch = q.shape[0]
        limits = [k.shape[1]] * batch if blocks.kv_lengths is None else blocks.kv_lengths.tolist()
        self.keys = [[[token for token in span if token < limit] for span in spans] for limit in limits]
        self.video_blocks = layout.video_blocks
        self.shape = (batch, q.shape[2], len(self.queries), len(spans))

    def heads(self) -> Iterator[tuple[int, int, Tensor, Tensor]]:
        """Yield batch entry, head, its queries [S, D] and its keys [S, D]."""
        for b, h in itertools.product(range(self.shape[0]), range(self.shape[1])):
            of_k = h // (self.shape[1] // self.k.shape[2])
            yield b, h, self.q[b, :, h], self.k[b, :, of_k]


def log(x: float) -> float:
    return math.log(x) if x > 0 else -math.inf


def mean(q: Tensor, k: Tensor, blocks: Blocks, number: int) -> Tensor:
    return lse(q, k, blocks, 1)


def lse(q: Tensor, k: Tensor, blocks: Blocks, parts: int) -> Tensor:
    scene = Scene(q, k, blocks)
    # sub-blocks are cut from the block, and only then lose their hidden keys
    length = blocks.layout.length.tolist()
    score = torch.full(scene.shape, -torch.inf, dtype=torch.float64)
    for b, h, queries, keys in scene.heads():
        for i, j in itertools.product(range(scene.shape[2]), range(scene.shape[3])):
            total = 0.0
            for rows in cut(scene.queries[i], length[i], parts):
                for columns in cut(scene.keys[b][j], length[j], parts):
                    if rows and columns:
                        dot = float(queries[rows].mean(0) @ keys[columns].mean(0)) * scene.scale
                        total += len(rows) / len(scene.queries[i]) * len(columns) * math.exp(dot)
            score[b, h, i, j] = log(total)
    return score


def cut(tokens: list[int], length: int, parts: int) -> list[list[int]]:
    return [tokens[length * part // parts : length * (part + 1) // parts] for part in range(parts)]


def antidiagonal(q: Tensor, k: Tensor, blocks: Blocks, stride: int) -> Tensor:
    scene = Scene(q, k, blocks)
    score = torch.full(scene.shape, -torch.inf, dtype=torch.float64)
    for b, h, queries, keys in scene.heads():
        for i, tokens in enumerate(scene.queries):
            share = [0.0] * scene.shape[3]
            for first in range(0, len(tokens), stride):
                rows = tokens[first : first + stride]
                mass = [0.0] * scene.shape[3]
                for j, visible in enumerate(scene.keys[b]):
                    for begin in range(0, len(visible), stride):
                        columns = visible[begin : begin + stride]
                        dots = [
                            float(queries[rows[(stride - 1 - r) % len(rows)]] @ keys[columns[r % len(columns)]])
                            for r in range(stride)
                        ]
                        mass[j] += len(columns) * math.exp(sum(dots) / stride * scene.scale)
                for j in range(scene.shape[3]):
                    share[j] += len(rows) / len(tokens) * mass[j] / sum(mass)
            score[b, h, i] = torch.tensor([log(x) for x in share], dtype=torch.float64)
    return score


def of_rows(scene: Scene, rows: list[list[tuple[int, float]]], first_lse: Tensor | None = None) -> Tensor:
    """Sum the softmax of (row, share) of each query block over the key blocks; with the LSE [B, S, H] given, or own."""
    score = torch.full(scene.shape, -torch.inf, dtype=torch.float64)
    for b, h, queries, keys in scene.heads():
        visible = [token for block in scene.keys[b] for token in block]
        for i, chosen in enumerate(rows):
            share = torch.zeros(scene.shape[3], dtype=torch.float64)
            for row, weight in chosen:
                logits = keys @ queries[row] * scene.scale
                level = logits[visible].logsumexp(0) if first_lse is None else first_lse[b, row, h].double()
                for j, block in enumerate(scene.keys[b]):
                    share[j] += weight * (logits[block] - level).exp().sum()
            score[b, h, i] = share.log()
    return score


def exact(q: Tensor, k: Tensor, blocks: Blocks, number: int, first_lse: Tensor | None = None) -> Tensor:
    scene = Scene(q, k, blocks)
    return of_rows(scene, [[(row, 1 / len(block)) for row in block] for block in scene.queries], first_lse)


def sampled(q: Tensor, k: Tensor, blocks: Blocks, per_block: int) -> Tensor:
    rows, share = rows_of_blocks(blocks.q_start, blocks.q_length, per_block, blocks.seed)
    pairs = [list(zip(*row, strict=True)) for row in zip(rows.tolist(), share.tolist(), strict=True)]
    return of_rows(Scene(q, k, blocks), pairs)


def lowbit(q: Tensor, k: Tensor, blocks: Blocks, bits: int) -> Tensor:
    centred = k.clone()
    for b, visible in enumerate(Scene(q, k, blocks).keys):
        tokens = [token for block in visible for token in block]
        centred[b] -= k[b, tokens].mean(0)
    rough = []
    for x in (q, centred):
        low, scale = quantised(x, bits)
        assert int(low.abs().max()) <= 2 ** (bits - 1) - 1
        rough.append(low * scale[..., None])
    return exact(rough[0], rough[1], blocks, 1)


def proxy(q: Tensor, k: Tensor, blocks: Blocks, group: int) -> Tensor:
    heads = q.shape[2]
    own_keys = k.repeat_interleave(heads // k.shape[2], 2)
    groups = [list(range(first, min(first + group, heads))) for first in range(0, heads, group)]
    of_group = [
        lse(q[:, :, g].mean(2, keepdim=True), own_keys[:, :, g].mean(2, keepdim=True), blocks, 8) for g in groups
    ]
    return torch.cat([score.expand(-1, len(g), -1, -1) for g, score in zip(groups, of_group, strict=True)], 1)


def region(q: Tensor, k: Tensor, blocks: Blocks, size: int) -> Tensor:
    scene = Scene(q, k, blocks)
    video = scene.video_blocks

    def neighbours(block: int, count: int) -> range:
        first = 0 if block < video else video
        last = min(video, count) if block < video else count
        begin = first + (block - first) // size * size
        return range(begin, min(begin + size, last))

    score = torch.full(scene.shape, -torch.inf, dtype=torch.float64)
    for b, h, queries, keys in scene.heads():
        for i, j in itertools.product(range(scene.shape[2]), range(scene.shape[3])):
            rows = [token for block in neighbours(i, scene.shape[2]) for token in scene.queries[block]]
            columns = [token for block in neighbours(j, scene.shape[3]) for token in scene.keys[b][block]]
            if scene.keys[b][j]:
                dot = float(queries[rows].mean(0) @ keys[columns].mean(0)) * scene.scale
                score[b, h, i, j] = dot + math.log(len(scene.keys[b][j]))
    return score


DEFINITIONS: dict[str, Definition] = {
    "mean": mean, "lse": lse, "antidiagonal": antidiagonal, "exact": exact, "sampled": sampled, "lowbit": lowbit,
    "proxy": proxy, "region": region,
}  # fmt: skip
