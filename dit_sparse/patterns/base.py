"""What every pattern is: a frozen dataclass that says which keys each query reads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from dit_sparse.grid import Grid
from dit_sparse.kernels.indices import BLOCK, BlockIndices, pack_bits, unpack_bits
from dit_sparse.order import Layout, TokenOrder

# Token pairs evaluated at once while a static mask is built: bounds its memory at some hundred MiB.
PAIRS_PER_CHUNK = 1 << 24


@dataclass(frozen=True, eq=False)
class Selection:
    """Hold what a pattern chose for one call, and how much that is.

    `kept_pairs` and `visited_pairs` count query-key pairs among video tokens, summed over batch and heads: those
    attended, and those in blocks that the kernel reads. They are 0-dim tensors (float64) on the device, so that
    nothing waits for them.
    """

    indices: BlockIndices
    kept_pairs: Tensor
    visited_pairs: Tensor

    def video_queries(self, layout: Layout) -> BlockIndices:
        """Return the indices of a call whose queries are the video tokens alone: their blocks come first."""
        return self.indices.first_queries(layout.video_blocks)


@dataclass
class PatternState:
    """Hold what a pattern may remember: nothing here outlives the run or the shape it belongs to.

    `shared` serves everything that depends on the grid alone; `memory` belongs to this run, branch, layer, group of
    heads and shape. `step` is the denoising step, or None where nobody knows it.
    """

    layout: Layout
    scale: float
    step: int | None = None
    shared: dict[Any, Any] = field(default_factory=dict)
    memory: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Pattern:
    """Say which keys each query of a video grid attends to. The dataclass fields are the whole configuration.

    Text tokens (the grid's prefix and suffix) attend and are attended exactly, unless a pattern says otherwise.
    """

    name: ClassVar[str]
    exact: ClassVar[str]  # "token": partial blocks carry a bit tile; "block": a block is read whole or not at all

    def check(self, grid: Grid) -> None:
        """Raise ValueError where the configuration does not fit the grid."""

    def token_order(self) -> TokenOrder:
        """Return the order in which tokens should reach the kernel."""
        return TokenOrder.parse(getattr(self, "order", "raster"))

    def select(self, q: Tensor, k: Tensor, grid: Grid, state: PatternState) -> Selection:
        """Choose the blocks for one call. q, k: [B, S, H, D] in kernel order (`state.layout`)."""
        raise TypeError(f"{type(self).__name__} defines no selection: derive from StaticPattern or define select()")

    def to_dict(self) -> dict[str, Any]:
        """Return name and fields as JSON values; `pattern_from_dict` reads it back."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        return {"name": self.name} | {key: _to_json(value) for key, value in values.items()}


@dataclass(frozen=True)
class StaticPattern(Pattern):
    """Be a pattern whose kept pairs depend on the grid alone: `keep` is the definition, all else derives from it."""

    reads_text: ClassVar[bool] = True  # whether video queries read the text keys

    def token_rule(self, grid: Grid, device: torch.device | str) -> Callable[[Tensor, Tensor], Tensor]:
        """Return the definition on one grid: (q_index, k_index) -> bool, elementwise and broadcasting.

        Indices are raster indices of video tokens on `device`. What depends on the grid alone is made here, once.
        """
        raise TypeError(f"{type(self).__name__} must define token_rule()")

    def keep(self, q_index: Tensor, k_index: Tensor, grid: Grid) -> Tensor:
        """Say elementwise (broadcasting) whether video token q_index reads k_index: the definition."""
        return self.token_rule(grid, q_index.device)(q_index, k_index)

    def token_mask(self, grid: Grid) -> Tensor:
        """Return the whole mask, bool [N, N] in the grid's order; for oracles and pictures of small grids."""
        self.check(grid)
        index = torch.arange(grid.video_tokens)
        mask = torch.ones(grid.tokens, grid.tokens, dtype=torch.bool)
        video = slice(grid.prefix, grid.prefix + grid.video_tokens)
        if not self.reads_text:
            mask[video] = False
        mask[video, video] = self.keep(index[:, None], index[None], grid)
        return mask

    def select(self, q: Tensor, k: Tensor, grid: Grid, state: PatternState) -> Selection:
        """Return the blocks of this grid, built once and shared by all layers, branches and steps."""
        rows, heads = q.shape[0] * q.shape[2], ("static", self, q.device, q.shape[0] * q.shape[2])
        if heads not in state.shared:
            built = ("static", self, q.device)
            if built not in state.shared:
                self.check(grid)
                state.shared[built] = static_selection(self, grid, state.layout)
            one: Selection = state.shared[built]
            head_of = torch.zeros(rows, dtype=torch.int32, device=q.device)
            indices = BlockIndices(
                one.indices.bits, head_of, one.indices.q_start, one.indices.q_len, one.indices.kv_start,
                one.indices.kv_len, one.indices.partial_bits, one.indices.mask_id, one.indices.masks,
            )  # fmt: skip
            state.shared[heads] = Selection(indices, one.kept_pairs * rows, one.visited_pairs * rows)
        selection: Selection = state.shared[heads]
        return selection


def static_selection(pattern: StaticPattern, grid: Grid, layout: Layout) -> Selection:
    """Turn a pattern's token definition into blocks for one head: `U` = 1.

    Every pair of video blocks is classified as empty, full or partial by evaluating `keep`, a slab of query blocks at
    a time; partial blocks keep their 128x128 bit tile, equal tiles once. Text blocks are full.
    """
    device = layout.start.device
    index, blocks, video = layout.video_index(), layout.blocks, layout.video_blocks
    keep = pattern.token_rule(grid, device)
    visited = torch.ones(blocks, blocks, dtype=torch.bool, device=device)
    partial = torch.zeros(blocks, blocks, dtype=torch.bool, device=device)
    visited[:video, video:] = pattern.reads_text
    length = layout.length[:video].long()
    tiles, kept_pairs = [], torch.zeros((), dtype=torch.float64, device=device)
    slab = max(1, PAIRS_PER_CHUNK // (BLOCK * BLOCK * video))
    for at in range(0, video, slab):
        part = slice(at, min(at + slab, video))
        rows = index[part]
        valid = (rows >= 0)[:, None, :, None] & (index >= 0)[None, :, None, :]
        kept = keep(rows.clamp(min=0)[:, None, :, None], index.clamp(min=0)[None, :, None, :]) & valid
        pairs = kept.sum((2, 3))  # [slab, video]
        some, whole = pairs > 0, pairs == length[part, None] * length
        visited[part, :video], partial[part, :video] = some, some & ~whole
        kept_pairs += pairs.sum()
        tiles.append(pack_bits(kept[some & ~whole]))
    visited_pairs = (visited[:video, :video] * (length[:, None] * length)).sum(dtype=torch.float64)
    masks, mask_id = _distinct_tiles(torch.cat(tiles), partial, pattern)
    indices = BlockIndices(
        pack_bits(visited)[None],
        torch.zeros(1, dtype=torch.int32, device=device),
        layout.start,
        layout.length,
        layout.start,
        layout.length,
        pack_bits(partial)[None] if masks is not None else None,
        mask_id,
        masks,
    )
    return Selection(indices, kept_pairs, visited_pairs)


def _distinct_tiles(tiles: Tensor, partial: Tensor, pattern: Pattern) -> tuple[Tensor | None, Tensor | None]:
    """Store equal bit tiles [P, 128, 4] once: masks [M, 128, 4] and mask_id int16 [1, Q, K], or None without any."""
    if not len(tiles):
        return None, None
    masks, inverse = torch.unique(tiles, dim=0, return_inverse=True)
    if len(masks) > torch.iinfo(torch.int16).max:
        raise ValueError(
            f"{pattern} needs {len(masks)} distinct 128x128 masks on this grid, at most 32767 fit; "
            "use a block form (kind='block') or another token order"
        )
    mask_id = torch.zeros(partial.shape, dtype=torch.int16, device=partial.device)
    mask_id[partial] = inverse.to(torch.int16)
    return masks, mask_id[None]


def block_selection(kept: Tensor, q: Tensor, layout: Layout) -> Selection:
    """Turn chosen video blocks, bool [B, H, Q, K], into indices; text blocks are added whole on both sides."""
    batch, heads, video, _ = kept.shape
    mask = torch.ones(batch * heads, layout.blocks, layout.blocks, dtype=torch.bool, device=q.device)
    mask[:, :video, :video] = kept.flatten(0, 1)
    keys_of_row = kept.float() @ layout.video_length  # exact: a row has fewer than 2^24 keys
    pairs = (keys_of_row.double() @ layout.video_length.double()).sum()
    head_of = torch.arange(batch * heads, dtype=torch.int32, device=q.device)
    indices = BlockIndices(pack_bits(mask), head_of, layout.start, layout.length, layout.start, layout.length)
    return Selection(indices, pairs, pairs)


def video_blocks_of(indices: BlockIndices, layout: Layout) -> Tensor:
    """Return which video blocks each row of U visits, bool [U, Q, K]: what pictures and statistics read."""
    video = layout.video_blocks
    return unpack_bits(indices.bits, indices.key_blocks)[:, :video, :video]


def _to_json(value: Any) -> Any:
    if isinstance(value, Pattern):
        return value.to_dict()
    return list(value) if isinstance(value, tuple) else value
