"""A plan bound to one transformer: decides each attention call, owns the caches, keeps the record."""

from __future__ import annotations

import contextlib
import logging
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from torch import Tensor

from dit_sparse.execution import Execution, Tensors, dense
from dit_sparse.grid import Grid
from dit_sparse.kernels.backends import NoBackendError
from dit_sparse.moment import CROSS, Call, Groups, Moment, groups_of
from dit_sparse.options import Options
from dit_sparse.padding import Padding, read_padding
from dit_sparse.plan import Plan
from dit_sparse.record import LayerRecord, Summary

if TYPE_CHECKING:
    from dit_sparse.attention import Layer

logger = logging.getLogger("dit_sparse")

PADDINGS_KEPT = 16  # a run needs one for each branch
_NO_RUN = object()


class StrictError(RuntimeError):
    """A call that the plan wanted sparse had to run dense, and `strict=True` forbids that."""


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
        self._told_of_grid = False
        self.timer: Callable[[Layer], AbstractContextManager[Any]] | None = None  # wraps each call; benchmarks set it
        self.reset()

    def __getstate__(self) -> dict[str, Any]:
        kept = ("plan", "transformer", "layer_names", "heads", "options")
        return {name: self.__dict__[name] for name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state.pop("plan"), **state)  # type: ignore[misc]

    def reset(self) -> None:
        """Forget everything: moment, caches and record."""
        self._moment = Moment()
        self._run: object = _NO_RUN
        self.execution = Execution(self.options.backend, self.options.monitor)
        self._paddings: dict[Any, Padding | str] = {}
        self._groups: dict[tuple[float | None, int, int], Groups] = {}
        self._calls: Counter[int] = Counter()  # of each layer in this forward
        self.grid: Grid | None = None  # of the last call that had one, text counted
        self._clear_record()

    def end_run(self) -> None:
        """Forget what belongs to the run that ended; the record of it stays readable."""
        self._run = _NO_RUN
        self.execution.forget_run()

    def start_forward(
        self,
        grid: Grid | None,
        *,
        text: str = "cross",
        mask_source: object | None = None,
        step: int | None = None,
        total_steps: int | None = None,
        branch: str | None = None,
        run: object = None,
        reason: str | None = None,
    ) -> None:
        """Tell where the coming transformer forward stands; `grid` None runs it dense for `reason`.

        text: "prefix" or "suffix" where tokens beyond the grid's own may stand, "cross" where there must be none.
        mask_source: stands for what the mask is made of, the same object for the same mask; None where a mask is of
            unknown origin. A `run` that is not the object of the last call starts a new run: content-dependent caches
            and the record go.
        """
        if run is not self._run:
            self.execution.forget_run()
            self._run = run
            self._clear_record()
        self._calls.clear()
        if grid is not None and not self._told_of_grid:
            self._compare_grid(grid)
        self._moment = Moment(grid, text, mask_source, step, total_steps, branch, reason or Moment.reason)

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
            call = self._decide(layer, q, k, attn_mask, is_causal)
            given = Tensors(q, k, v, attn_mask, scale, enable_gqa, backend)
            if isinstance(call, Call) and call.dense:
                if call.padding is not None and call.padding.hides:
                    self._note(layer, q, "plan: dense, without the padded text")
                    return dense(layer, given, call)
                call = "plan: dense"
            if isinstance(call, Call):
                try:
                    return self.execution.sparse(layer, given, call, self._moment, self._record(layer))
                except NoBackendError as error:
                    call = f"no backend: {error}"
                    self._complain(layer, call)
            self._note(layer, q, call)
            return layer.dense(q, k, v, attn_mask, dropout_p, is_causal, scale, enable_gqa, backend)

    def note_dense(self, layer: Layer, reason: str) -> None:
        """Record a call that ran dense before it reached `attend`.

        Raises: StrictError under `strict=True`.
        """
        self._complain(layer, reason)
        self._record(layer).dense_reasons[reason] += 1

    def summary(self, unknown: tuple[str, ...] = ()) -> Summary:
        """Return the record of the last run."""
        grid = self.grid or self._moment.grid
        records = tuple(self._records.get(index, LayerRecord(name)) for index, name in enumerate(self.layer_names))
        return Summary(
            self.plan.name,
            str(grid or "unknown"),
            self.execution.backend_used or self.options.backend,
            records,
            unknown,
        )

    def _decide(self, layer: Layer, q: Tensor, k: Tensor, attn_mask: Tensor | None, is_causal: bool) -> Call | str:
        """Return what this call computes, or the reason to run the model's own call."""
        moment, number = self._moment, self._calls[layer.index]
        self._calls[layer.index] += 1
        if not self.plan.rules:
            return "plan: dense"
        guard = self.options.dense_reason(
            layer.index, len(self.layer_names), q.shape[1], q.device.type, moment.step, moment.total_steps
        )
        if guard is not None:
            return guard
        grid = moment.grid_of(q.shape[1], k.shape[1])
        if grid == CROSS:
            return CROSS
        padding: Padding | str | None = None
        if not isinstance(grid, str) and attn_mask is not None:
            padding = self._padding(attn_mask, grid, q.shape[0])
        unwanted = next((found for found in (grid, padding) if isinstance(found, str)), None)
        if unwanted is None and is_causal:
            unwanted = "causal attention"
        if unwanted is None and self._position_unknown():
            unwanted = "denoising step or number of steps unknown: enable on the pipeline, not on the transformer alone"
        if unwanted is not None:
            self._complain(layer, unwanted)
            return unwanted
        assert isinstance(grid, Grid)
        assert not isinstance(padding, str)
        self.grid = grid
        return Call(self._groups_at(moment.fraction, layer.index, q.shape[2]), grid, padding, number)

    def _groups_at(self, fraction: float | None, layer: int, heads: int) -> Groups:
        """Return which heads of a layer share a call at a part of the schedule, worked out once."""
        key = (fraction, layer, heads)
        if key not in self._groups:
            patterns = self.plan.patterns_at(fraction, self.transformer, layer, heads)
            here = {pattern: pattern.at_layer(layer) for pattern in dict.fromkeys(patterns)}
            self._groups[key] = groups_of(tuple(here[pattern] for pattern in patterns))
        return self._groups[key]

    def _compare_grid(self, grid: Grid) -> None:
        """Warn, once for this Schedule, where the plan was made on another grid."""
        made_on = self.plan.provenance.get("grid")
        known = [one.partition("+")[0].strip() for one in str(made_on or "").split(",")]
        if isinstance(made_on, str) and "x".join(map(str, grid.shape)) not in known:
            self._told_of_grid = True
            logger.warning(
                "%s: plan %r was made on the grid %s and runs on %s; its shares of axes and steps carry over, what was "
                "measured with it does not",
                self.transformer, self.plan.name, made_on, grid,
            )  # fmt: skip

    def _padding(self, mask: Tensor, grid: Grid, batch: int) -> Padding | str:
        """Return what a mask says of the text, or why it cannot be honoured."""
        source = self._moment.mask_source
        if source is None:
            return "attention mask"
        key = (source, tuple(mask.shape), grid, batch)
        if key not in self._paddings:
            for oldest in list(self._paddings)[: max(0, len(self._paddings) + 1 - PADDINGS_KEPT)]:
                del self._paddings[oldest]
            self._paddings[key] = read_padding(mask, grid, batch)
        return self._paddings[key]

    def _position_unknown(self) -> bool:
        """Say whether plan or options speak of steps that nobody has told us."""
        needs_total = self.plan.needs_total_steps or self.options.needs_total_steps
        return (needs_total and self._moment.fraction is None) or (
            self.options.needs_step and self._moment.step is None
        )

    def _complain(self, layer: Layer, reason: str) -> None:
        if self.options.strict:
            raise StrictError(f"{layer.name}: would run dense: {reason} (strict=True)")
        if reason not in self._told:
            self._told.add(reason)
            logger.warning("%s: running dense: %s", layer.name, reason)

    def _note(self, layer: Layer, q: Tensor, reason: str) -> None:
        record = self._record(layer)
        record.dense_reasons[reason] += 1
        record.dense_pairs += self._video_pairs(q)

    def _record(self, layer: Layer) -> LayerRecord:
        return self._records.setdefault(layer.index, LayerRecord(layer.name))

    def _clear_record(self) -> None:
        self._records: dict[int, LayerRecord] = {}
        self._told: set[str] = set()
        self.grid = None

    def _video_pairs(self, q: Tensor) -> float:
        video = self._moment.grid.video_tokens if self._moment.grid else q.shape[1]
        return float(q.shape[0] * q.shape[2]) * video * video
