"""Reuse a selection over denoising steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from dit_sparse.grid import Grid
from dit_sparse.order import TokenOrder
from dit_sparse.patterns.base import Pattern, PatternState, StaticPattern
from dit_sparse.rows import recall_of, sample_rows
from dit_sparse.selection import Attended, Selection

# Rows whose exact softmax tells the recall of a mask: a mean over so many is good for some hundredths.
DRIFT_ROWS = 128


@dataclass(frozen=True, eq=False)
class Cached(Pattern):
    """Select with `pattern` at some denoising steps and reuse the blocks in between.

    refresh_steps: after so many steps the selection is made anew; with `recall`, it is looked at instead.
    recall: measured drift. The mask in use is measured on sampled rows, exactly; the heads whose recall is under this
        bound get a new selection in the next step. The decision stays on the device: the host never waits for it, and
        skips the work where it already knows that no head needs it.
    densities: the shares that the successive selections keep, the last one from then on; the pattern's own knob is
        set to them (`TopBlocks(keep=...)`). Densities that fall over the run are DFSAttn's.
    residual: where a selection is made, compute the dense output as well, return it, and add dense minus sparse of
        that step to the outputs that follow. Costs a dense call per selection, and one tensor of the output's size
        for each layer and branch.

    What is remembered belongs to one run, branch (conditional, unconditional or both in a batch), layer, transformer
    and shape; a new run starts afresh. Where no step is known, calls are counted instead.

    Raises: ValueError for values out of range, a pattern that is none, `densities` for a pattern without a knob or
        beside `recall`, `recall` for a static pattern, which cannot drift.
    Papers: AdaSpa (arXiv 2502.21079), section 4: masks change slowly over the steps; DFSAttn (arXiv 2605.23445),
        densities by step; HASTE (arXiv 2605.14513), reuse while drift is small; DiTFastAttn (arXiv 2406.08552),
        section 3, the cached residual.
    """

    name: ClassVar[str] = "cached"
    exact: ClassVar[str] = "block"
    knob: ClassVar[str | None] = "pattern"

    pattern: Pattern
    refresh_steps: int = 4
    recall: float | None = None
    densities: tuple[float, ...] | None = None
    residual: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.pattern, Pattern) or isinstance(self.pattern, Cached):
            raise ValueError(f"Cached pattern must be a Pattern other than Cached, got {self.pattern!r}")
        if isinstance(self.refresh_steps, bool) or not isinstance(self.refresh_steps, int) or self.refresh_steps < 1:
            raise ValueError(f"Cached refresh_steps must be an int >= 1, got {self.refresh_steps!r}")
        if self.recall is not None:
            if not isinstance(self.recall, float) or not 0.0 < self.recall < 1.0:
                raise ValueError(f"Cached recall must be a share between 0 and 1, or None, got {self.recall!r}")
            if isinstance(self.pattern, StaticPattern):
                raise ValueError(f"Cached recall has no meaning for {self.pattern}: a static mask never changes")
        if self.densities is not None:
            self._check_densities()
        if not isinstance(self.residual, bool):
            raise ValueError(f"Cached residual must be True or False, got {self.residual!r}")

    def _check_densities(self) -> None:
        if self.recall is not None:
            raise ValueError("Cached takes densities or recall, not both: the first renews by step, the other by drift")
        if self.pattern.knob != "keep":
            raise ValueError(f"Cached densities set the keep of a TopBlocks pattern, got {self.pattern}")
        plain = isinstance(self.densities, tuple) and not any(isinstance(share, tuple) for share in self.densities)
        if not plain or not self.densities:
            raise ValueError(f"Cached densities must be a tuple of shares, got {self.densities!r}")
        for share in self.densities:
            replace(self.pattern, keep=share)  # type: ignore[call-arg]  # raises where it is no share

    def check(self, grid: Grid) -> None:
        self.pattern.check(grid)

    def token_order(self) -> TokenOrder:
        return self.pattern.token_order()

    def at_layer(self, layer: int) -> Pattern:
        return self._around(self.pattern.at_layer(layer))

    def family(self) -> Pattern:
        return self if self.densities is not None else self._around(self.pattern.family())

    def joined(self, patterns: Sequence[Pattern]) -> Pattern:
        return self._around(self.pattern.joined([one.pattern for one in patterns if isinstance(one, Cached)]))

    def with_density(self, grid: Grid, target: float, device: torch.device | str = "cpu") -> Cached:
        return replace(self, pattern=self.pattern.with_density(grid, target, device), densities=None)

    def select(self, q: Tensor, k: Tensor, grid: Grid, state: PatternState) -> Selection:
        memory = state.memory
        step = memory.get("calls", 0) if state.step is None else state.step
        memory["calls"] = memory.get("calls", 0) + 1
        age = step - memory.get("since", step)
        known: Selection | None = memory.get("selection") if age >= 0 else None
        stale: Stale | None = memory.pop("stale", None)
        memory["step"] = step
        if known is None or (self.recall is None and age >= self.refresh_steps):
            number = 0 if known is None else memory["number"] + 1
            memory["number"], memory["since"] = number, step
            memory["inner"] = {} if known is None else memory["inner"]
            inner = replace(state, memory=memory["inner"])
            memory["selection"] = self._numbered(number).select(q, k, grid, inner)
            memory["owed"] = torch.ones(q.shape[0] * q.shape[2], dtype=torch.bool, device=q.device)
        elif stale is not None and not stale.surely_none():
            # A memory of its own: what is chosen must not depend on whether the host knew that it was needed.
            fresh = self.pattern.select(q, k, grid, replace(state, memory={}))
            memory["selection"] = known.renewed(fresh, stale.heads)
            memory["owed"] = stale.heads | memory.get("owed", False)
        selection: Selection = memory["selection"]
        return selection

    def finish(self, attended: Attended, q: Tensor, k: Tensor, grid: Grid, state: PatternState) -> Tensor:
        memory = state.memory
        out = self.pattern.finish(attended, q, k, grid, replace(state, memory=memory["inner"]))
        if self.recall is not None and memory["step"] - memory["since"] >= self.refresh_steps:
            memory["since"] = memory["step"]
            low = self._recall(attended, q, state) < self.recall
            of_keys = low.unflatten(1, (k.shape[2], -1)).any(-1)  # heads that share keys go stale together
            memory["stale"] = Stale(of_keys.repeat_interleave(q.shape[2] // k.shape[2], 1).flatten())
        if not self.residual:
            return out
        if "owed" not in memory:  # heads whose residual is that of an older selection, bool [B*H]
            return out + memory["residual"]
        assert state.exact is not None
        dense, _ = state.exact(q)
        owed = memory["owed"].view(q.shape[0], 1, q.shape[2], 1)
        memory["residual"] = torch.where(owed, dense - out, memory.get("residual", out))
        del memory["owed"]  # last: a call that fails before leaves it to the next one
        return torch.where(owed, dense, out + memory["residual"])

    def _around(self, inner: Pattern) -> Cached:
        return self if inner is self.pattern else replace(self, pattern=inner)

    def _numbered(self, number: int) -> Pattern:
        """Return the pattern of the selection with this number, counted from 0."""
        if self.densities is None:
            return self.pattern
        share = self.densities[min(number, len(self.densities) - 1)]
        return replace(self.pattern, keep=share)  # type: ignore[call-arg]

    def _recall(self, attended: Attended, q: Tensor, state: PatternState) -> Tensor:
        """Measure the recall of the mask that was just used, fp32 [B, H]."""
        assert state.exact is not None
        rows = sample_rows(state.layout, min(DRIFT_ROWS, state.layout.grid.video_tokens), state.seed)
        _, exact_lse = state.exact(q[:, rows])
        return recall_of(attended.computed_lse, rows, exact_lse)


class Stale:
    """Hold which heads need a new selection, bool [B*H] on the device, and what the host learns of it for free."""

    def __init__(self, heads: Tensor) -> None:
        self.heads = heads
        self._any = heads.any()
        self._copied: torch.cuda.Event | None = None
        if heads.is_cuda:
            on_host = torch.empty((), dtype=torch.bool, pin_memory=True)
            on_host.copy_(self._any, non_blocking=True)
            self._any, self._copied = on_host, torch.cuda.Event()
            self._copied.record()

    def surely_none(self) -> bool:
        """Tell whether no head is stale; False where the device has not got there yet, for nobody waits."""
        return (self._copied is None or self._copied.query()) and not bool(self._any)
