"""What every pattern is: a frozen dataclass that says which keys each query reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property, lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from dit_sparse.grid import Grid
from dit_sparse.masks import Rule, rule_densities, rule_selection, stacked
from dit_sparse.order import Layout, TokenOrder
from dit_sparse.selection import Attended, Exact, Selection

# Query blocks that tell a static pattern's density on a large grid: enough for two digits.
SAMPLED_BLOCKS = 48
# A knob that comes no nearer to a density than by this share of it does not reach it.
FARTHEST_MISS = 0.25


@dataclass
class PatternState:
    """Hold what a pattern may read beyond q and k, and what it may remember.

    `shared` serves everything that depends on the grid alone; `memory` belongs to this run, branch, layer, group of
    heads and shape, and nothing in it outlives them. `step` is the denoising step, or None where nobody knows it.
    """

    layout: Layout
    scale: float
    step: int | None = None
    shared: dict[Any, Any] = field(default_factory=dict)
    memory: dict[str, Any] = field(default_factory=dict)
    v: Tensor | None = None  # [B, S, Hkv, D] in kernel order
    kv_lengths: Tensor | None = None  # int32 [B]: keys at kernel positions >= kv_lengths[b] are invisible
    seed: int = 0  # of sampled rows: another one for each step and layer
    exact: Exact | None = None


@dataclass(frozen=True, eq=False)
class Pattern:
    """Say which keys each query of a video grid attends to. The dataclass fields are the whole configuration.

    Text tokens (the grid's prefix and suffix) attend and are attended exactly, unless a pattern says otherwise.
    """

    name: ClassVar[str]
    exact: ClassVar[str]  # "token": partial blocks carry a bit tile; "block": a block is read whole or not at all
    knob: ClassVar[str | None] = None  # the field that `with_density` sets
    suggestions: ClassVar[tuple[str, ...]] = ()  # for a search: configurations, as text, without their density

    @cached_property
    def _identity(self) -> str:
        # Not the fields themselves: 1 token and a share of 1.0 are equal numbers.
        return repr(self)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Pattern) and self._identity == other._identity

    def __hash__(self) -> int:
        return hash(self._identity)

    def check(self, grid: Grid) -> None:
        """Raise ValueError where the configuration does not fit the grid."""

    def token_order(self) -> TokenOrder:
        """Return the order in which tokens should reach the kernel."""
        return TokenOrder.parse(getattr(self, "order", "raster"))

    def at_layer(self, layer: int) -> Pattern:
        """Return the pattern that serves one layer, for patterns that take turns."""
        return self

    def family(self) -> Pattern:
        """Return what stands for all patterns that one call can serve together: this one alone, unless overridden."""
        return self

    def joined(self, patterns: Sequence[Pattern]) -> Pattern:
        """Return the one pattern that serves heads with these patterns of its family, in their order."""
        return self

    def select(self, q: Tensor, k: Tensor, grid: Grid, state: PatternState) -> Selection:
        """Choose the blocks for one call. q, k: [B, S, H, D] in kernel order (`state.layout`)."""
        raise TypeError(f"{type(self).__name__} defines no selection: derive from StaticPattern or define select()")

    def finish(self, attended: Attended, q: Tensor, k: Tensor, grid: Grid, state: PatternState) -> Tensor:
        """Return the output of the call, [B, S, H, D] in kernel order: what the kernel made, unless overridden."""
        return attended.out

    def with_density(self, grid: Grid, target: float, device: torch.device | str = "cpu") -> Pattern:
        """Return this pattern with its knob set so that about `target` of the pairs lie in visited blocks.

        Static patterns count some query blocks for that, on `device`.

        Raises: ValueError with the range that it can reach on this grid.
        """
        raise ValueError(f"{self.name} has no knob for its density")

    def __str__(self) -> str:
        """Write the pattern as `pattern_from_text` reads it, without what is the default."""
        shown = {item.name: getattr(self, item.name) for item in fields(self)}
        usual = {item.name: item.default for item in fields(self)}
        options = [f"{name}={_to_text(value)}" for name, value in shown.items() if repr(value) != repr(usual[name])]
        return f"{self.name}:{','.join(options)}" if options else self.name

    def to_dict(self) -> dict[str, Any]:
        """Return name and fields as JSON values, without those that are None; `pattern_from_dict` reads it back."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        return {"name": self.name} | {key: _to_json(value) for key, value in values.items() if value is not None}


@dataclass(frozen=True, eq=False)
class StaticPattern(Pattern):
    """Be a pattern whose kept pairs depend on the grid alone: `keep` is the definition, all else derives from it."""

    reads_text: ClassVar[bool] = True  # whether video queries read the text keys

    def token_rule(self, grid: Grid, device: torch.device | str) -> Rule:
        """Return the definition on one grid: (q_index, k_index) -> bool, elementwise and broadcasting.

        Indices are raster indices of video tokens on `device`. What depends on the grid alone is made here, once.
        """
        raise TypeError(f"{type(self).__name__} must define token_rule()")

    def variants(self, grid: Grid) -> Sequence[StaticPattern]:
        """Return the patterns that the heads of a call take by `variant_of`: only this one, unless overridden.

        Heads are counted among those that a plan gives this pattern.
        """
        return (self,)

    def knob_settings(self, grid: Grid) -> Sequence[StaticPattern]:
        """Return this pattern at each setting of its knob on a grid, from the sparsest to the densest."""
        return ()

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

    def densities(
        self, grid: Grid, device: torch.device | str = "cpu", sampled_blocks: int | None = SAMPLED_BLOCKS
    ) -> tuple[float, float]:
        """Return (density, computed density) among video tokens, from some query blocks or, with None, from all."""
        cls: Any = type(self)
        return _densities(self, cls, grid, torch.device(device), sampled_blocks)

    def nearest(
        self, grid: Grid, target: float, device: torch.device | str = "cpu"
    ) -> tuple[StaticPattern, float, tuple[float, float]]:
        """Return the setting of the knob that is nearest to a computed density, its density, and the range of all.

        Raises: ValueError where there is no knob.
        """
        settings = self.knob_settings(grid)
        if not settings:
            found = self.densities(grid, device)[1]
            raise ValueError(f"{self} has no knob for its density; it is {found:.3f} on the grid {grid}")
        known: dict[int, float] = {}

        def density(index: int) -> float:
            if index not in known:
                known[index] = settings[index].densities(grid, device)[1]
            return known[index]

        low, high = 0, len(settings) - 1
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if density(middle) <= target else (low, middle)
        best = min((low, high), key=lambda index: abs(density(index) - target))
        return settings[best], density(best), (density(0), density(len(settings) - 1))

    def with_density(self, grid: Grid, target: float, device: torch.device | str = "cpu") -> StaticPattern:
        found, reached, (least, most) = self.nearest(grid, target, device)
        inside = least * 0.99 <= target <= most * 1.01
        if not inside or abs(reached - target) > FARTHEST_MISS * target:
            raise ValueError(
                f"{self.name} reaches computed densities from {least:.3f} to {most:.3f} on the grid {grid} by its "
                f"{self.knob}, and nothing nearer to {target} than {reached:.3f} ({found})"
            )
        return found

    def select(self, q: Tensor, k: Tensor, grid: Grid, state: PatternState) -> Selection:
        """Return the blocks of this grid, built once and shared by all layers, branches and steps."""
        heads = ("static", self, q.device, q.shape[0], q.shape[2])
        if heads not in state.shared:
            built = ("static", self, q.device)
            if built not in state.shared:
                self.check(grid)
                state.shared[built] = [
                    rule_selection(one.token_rule(grid, q.device), state.layout, self.reads_text)
                    for one in self.variants(grid)
                ]
            choices: list[Selection] = state.shared[built]
            turns = [variant_of(head, q.shape[2], len(choices)) for head in range(q.shape[2])]
            head_of = torch.tensor(turns * q.shape[0], dtype=torch.int32, device=q.device)
            state.shared[heads] = stacked(choices, head_of)
        selection: Selection = state.shared[heads]
        return selection


@lru_cache(maxsize=4096)
def _densities(
    pattern: StaticPattern, cls: type, grid: Grid, device: torch.device, sampled_blocks: int | None
) -> tuple[float, float]:
    """Count once: searches ask for the same settings again and again, each of which takes seconds on a large grid.

    cls: of the pattern, as a class that was defined anew, in a notebook, writes its instances alike.
    """
    pattern.check(grid)
    layout = pattern.token_order().layout(grid, device)
    found = [rule_densities(one.token_rule(grid, device), layout, sampled_blocks) for one in pattern.variants(grid)]
    return sum(one[0] for one in found) / len(found), sum(one[1] for one in found) / len(found)


def variant_of(head: int, heads: int, variants: int) -> int:
    """Return which variant a head takes: each in turn, or spread evenly where there are more than heads."""
    return head % variants if heads >= variants else head * variants // heads


def static_selection(pattern: StaticPattern, grid: Grid, layout: Layout) -> Selection:
    """Return the blocks of one head, without a cache; of patterns whose heads differ, those of the first."""
    return rule_selection(pattern.variants(grid)[0].token_rule(grid, layout.start.device), layout, pattern.reads_text)


def _to_json(value: Any) -> Any:
    if isinstance(value, Pattern):
        return value.to_dict()
    return [_to_json(item) for item in value] if isinstance(value, tuple) else value


def _to_text(value: Any) -> str:
    if isinstance(value, Pattern):
        return str(value).replace(",", ";")
    if isinstance(value, tuple):
        return "x".join(map(_to_text, value)) if len(value) > 1 else f"{_to_text(value[0])}x"
    return str(value).lower() if isinstance(value, bool) else str(value)
