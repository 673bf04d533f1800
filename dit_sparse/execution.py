"""Run one decided attention call: each group of heads by its pattern, from caches that belong to one run."""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dit_sparse.biased import BiasedKeys, biased_keys
from dit_sparse.grid import Grid
from dit_sparse.kernels.backends import choose
from dit_sparse.kernels.indices import segment_blocks
from dit_sparse.moment import Call, Moment
from dit_sparse.monitor import measure
from dit_sparse.order import Layout, TokenOrder
from dit_sparse.padding import Padding
from dit_sparse.patterns import Dense, Pattern, PatternState
from dit_sparse.record import LayerRecord
from dit_sparse.runner import attend_selection, exact_attention
from dit_sparse.selection import Selection

if TYPE_CHECKING:
    from dit_sparse.attention import Layer

# Grids whose layouts and static masks are kept, the last used ones: samples and branches may differ in text length.
GRIDS_KEPT = 16


@dataclass(frozen=True)
class Tensors:
    """Hold what one attention call got. q: [B, S, H, D]; k, v: [B, Sk, Hkv, D]; the rest as in `DenseCall`."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None  # [B or 1, 1 or H, 1 or S, Sk], or a key mask [B, T]
    scale: float | None
    enable_gqa: bool
    backend: str | None

    def heads(self, chosen: Tensor) -> Tensors:
        """Return the same call for some heads only."""
        of_kv = chosen // (self.q.shape[2] // self.k.shape[2])
        q, k, v = self.q[:, :, chosen], self.k[:, :, of_kv], self.v[:, :, of_kv]
        # where a mask has heads, they are all the same
        mask = self.mask[:, :1] if self.mask is not None and self.mask.dim() == 4 else self.mask
        return Tensors(q, k, v, mask, self.scale, False, self.backend)


@dataclass(frozen=True, eq=False)
class Prepared:
    """Hold one group of heads of a call in kernel order, with what its pattern chose."""

    q: Tensor  # [B, S, H, D]: all tokens, or the video alone
    k: Tensor  # [B, S, Hkv, D]
    v: Tensor  # [B, S, Hkv, D]
    biased: BiasedKeys | None
    state: PatternState
    selection: Selection


class Execution:
    """Run decided calls. Owns layouts, static masks and what patterns remember.

    backend: "auto" or a name. monitor: measure recall and error of every sparse call on some rows.
    """

    def __init__(self, backend: str, monitor: bool = False) -> None:
        self.backend, self.monitor = backend, monitor
        self.backend_used = ""
        self._shared: dict[Grid, dict[Any, Any]] = {}
        self._memory: dict[Any, dict[str, Any]] = {}

    def forget_run(self) -> None:
        """Drop what belongs to a run; what depends on the grid alone stays."""
        self._memory = {}

    def sparse(self, layer: Layer, given: Tensors, call: Call, moment: Moment, record: LayerRecord) -> Tensor:
        """Attend head group by head group; returns [B, S, H, D].

        Raises: NoBackendError where "auto" finds none.
        """
        q = given.q
        pairs = 0.0
        out = None if len(call.groups) == 1 else q.new_empty(*q.shape[:-1], given.v.shape[-1])
        for pattern, members in call.groups:
            chosen = self._head_index(members, call.grid, q.device) if len(members) < q.shape[2] else None
            group = given if chosen is None else given.heads(chosen)
            group_pairs = call.video_pairs(group.q)
            if isinstance(pattern, Dense):
                result = dense(layer, group, call)
                record.dense_pairs += group_pairs
            else:
                result = self._pattern(layer, pattern, members, group, call, moment, record)
                pairs += group_pairs
            record.patterns[pattern.name] += 1
            if out is None:
                out = result
            else:
                out[:, :, chosen] = result
        assert out is not None
        if call.padding is not None and call.padding.own_text_rows:
            out = _with_text_rows(out, layer, given, call.grid)
        record.sparse_calls += 1
        record.all_pairs += pairs
        return out.contiguous()

    def prepare(
        self, layer: Layer, pattern: Pattern, members: tuple[int, ...], given: Tensors, call: Call, moment: Moment
    ) -> Prepared:
        """Bring one group of heads into kernel order and let its pattern choose; what a pattern remembers goes on."""
        grid, q, shared = call.grid, given.q, self._shared_of(call.grid)
        layout = self._layout(pattern.token_order(), grid, q.device)
        scale = q.shape[-1] ** -0.5 if given.scale is None else given.scale
        q, k, v = layout.to_kernel(q), layout.to_kernel(given.k), layout.to_kernel(given.v)
        lengths = None
        if call.padding is not None:
            lengths, k, v = call.padding.on_device, call.padding.real_first(k), call.padding.real_first(v)
        biased = None
        if call.padding is not None and call.padding.bias > -math.inf:
            biased = biased_keys(k, v, call.padding, self._text_blocks(grid, q.device), scale, self.backend)
        exact = exact_attention(k, v, layout, scale, lengths, self.backend, shared, biased)
        place = (moment.branch, layer.index, call.number)
        key = (*place, pattern, members, grid, tuple(q.shape), q.dtype, q.device)
        seed = zlib.crc32(repr((moment.step, *place)).encode())
        memory = self._memory.setdefault(key, {})
        state = PatternState(layout, scale, moment.step, shared, memory, v, lengths, seed, exact)
        return Prepared(q, k, v, biased, state, pattern.select(q, k, grid, state))

    def _pattern(
        self,
        layer: Layer,
        pattern: Pattern,
        members: tuple[int, ...],
        given: Tensors,
        call: Call,
        moment: Moment,
        record: LayerRecord,
    ) -> Tensor:
        ready = self.prepare(layer, pattern, members, given, call, moment)
        state, selection, q = ready.state, ready.selection, ready.q
        backend = choose(self.backend, q, ready.k, ready.v, selection.indices, state.kv_lengths, selection.compensate)
        attended = attend_selection(
            selection, q, ready.k, ready.v, state.layout, state.scale, state.kv_lengths, backend, ready.biased
        )
        out = pattern.finish(attended, q, ready.k, call.grid, state)
        if self.monitor:
            assert state.exact is not None
            found = measure(attended, out, q, state.layout, state.exact, members, moment.step, state.seed)
            record.measured.append(found)
        self.backend_used = backend.name
        record.kept_pairs.add(selection.kept_pairs)
        record.visited_pairs.add(selection.visited_pairs)
        return state.layout.from_kernel(out)

    def _layout(self, order: TokenOrder, grid: Grid, device: torch.device) -> Layout:
        key, shared = ("layout", order, device), self._shared_of(grid)
        if key not in shared:
            shared[key] = order.layout(grid, device)
        layout: Layout = shared[key]
        return layout

    def _head_index(self, members: tuple[int, ...], grid: Grid, device: torch.device) -> Tensor:
        key, shared = ("heads", members, device), self._shared_of(grid)
        if key not in shared:
            shared[key] = torch.tensor(members, device=device)
        index: Tensor = shared[key]
        return index

    def _shared_of(self, grid: Grid) -> dict[Any, Any]:
        """Return what all layers share on one grid: layouts, static masks."""
        of_grid = self._shared.pop(grid, {})
        for oldest in list(self._shared)[: max(0, len(self._shared) + 1 - GRIDS_KEPT)]:
            del self._shared[oldest]
        self._shared[grid] = of_grid
        return of_grid

    def _text_blocks(self, grid: Grid, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return start and length of the blocks of the text alone."""
        key, shared = ("text blocks", device), self._shared_of(grid)
        if key not in shared:
            shared[key] = tuple(part.to(device) for part in segment_blocks([grid.text_tokens]))
        start, length = shared[key]
        return start, length


