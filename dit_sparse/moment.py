"""Where a transformer call stands, and what was decided for one of its attention calls."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from dit_sparse.grid import Grid
from dit_sparse.padding import Padding
from dit_sparse.patterns import Dense, Pattern

CROSS = "attention to other tokens"
Groups = tuple[tuple[Pattern, tuple[int, ...]], ...]


def groups_of(patterns: tuple[Pattern, ...]) -> Groups:
    """Group the heads of a layer, whose patterns these are, by what one call can serve."""
    families: dict[Pattern, list[int]] = {}
    for head, pattern in enumerate(patterns):
        families.setdefault(pattern.family(), []).append(head)
    members = [tuple(heads) for heads in families.values()]
    return tuple((patterns[heads[0]].joined([patterns[head] for head in heads]), heads) for heads in members)


@dataclass(frozen=True)
class Moment:
    """Where the current transformer call stands: set once per forward by the pre-hook."""

    grid: Grid | None = None
    text: str = "cross"
    mask_source: object | None = None
    step: int | None = None
    total_steps: int | None = None
    branch: str | None = None
    reason: str = "no grid is known: the transformer was not called through its hooks"

    @property
    def fraction(self) -> float | None:
        return None if self.step is None or not self.total_steps else self.step / self.total_steps

    def grid_of(self, queries: int, keys: int) -> Grid | str:
        """Return the grid of a call with so many tokens, text counted, or the reason why there is none."""
        grid = self.grid
        if grid is None:
            return self.reason
        if self.text == "cross":
            other = queries != keys and keys != grid.tokens
        else:
            other = keys < grid.tokens and keys != grid.video_tokens
        if other:
            return CROSS
        if keys == grid.video_tokens:
            grid = replace(grid, prefix=0, suffix=0)
        elif self.text == "prefix":
            grid = replace(grid, prefix=grid.prefix + max(0, keys - grid.tokens))
        elif self.text == "suffix":
            grid = replace(grid, suffix=grid.suffix + max(0, keys - grid.tokens))
        if keys != grid.tokens or queries not in (grid.tokens, grid.video_tokens):
            return f"{queries} queries and {keys} keys do not match the grid {grid} ({grid.tokens} tokens)"
        return grid


@dataclass(frozen=True)
class Call:
    """What was decided for one attention call: the patterns of its heads, over which tokens."""

    groups: Groups
    grid: Grid
    padding: Padding | None
    number: int  # among the calls of this layer in this forward: some models call once for each sample

    @property
    def dense(self) -> bool:
        return len(self.groups) == 1 and isinstance(self.groups[0][0], Dense)

    def video_pairs(self, q: Tensor) -> float:
        """Count the query-key pairs among video tokens for q [B, S, H, D]."""
        return float(q.shape[0] * q.shape[2]) * self.grid.video_tokens**2
