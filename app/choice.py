"""What the pattern of one head chose: its blocks, and which tokens one token reads."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from dit_sparse.grid import Grid
from dit_sparse.kernels.indices import BlockIndices
from dit_sparse.masks import rule_selection
from dit_sparse.moment import groups_of
from dit_sparse.order import Layout
from dit_sparse.patterns import Cached, Pattern, StaticPattern
from dit_sparse.patterns.base import variant_of
from dit_sparse.plan import Plan
from dit_sparse.selection import HeadOrder

SKIPPED, STOOD_FOR, READ = 0, 1, 2  # what a key is to a query: left out, part of its block's mean, read
MASKS_KEPT = 16
Token = tuple[int, int, int]  # frame, row, column


@dataclass(frozen=True, eq=False)
class Choice:
    """Hold what one head reads on one grid, all of it on the CPU.

    pattern: the head's pattern as text. indices: the blocks of this head alone, U = 1. definition: the static pattern
    of this very head, by which single pairs are told, or None where the content chose. head_order: this head's own
    order, [1, 1, V]. branch: the forward of the step that it was recorded in, None where nothing ran.
    """

    pattern: str
    layout: Layout
    indices: BlockIndices
    compensate: bool = False
    definition: StaticPattern | None = None
    head_order: HeadOrder | None = None
    branch: str | None = None

    @property
    def grid(self) -> Grid:
        return self.layout.grid


@dataclass(frozen=True)
class Served:
    """Name the pattern that serves a head in a call, and the head's place among the heads that it serves there."""

    pattern: Pattern
    place: int
    members: int

    def definition(self, grid: Grid) -> StaticPattern | None:
        """Return the static pattern of this very head on a grid, or None where the content chooses."""
        static = static_part(self.pattern)
        if static is None:
            return None
        variants = static.variants(grid)
        return variants[variant_of(self.place, self.members, len(variants))]


def static_part(pattern: Pattern) -> StaticPattern | None:
    """Return the static pattern that decides, also where a cache stands around it; None where the content decides."""
    inner = pattern.pattern if isinstance(pattern, Cached) else pattern
    return inner if isinstance(inner, StaticPattern) else None


def served(
    plan: Plan, layers: int, heads: int, fraction: float | None, layer: int, head: int, transformer: str = "transformer"
) -> Served:
    """Return what a plan gives a head of a layer at a part of the schedule, as its Schedule groups them.

    Raises:
        ValueError: there is no such layer or head.
    """
    check_place(layer, head, layers, heads)
    patterns = plan.for_depth(layers).patterns_at(fraction, transformer, layer, heads)
    groups = groups_of(tuple(pattern.at_layer(layer) for pattern in patterns))
    pattern, members = next(group for group in groups if head in group[1])
    return Served(pattern, members.index(head), len(members))


def check_place(layer: int, head: int, layers: int, heads: int) -> None:
    """Refuse a layer or a head that a model lacks.

    Raises:
        ValueError: with what there is.
    """
    for what, index, count in (("layer", layer, layers), ("head", head, heads)):
        if not 0 <= index < count:
            raise ValueError(f"{what} {index} does not exist: the model has {count} {what}s, 0 to {count - 1}")


def static_choice(found: Served, grid: Grid, device: str = "cpu") -> Choice | None:
    """Return what a static pattern reads on a grid, or None where only a real call can tell.

    Every pair of tokens is looked at, on `device`: for some ten thousand tokens that wants a GPU.

    Raises:
        ValueError: the pattern does not fit the grid.
    """
    definition = found.definition(grid)
    if definition is None:
        return None
    found.pattern.check(grid)
    layout, indices = _blocks(definition, grid, device)
    return Choice(str(found.pattern), layout, indices, definition=definition)


def keys_of(choice: Choice, token: Token) -> Tensor:
    """Return what every video token is to the query at `token`: SKIPPED, STOOD_FOR or READ, uint8 [T, H, W].

    A static pattern is asked by its definition, pair by pair; elsewhere the blocks that were chosen tell.

    Raises:
        ValueError: the token lies outside the grid.
    """
    grid = choice.grid
    query = raster_index(token, grid)
    if choice.definition is not None:
        read = choice.definition.keep(torch.tensor([query]), torch.arange(grid.video_tokens), grid)
    else:
        read = _read_by_blocks(choice, query)
    levels = torch.where(read, READ, STOOD_FOR if choice.compensate else SKIPPED)
    return levels.to(torch.uint8).view(grid.shape)


def text_tokens_read(choice: Choice, token: Token) -> int:
    """Count the text tokens that the query at a video token reads.

    Raises:
        ValueError: the token lies outside the grid.
    """
    query = raster_index(token, choice.grid)
    return int(_key_row(choice, query)[choice.grid.video_tokens :].sum())


def raster_index(token: Token, grid: Grid) -> int:
    """Return the index of a video token, frames first.

    Raises:
        ValueError: it lies outside the grid.
    """
    if not all(0 <= place < size for place, size in zip(token, grid.shape, strict=True)):
        raise ValueError(f"token (frame, row, column) must lie on the grid {grid}, got {token}")
    frame, row, column = token
    return (frame * grid.height + row) * grid.width + column


def one_head(indices: BlockIndices, entry: int) -> BlockIndices:
    """Keep one entry of batch and heads, on the CPU."""
    indices = indices.to("cpu")
    row = int(indices.head_of[entry])
    tables = (indices.bits, indices.partial_bits, indices.mask_id)
    bits, partial, ids = (None if table is None else table[row : row + 1].clone() for table in tables)
    assert bits is not None
    head_of = torch.zeros(1, dtype=torch.int32)
    blocks = (indices.q_start, indices.q_len, indices.kv_start, indices.kv_len)
    return BlockIndices(bits, head_of, *blocks, partial, ids, indices.masks)


@functools.lru_cache(maxsize=MASKS_KEPT)
def _blocks(definition: StaticPattern, grid: Grid, device: str) -> tuple[Layout, BlockIndices]:
    """Return layout and blocks, both on the CPU."""
    order = definition.token_order()
    there = order.layout(grid, device)
    indices = rule_selection(definition.token_rule(grid, device), there, definition.reads_text).indices
    return order.layout(grid), indices.to("cpu")


def _read_by_blocks(choice: Choice, query: int) -> Tensor:
    """Return which video tokens the blocks let the query at a raster index read, bool [N]."""
    video, order = choice.grid.video_tokens, choice.head_order
    raster = _raster(choice)
    read = torch.zeros(video, dtype=torch.bool)
    read[raster if order is None else raster[order.k[0, 0]]] = _key_row(choice, query)[:video]
    return read


def _key_row(choice: Choice, query: int) -> Tensor:
    """Return which keys the query at a raster index reads, bool [S] in the order of this head's keys."""
    indices, order, raster = choice.indices, choice.head_order, _raster(choice)
    of_queries = raster if order is None else raster[order.q[0, 0]]
    position = int((of_queries == query).nonzero())
    block = int(((indices.q_start <= position) & (position < indices.q_start + indices.q_len)).nonzero())
    return indices.token_rows(0, block)[position - int(indices.q_start[block])]


def _raster(choice: Choice) -> Tensor:
    """Return the raster index of the video token at each kernel position, int64 [N]."""
    order = choice.layout.video_order
    return torch.arange(choice.grid.video_tokens) if order is None else order
