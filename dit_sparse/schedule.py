"""A plan bound to one transformer: decides each attention call, owns the caches, keeps the record."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dit_sparse.grid import Grid
from dit_sparse.kernels.backends import block_attention, choose
from dit_sparse.options import Options
from dit_sparse.order import Layout, TokenOrder
from dit_sparse.patterns import Dense, Pattern, PatternState
from dit_sparse.plan import Plan
from dit_sparse.record import LayerRecord, Summary

if TYPE_CHECKING:
    from dit_sparse.attention import Layer

logger = logging.getLogger("dit_sparse")

# Grids whose layouts and static masks are kept: branches may differ in text length, runs in size.
GRIDS_KEPT = 4
Groups = tuple[tuple[Pattern, tuple[int, ...]], ...]


_NO_RUN = object()


class StrictError(RuntimeError):
    """A call that the plan wanted sparse had to run dense, and `strict=True` forbids that."""


@dataclass(frozen=True)
class _Moment:
    """Where the current transformer call stands: set once per forward by the pre-hook."""

    grid: Grid | None = None
    step: int | None = None
    total_steps: int | None = None
    branch: str | None = None
    reason: str = "no grid is known: the transformer was not called through its hooks"

    @property
    def fraction(self) -> float | None:
        return None if self.step is None or not self.total_steps else self.step / self.total_steps


class Schedule:
    """Bind a plan to one transformer of one model. Owns every cache, and drops it when a run or a shape changes.

    transformer: component name. layer_names: sparse-able self-attention modules in order. heads: per layer, or None
    where unknown. A pipeline calls `start_forward` before each transformer forward; the attention op asks `attend`.
    """

    def __init__(
        self,
        plan: Plan,
        *,
        transformer: str = "transformer",
        layer_names: tuple[str, ...] = ("attention",),
        heads: int | None = None,
        options: Options | None = None,
    ) -> None:
        self.plan, self.transformer = plan.for_depth(len(layer_names)), transformer
        self.layer_names, self.heads = layer_names, heads
        self.options = options or Options()
        self.timer: Callable[[Layer], AbstractContextManager[Any]] | None = None  # wraps each call; benchmarks set it
        self.reset()

    def __getstate__(self) -> dict[str, Any]:
        kept = ("plan", "transformer", "layer_names", "heads", "options")
        return {name: self.__dict__[name] for name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state.pop("plan"), **state)  # type: ignore[misc]

    def reset(self) -> None:
        """Forget everything: moment, caches and record."""
        self._moment = _Moment()
        self._run: object = _NO_RUN
        self._shared: dict[Grid, dict[Any, Any]] = {}
        self._memory: dict[Any, dict[str, Any]] = {}
        self._clear_record()

    def end_run(self) -> None:
        """Forget what belongs to the run that ended; the record of it stays readable."""
        self._run, self._memory = _NO_RUN, {}

    def start_forward(
        self,
        grid: Grid | None,
        *,
        step: int | None = None,
        total_steps: int | None = None,
        branch: str | None = None,
        run: object = None,
        reason: str | None = None,
    ) -> None:
        """Tell where the coming transformer forward stands; `grid` None runs it dense for `reason`.

        A `run` that is not the object of the last call starts a new run: content-dependent caches and the record go.
        """
        if run is not self._run:
            self._run, self._memory = run, {}
            self._clear_record()
        if grid is not None and grid not in self._shared:
            for oldest in list(self._shared)[: max(0, len(self._shared) + 1 - GRIDS_KEPT)]:
                del self._shared[oldest]
            self._shared[grid] = {}
        self._moment = _Moment(grid, step, total_steps, branch, reason or _Moment.reason)

    def attend(
        self,
        layer: Layer,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        backend: str | None = None,
    ) -> Tensor:
        """Compute one self-attention call, sparse or with the model's own call. q, k, v: [B, S, H, D]."""
        with contextlib.nullcontext() if self.timer is None else self.timer(layer):
            groups = self._decide(layer, q, k, attn_mask, is_causal)
            if not isinstance(groups, str):
                try:
                    return self._sparse(layer, q, k, v, groups, scale, backend)
                except _NoBackendError as error:
                    groups = f"no backend: {error}"
                    self._complain(layer, groups)
            self._record(layer).dense_reasons[groups] += 1
            self._record(layer).dense_pairs += self._video_pairs(q)
            return layer.dense(q, k, v, attn_mask, dropout_p, is_causal, scale, enable_gqa, backend)

    def note_dense(self, layer: Layer, reason: str) -> None:
        """Record a call that ran dense before it reached `attend`.

        Raises: StrictError under `strict=True`.
        """
        self._complain(layer, reason)
        self._record(layer).dense_reasons[reason] += 1

    def summary(self, unknown: tuple[str, ...] = ()) -> Summary:
        """Return the record of the last run."""
        grid = str(self._moment.grid) if self._moment.grid else "unknown"
        records = tuple(self._records.get(index, LayerRecord(name)) for index, name in enumerate(self.layer_names))
        return Summary(self.plan.name, grid, self._backend_used or self.options.backend, records, unknown)

    def _decide(self, layer: Layer, q: Tensor, k: Tensor, attn_mask: Tensor | None, is_causal: bool) -> Groups | str:
        """Return the patterns of this layer's heads, or the reason to run dense."""
        moment, grid = self._moment, self._moment.grid
        if not self.plan.rules:
            return "plan: dense"
        guard = self.options.dense_reason(
            layer.index, len(self.layer_names), q.shape[1], q.device.type, moment.step, moment.total_steps
        )
        if guard is not None:
            return guard
        unwanted = None
        if grid is None:
            unwanted = moment.reason
        elif attn_mask is not None or is_causal:
            unwanted = "attention mask" if attn_mask is not None else "causal attention"
        elif q.shape[1] != grid.tokens or k.shape[1] != grid.tokens:
            unwanted = f"{q.shape[1]} queries and {k.shape[1]} keys do not match the grid {grid} ({grid.tokens} tokens)"
        elif self._position_unknown():
            unwanted = "denoising step or number of steps unknown: enable on the pipeline, not on the transformer alone"
        if unwanted is not None:
            self._complain(layer, unwanted)
            return unwanted
        patterns = self.plan.patterns_at(moment.fraction, self.transformer, layer.index, q.shape[2])
        groups = {
            pattern: tuple(h for h, p in enumerate(patterns) if p == pattern) for pattern in dict.fromkeys(patterns)
        }
        return "plan: dense" if set(groups) == {Dense()} else tuple(groups.items())

    def _position_unknown(self) -> bool:
        """Say whether plan or options speak of steps that nobody has told us."""
        needs_total = self.plan.needs_total_steps or self.options.needs_total_steps
        return (needs_total and self._moment.fraction is None) or (
            self.options.needs_step and self._moment.step is None
        )

    def _sparse(
        self, layer: Layer, q: Tensor, k: Tensor, v: Tensor, groups: Groups, scale: float | None, backend: str | None
    ) -> Tensor:
        grid, heads, kv_heads = self._moment.grid, q.shape[2], k.shape[2]
        assert grid is not None
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        record, pairs = self._record(layer), 0.0
        out = None if len(groups) == 1 else v.new_empty(*q.shape[:-1], v.shape[-1])
        for pattern, members in groups:
            chosen = self._head_index(members, grid, q.device) if len(members) < heads else None
            if chosen is None:
                q_group, k_group, v_group = q, k, v
            else:
                of_kv = chosen // (heads // kv_heads)
                q_group, k_group, v_group = q[:, :, chosen], k[:, :, of_kv], v[:, :, of_kv]
            if isinstance(pattern, Dense) and chosen is not None:
                result = layer.dense(q_group, k_group, v_group, None, 0.0, False, scale, False, backend)
                record.dense_pairs += self._video_pairs(q_group)
            else:
                result = self._run_pattern(layer, pattern, members, q_group, k_group, v_group, scale)
                pairs += self._video_pairs(q_group)
            record.patterns[pattern.name] += 1
            if out is None:
                out = result
            else:
                out[:, :, chosen] = result
        assert out is not None
        record.sparse_calls += 1
        record.all_pairs += pairs
        return out.contiguous()

    def _run_pattern(
        self, layer: Layer, pattern: Pattern, members: tuple[int, ...], q: Tensor, k: Tensor, v: Tensor, scale: float
    ) -> Tensor:
        grid = self._moment.grid
        assert grid is not None
        layout = self._layout(pattern.token_order(), grid, q.device)
        key = (self._moment.branch, layer.index, pattern, members, grid, tuple(q.shape), q.dtype, q.device)
        memory = self._memory.setdefault(key, {})
        state = PatternState(layout, scale, self._moment.step, self._shared[grid], memory)
        q, k, v = layout.to_kernel(q), layout.to_kernel(k), layout.to_kernel(v)
        selection = pattern.select(q, k, grid, state)
        try:
            backend = choose(self.options.backend, q, k, v, selection.indices).name
        except ValueError as error:
            if self.options.backend != "auto":
                raise
            raise _NoBackendError(str(error)) from error
        out, _ = block_attention(q, k, v, selection.indices, scale=scale, backend=backend)
        self._backend_used = backend
        record = self._record(layer)
        record.kept_pairs = record.kept_pairs + selection.kept_pairs
        record.visited_pairs = record.visited_pairs + selection.visited_pairs
        return layout.from_kernel(out)

    def _layout(self, order: TokenOrder, grid: Grid, device: torch.device) -> Layout:
        key, shared = ("layout", order, device), self._shared[grid]
        if key not in shared:
            shared[key] = order.layout(grid, device)
        layout: Layout = shared[key]
        return layout

    def _head_index(self, members: tuple[int, ...], grid: Grid, device: torch.device) -> Tensor:
        key, shared = ("heads", members, device), self._shared[grid]
        if key not in shared:
            shared[key] = torch.tensor(members, device=device)
        index: Tensor = shared[key]
        return index

    def _complain(self, layer: Layer, reason: str) -> None:
        if self.options.strict:
            raise StrictError(f"{layer.name}: would run dense: {reason} (strict=True)")
        if reason not in self._told:
            self._told.add(reason)
            logger.warning("%s: running dense: %s", layer.name, reason)

    def _record(self, layer: Layer) -> LayerRecord:
        return self._records.setdefault(layer.index, LayerRecord(layer.name))

    def _clear_record(self) -> None:
        self._records: dict[int, LayerRecord] = {}
        self._told: set[str] = set()
        self._backend_used = ""

    def _video_pairs(self, q: Tensor) -> float:
        video = self._moment.grid.video_tokens if self._moment.grid else q.shape[1]
        return float(q.shape[0] * q.shape[2]) * video * video


class _NoBackendError(ValueError):
    """No backend can run this call."""
