"""The key blocks that matter most to each query block: the content decides."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from dit_sparse.estimate.blocks import Blocks
from dit_sparse.estimate.budget import (
    adaptive_budget,
    error_budget,
    ranking,
    recall_budget,
    rows_for_error,
    rows_for_recall,
    rows_per_block,
)
from dit_sparse.estimate.clusters import cluster_order
from dit_sparse.estimate.row_outputs import row_outputs
from dit_sparse.estimate.row_scores import rows_of_blocks, sampled_score
from dit_sparse.estimate.sinks import Sinks, parse_sinks, sinks_of
from dit_sparse.estimate.table import parse_score
from dit_sparse.grid import Grid
from dit_sparse.kernels.choice import Choice, choose_blocks
from dit_sparse.kernels.indices import BlockIndices
from dit_sparse.order import TokenOrder
from dit_sparse.patterns.base import Pattern, PatternState
from dit_sparse.selection import HeadOrder, Selection

SELECTORS = ("keep", "mass", "threshold", "recall", "error")
CYCLE = ("raster", "column", "tile")  # the 1-D, 2-D and 3-D partitions that the layers take in turn
SEED_OF_BUDGETS = 1  # added to the seed: a score of sampled rows must not be judged by the same rows


@dataclass(frozen=True, eq=False)
class TopBlocks(Pattern):
    """Keep, for each block of 128 queries, the key blocks with the highest estimated attention mass.

    How many, by one of five fields; with none of them keep is 0.25.
    keep: share of the blocks per row, in (0, 1]; at least one is kept. Or a tuple, with one share for each head of the
        call: heads that differ in a single keep alone are joined so, and served by one score, choice and launch.
    mass: the best blocks until their share of the row's estimated mass reaches this, the crossing one included.
    threshold: the blocks whose score is more than so many standard deviations above the mean of the row's scores.
    recall: as few blocks as let the rows of a head read this share of their exact softmax mass in the mean, text
        included; one number of blocks per head, from exactly computed sample rows.
    error: as few blocks as keep the relative L2 error of a head's output at most this; likewise. Recall is met to .02
        on rows that were not sampled; so is error, but where few rows carry most of a head's output and none is drawn.
    at_least: with all but keep, the share of the blocks that a row keeps in any case.

    Which: score, a word and maybe a number: mean, lse:4 (sub-blocks), antidiagonal:8 (stride), exact, sampled:1 (rows
        per block), lowbit:4 (bits), proxy:4 (heads per group), region:8 (blocks per region); see `dit_sparse.estimate`.
        Ties go to the lower index.
    order: token order; strips make the tokens of a block alike, and blocks whole. "cycle" lets the layers take raster,
        column and tile in turn, and is tile where no layer is known.
    clusters: sort the tokens of each head by k-means clusters first, so many, or (of queries, of keys); order is then
        without meaning.
    heads: "adaptive" moves budget from heads that read much with `keep` to those of this pattern that read little.
    sinks: words joined by "+", or "none". text: every row reads the text, outside the budget; without it text blocks
        compete like others. first_frame, diagonal: blocks with tokens of the first frame, and the row's own one, are
        kept, inside the budget.
    dense_text: text queries read everything, else they choose like others. compensate: means of the blocks that are
        not kept stand for them.

    Raises: ValueError for values out of range, unknown words and fields that exclude each other.
    Papers: MoBA (arXiv 2502.13189), section 2.2: keep; Sparse VideoGen2 (arXiv 2505.18875): mass and clusters; Sol-Attn
        (arXiv 2607.24027): threshold and compensation; AdaSpa (arXiv 2502.21079): adaptive heads; VMoBA (arXiv
        2506.23858): cycle.
    """

    name: ClassVar[str] = "topblocks"
    exact: ClassVar[str] = "block"
    knob: ClassVar[str | None] = "keep"
    suggestions: ClassVar[tuple[str, ...]] = ("topblocks:order=strips,compensate=true", "topblocks:order=strips")

    keep: float | tuple[float, ...] | None = None
    order: str = "strips"
    score: str = "mean"
    mass: float | None = None
    threshold: float | None = None
    recall: float | None = None
    error: float | None = None
    at_least: float | None = None
    heads: str = "equal"
    clusters: int | tuple[int, int] | None = None
    sinks: str = "text"
    dense_text: bool = True
    compensate: bool = False

    def __post_init__(self) -> None:
        given = [name for name in SELECTORS if getattr(self, name) is not None]
        if not given:
            object.__setattr__(self, "keep", 0.25)
        if len(given) > 1:
            raise ValueError(f"TopBlocks takes one of {', '.join(SELECTORS)}, got {' and '.join(given)}")
        if isinstance(self.keep, tuple) and (not self.keep or None in self.keep):
            raise ValueError(f"TopBlocks keep must be a share or a tuple of one share for each head, got {self.keep}")
        for share in self.keep if isinstance(self.keep, tuple) else (self.keep,):
            _check_share("keep", share)
        for name in ("mass", "recall", "error", "at_least"):
            _check_share(name, getattr(self, name))
        if self.threshold is not None and not _is_number(self.threshold):
            raise ValueError(f"TopBlocks threshold must be a finite number of deviations, got {self.threshold!r}")
        if self.at_least is not None and self.keep is not None:
            raise ValueError(f"TopBlocks at_least goes with {', '.join(SELECTORS[1:])}, got it beside keep={self.keep}")
        if self.heads not in ("equal", "adaptive"):
            raise ValueError(f"TopBlocks heads must be equal or adaptive, got {self.heads!r}")
        if self.heads == "adaptive" and self.keep is None:
            raise ValueError(f"TopBlocks heads='adaptive' shares out keep, got {given[0]} instead")
        if self.heads == "adaptive" and isinstance(self.keep, tuple):
            raise ValueError(f"TopBlocks heads='adaptive' shares out one keep among the heads, got keep={self.keep}")
        for name in ("dense_text", "compensate"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"TopBlocks {name} must be True or False, got {getattr(self, name)!r}")
        parse_score(self.score)
        sinks = parse_sinks(self.sinks)
        counts = () if self.clusters is None else _pair(self.clusters)
        if counts and sinks - {"text"}:
            raise ValueError(f"TopBlocks clusters leave no first frame and no diagonal, got sinks={self.sinks!r}")
        if self.order != "cycle":
            TokenOrder.parse(self.order)

    def token_order(self) -> TokenOrder:
        if self.clusters is not None:
            return TokenOrder("raster")
        return TokenOrder.parse(CYCLE[-1] if self.order == "cycle" else self.order)

    def at_layer(self, layer: int) -> Pattern:
        return replace(self, order=CYCLE[layer % len(CYCLE)]) if self.order == "cycle" else self

    def family(self) -> Pattern:
        alone = self.heads == "adaptive" or self.keep is None or isinstance(self.keep, tuple)
        return self if alone else replace(self, keep=None)

    def joined(self, patterns: Sequence[Pattern]) -> Pattern:
        keeps = tuple(one.keep for one in patterns if isinstance(one, TopBlocks))
        return self if len(set(patterns)) == 1 else replace(self, keep=keeps)  # type: ignore[arg-type]

    def kept_blocks(self, competing: int, heads: int) -> tuple[int, ...]:
        """Return how many of the competing blocks a row of each head keeps: the nearest whole number, at least one.

        Raises: ValueError where keep has shares for another number of heads.
        """
        assert self.keep is not None
        shares = self.keep if isinstance(self.keep, tuple) else (self.keep,) * heads
        if len(shares) != heads:
            raise ValueError(
                f"TopBlocks keep must have one share for each head of the call, got {len(shares)} shares for {heads} "
                f"heads (keep={self.keep}); give {heads} shares, or one number for all heads"
            )
        return tuple(_blocks(share, competing) for share in shares)

    def with_density(self, grid: Grid, target: float, device: torch.device | str = "cpu") -> TopBlocks:
        layout = self.token_order().layout(grid, device)
        forced = sinks_of(self.sinks, layout, layout.video_blocks).forced
        least = 1.0 if forced is None else float(forced.sum(-1).double().mean())
        lowest = max(1.0, least) / layout.video_blocks
        if not lowest * 0.99 <= target <= 1.0:
            raise ValueError(
                f"topblocks reaches computed densities from {lowest:.3f} to 1 on the grid {grid} by its keep, got the "
                f"target {target}"
            )
        others = dict.fromkeys((*SELECTORS, "at_least"))
        return replace(self, **others | {"keep": float(target)})  # type: ignore[arg-type]

    def select(self, q: Tensor, k: Tensor, grid: Grid, state: PatternState) -> Selection:
        layout, v, order = state.layout, state.v, None
        if self.clusters is not None:
            order = cluster_order(q, k, grid.video_tokens, _pair(self.clusters), state.memory, state.kv_lengths)
            q, k = HeadOrder.to_kernel(q, order.q), HeadOrder.to_kernel(k, order.k)
            v = None if v is None or self.error is None else HeadOrder.to_kernel(v, order.k)
        rows_of_text = q.shape[1] == grid.tokens and not self.dense_text
        blocks = Blocks(
            layout, layout.blocks if rows_of_text else layout.video_blocks, state.scale, state.kv_lengths, state.seed,
            state.memory, None if order is None else order.q,
        )  # fmt: skip
        estimator, number = parse_score(self.score)
        score = estimator.estimate(q, k, blocks, number)  # [B, H, Q, K]
        sinks = self._shared_sinks(state, blocks.scored)
        rows = score.shape[0] * score.shape[1]
        choose = functools.partial(
            choose_blocks,
            score.flatten(0, 1),
            counted=layout.video_blocks,
            kv_len=layout.length,
            at_least=1 if self.at_least is None else _blocks(self.at_least, sinks.competing),
            always=sinks.always,
            forced=sinks.forced,
        )
        if self.error is not None:
            keep: Tensor | None = self._error_budget(q, k, v, blocks, choose, rows, sinks.competing)
        else:
            keep = self._budget(score, q, k, blocks, sinks, state)
        choice = choose(q_len=layout.length, keep=keep, mass=self.mass, threshold=self.threshold)
        head_of = _constant(state, ("head_of", rows), lambda on: torch.arange(rows, dtype=torch.int32, device=on))
        indices = BlockIndices(choice.bits, head_of, layout.start, layout.length, layout.start, layout.length)
        return Selection(indices, choice.pairs, choice.pairs, self.compensate, order)

    def _budget(
        self,
        score: Tensor,  # fp32 [B, H, Q, K]
        q: Tensor,
        k: Tensor,
        blocks: Blocks,
        sinks: Sinks,
        state: PatternState,
    ) -> Tensor | None:
        """Return how many competing blocks each row keeps, int32 [B*H], or None for mass and threshold."""
        if self.mass is not None or self.threshold is not None:
            return None
        (batch, heads), competing = score.shape[:2], sinks.competing
        keep = () if self.keep is None else self.kept_blocks(competing, heads)
        if self.keep is not None and self.heads == "equal":
            key = ("keep", keep, batch)
            return _constant(state, key, lambda on: torch.tensor(keep * batch, dtype=torch.int32, device=on))
        ranked = ranking(score, sinks.always, sinks.forced)
        weight = blocks.q_length / blocks.scored_tokens
        if self.keep is not None:
            return adaptive_budget(score, ranked, sinks.always, weight, keep[0], competing)
        assert self.recall is not None
        rows_wanted = rows_per_block(blocks.layout, rows_for_recall(self.recall))
        share = sampled_score(q, k, replace(blocks, seed=blocks.seed + SEED_OF_BUDGETS), rows_wanted).exp()
        return recall_budget(share, ranked, sinks.always, weight, self.recall, competing)

    def _error_budget(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor | None,
        blocks: Blocks,
        choose: Callable[..., Choice],
        heads: int,
        competing: int,
    ) -> Tensor:
        """Return how many competing blocks each row keeps for the error target, int32 [B*H]."""
        if v is None:
            raise ValueError("TopBlocks(error=...) measures outputs and needs the values: PatternState.v is None")
        assert self.error is not None
        per_block = rows_per_block(blocks.layout, rows_for_error(self.error))
        at, share = rows_of_blocks(blocks.q_start, blocks.q_length, per_block, blocks.seed + SEED_OF_BUDGETS)
        outputs = row_outputs(q, k, v, at, share, blocks, self.compensate)
        return error_budget(
            lambda keep: outputs.error(choose(q_len=blocks.q_length, keep=keep, mass=None, threshold=None).bits),
            heads,
            self.error,
            competing,
            q.device,
        )

    def _shared_sinks(self, state: PatternState, scored: int) -> Sinks:
        key = ("sinks", self.sinks, scored, self.token_order(), state.layout.start.device)
        if key not in state.shared:
            state.shared[key] = sinks_of(self.sinks, state.layout, scored)
        sinks: Sinks = state.shared[key]
        return sinks


def _constant(state: PatternState, key: tuple[object, ...], make: Callable[[torch.device], Tensor]) -> Tensor:
    """Return a tensor on the layout's device that depends on shapes alone, made once."""
    device = state.layout.start.device
    place = ("topblocks", *key, device)
    if place not in state.shared:
        state.shared[place] = make(device)
    found: Tensor = state.shared[place]
    return found


def _blocks(share: float, competing: int) -> int:
    return max(1, math.floor(share * competing + 0.5))


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _check_share(name: str, value: float | None) -> None:
    if value is not None and not (_is_number(value) and 0.0 < value <= 1.0):
        raise ValueError(f"TopBlocks {name} must be a share in (0, 1], got {value!r}")


def _pair(clusters: int | tuple[int, int]) -> tuple[int, int]:
    """Return the clusters of queries and of keys."""
    pair = clusters if isinstance(clusters, tuple) else (clusters, clusters)
    if len(pair) != 2 or not all(isinstance(x, int) and not isinstance(x, bool) and x >= 1 for x in pair):
        raise ValueError(f"TopBlocks clusters must be a number >= 1 or (of queries, of keys), got {clusters!r}")
    return pair[0], pair[1]