def dense(layer: Layer, given: Tensors, call: Call) -> Tensor:
    """Attend to all real keys with the model's own call, which then needs no mask; returns [B, S, H, D].

    A mask that does more than hide keys goes with the call as it came.
    """

    def attend(q: Tensor, k: Tensor, v: Tensor, padding: Padding | None) -> Tensor:
        if padding is not None and padding.length is not None:
            k, v = padding.trimmed(k, padding.length), padding.trimmed(v, padding.length)
        return layer.dense(q, k, v, None, 0.0, False, given.scale, given.enable_gqa, given.backend)

    q, k, v, padding = given.q, given.k, given.v, call.padding
    if padding is not None and not padding.hides:
        return layer.dense(q, k, v, given.mask, 0.0, False, given.scale, given.enable_gqa, given.backend)
    if padding is None or padding.length is not None:
        return attend(q, k, v, padding)
    samples = zip(q.split(1), k.split(1), v.split(1), padding.split(), strict=True)
    return torch.cat([attend(*sample) for sample in samples])


def _with_text_rows(out: Tensor, layer: Layer, given: Tensors, grid: Grid) -> Tensor:
    """Replace the rows of text queries by the model's own call with their rows of the mask."""
    assert given.mask is not None
    out = out.clone()
    for rows in (slice(grid.prefix), slice(grid.prefix + grid.video_tokens, grid.tokens)):
        if out[:, rows].numel():
            mask = given.mask[:, :, rows]
            out[:, rows] = layer.dense(
                given.q[:, rows], given.k, given.v, mask, 0.0, False, given.scale, given.enable_gqa, given.backend
            )
    return out
