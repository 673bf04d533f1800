"""TopBlocks: what each row keeps, from its scores; sinks, head budgets, clusters; and that all blocks are dense."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import dit_sparse as ds
from dit_sparse.estimate.blocks import Blocks
from dit_sparse.estimate.table import SCORES, parse_score
from dit_sparse.patterns import PatternState, Selection
from dit_sparse.runner import attend_selection
from dit_sparse.selection import HeadOrder
from tests.core.examples import EXAMPLES

# Primes, axes of size 1 and text before, after, both or none.
GRIDS = st.builds(
    ds.Grid, st.integers(1, 5), st.integers(1, 7), st.integers(1, 7), prefix=st.sampled_from([0, 5]),
    suffix=st.sampled_from([0, 130]),
)  # fmt: skip
TILE = "tile:2x2x3"
SINKS = ["text", "none", "first_frame", "diagonal", "text+first_frame+diagonal", "text+diagonal"]


def drawn(grid: ds.Grid, seed: int, heads: int = 4, kv_heads: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((2, grid.tokens, n, 8) for n in (heads, kv_heads, kv_heads))
    q, k, v = (torch.randn(shape, generator=generator) for shape in shapes)
    return q * 2, k * 2, v


def state_of(
    pattern: ds.Pattern, grid: ds.Grid, lengths: Tensor | None = None, v: Tensor | None = None
) -> PatternState:
    return PatternState(pattern.token_order().layout(grid), 8**-0.5, v=v, kv_lengths=lengths, seed=3)


def scores_of(pattern: ds.TopBlocks, q: Tensor, k: Tensor, state: PatternState, scored: int) -> Tensor:
    score, number = parse_score(pattern.score)
    return score.estimate(q, k, Blocks(state.layout, scored, state.scale, state.kv_lengths, state.seed, {}), number)


def chosen_by_sorting(pattern: ds.TopBlocks, row: list[float], always: set[int], forced: set[int]) -> set[int]:
    """The blocks of one row by the rule's definition: sort, then take."""
    competing = [j for j in range(len(row)) if j not in always]
    best = sorted((j for j in competing if row[j] > -math.inf), key=lambda j: (-row[j], j))
    first = [j for j in competing if j in forced]
    rest = [j for j in best if j not in forced]
    at_least = 1 if pattern.at_least is None else max(1, math.floor(pattern.at_least * len(competing) + 0.5))
    if pattern.keep is not None:
        count = max(1, math.floor(pattern.keep * len(competing) + 0.5)) - len(first)
    elif pattern.mass is not None:
        weight = {j: math.exp(row[j] - row[best[0]]) for j in best}
        read, count = sum(weight.get(j, 0.0) for j in first), 0
        while count < len(rest) and read < pattern.mass * sum(weight.values()):
            read, count = read + weight[rest[count]], count + 1
    else:
        finite = torch.tensor([row[j] for j in best], dtype=torch.float64)
        bound = float(finite.mean() + pattern.threshold * finite.std(unbiased=False))
        count = sum(row[j] > bound for j in rest)
    return always | set(first) | set(rest[: max(count, at_least - len(first), 0)])


@pytest.mark.parametrize("score", list(SCORES))
@pytest.mark.parametrize(
    "rule",
    [
        {"keep": 0.4},
        {"mass": 0.7},
        {"threshold": 0.5, "at_least": 0.3},
        {"mass": 0.1, "at_least": 0.5},  # at_least decides
    ],
    ids=str,
)
@settings(max_examples=5, deadline=None)
@given(
    grid=GRIDS, seed=st.integers(0, 2**31), sinks=st.sampled_from(SINKS), dense_text=st.booleans(),
    hides=st.booleans(), video_only=st.booleans(),
)  # fmt: skip
def test_rows_keep_what_the_rule_says(
    score: str, rule: dict[str, float], grid: ds.Grid, seed: int, sinks: str, dense_text: bool, hides: bool,
    video_only: bool,
) -> None:  # fmt: skip
    pattern = ds.TopBlocks(order=TILE, score=score, sinks=sinks, dense_text=dense_text, **rule)
    q, k, _ = drawn(grid, seed)
    lengths = torch.tensor([grid.tokens, max(1, grid.tokens - 7)], dtype=torch.int32) if hides else None
    q = q[:, : grid.video_tokens] if video_only else q
    state = state_of(pattern, grid, lengths)
    layout, video = state.layout, state.layout.video_blocks
    selection = pattern.select(q, k, grid, state)
    scored = video if dense_text or video_only else layout.blocks
    scores, kept = scores_of(pattern, q, k, state, scored), selection.indices.block_mask().unflatten(0, (2, 4))
    text, length = set(range(video, layout.blocks)), layout.length.tolist()
    raster = layout.video_index()
    first_frame = {j for j in range(video) if any(0 <= int(x) < grid.frame_tokens for x in raster[j])}
    pairs = torch.zeros(2, 4, dtype=torch.float64)
    for b, h, i in itertools.product(range(2), range(4), range(layout.blocks)):
        found = set(kept[b, h, i].nonzero().flatten().tolist())
        if i >= scored:
            assert found == set(range(layout.blocks)), "text queries are dense"
            continue
        always = text if "text" in sinks else set()
        forced = (first_frame if "first_frame" in sinks else set()) | ({i} if "diagonal" in sinks else set())
        row = scores[b, h, i].tolist()
        # A sum of masses may meet the bound to the last bit, above all where scores tie.
        bounds = [pattern] if pattern.mass is None else [replace(pattern, mass=pattern.mass + e) for e in (-1e-5, 1e-5)]
        assert found in [chosen_by_sorting(bound, row, always, forced - always) for bound in bounds]
        if i < video:
            pairs[b, h] += length[i] * sum(length[j] for j in found & set(range(video)))
    assert torch.equal(selection.kept_pairs, pairs.flatten())
    assert torch.equal(selection.visited_pairs, pairs.flatten())


def attended(
    pattern: ds.TopBlocks, qkv: tuple[Tensor, Tensor, Tensor], grid: ds.Grid, lengths: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the output of the oracle over the pattern's blocks and dense attention, both in float64."""
    q, k, v = qkv
    state = state_of(pattern, grid, lengths, v.double())
    selection = pattern.select(q.double(), k.double(), grid, state)
    out = attend_selection(
        selection, q.double(), k.double(), v.double(), state.layout, state.scale, lengths, "reference"
    ).out
    group = q.shape[2] // k.shape[2]
    keys, values = (x.double().repeat_interleave(group, 2) for x in (k, v))
    logits = torch.einsum("bqhd,bkhd->bhqk", q.double(), keys) * state.scale
    if lengths is not None:
        logits.masked_fill_((torch.arange(grid.tokens) >= lengths[:, None])[:, None, None], -torch.inf)
    return out, torch.einsum("bhqk,bkhd->bqhd", logits.softmax(-1), values)


# Every score, every way to say "everything", and the options that change what everything is.
EVERYTHING = [ds.TopBlocks(keep=1.0, order=TILE, score=score) for score in SCORES] + [
    ds.TopBlocks(mass=1.0, order=TILE),
    ds.TopBlocks(threshold=-1e4, order=TILE),
    ds.TopBlocks(recall=1.0, order=TILE),
    ds.TopBlocks(error=1e-9, order=TILE),
    ds.TopBlocks(keep=1.0, order=TILE, heads="adaptive"),
    ds.TopBlocks(keep=1.0, clusters=(3, 5)),
    ds.TopBlocks(keep=1.0, order=TILE, sinks="none", dense_text=False),
    ds.TopBlocks(keep=1.0, order=TILE, compensate=True),
    ds.TopBlocks(keep=1.0, order="cycle"),
]


@pytest.mark.parametrize("pattern", EVERYTHING, ids=str)
@settings(max_examples=5, deadline=None)
@given(grid=GRIDS, seed=st.integers(0, 2**31), hides=st.booleans())
def test_keeping_everything_is_dense(pattern: ds.TopBlocks, grid: ds.Grid, seed: int, hides: bool) -> None:
    lengths = torch.tensor([grid.tokens, max(1, grid.tokens - 9)], dtype=torch.int32) if hides else None
    out, dense = attended(pattern, drawn(grid, seed), grid, lengths)
    torch.testing.assert_close(out, dense, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("pattern", EXAMPLES["topblocks"], ids=str)
def test_the_same_call_gives_the_same_blocks(pattern: ds.TopBlocks) -> None:
    grid = ds.Grid(3, 8, 16, suffix=9)
    q, k, v = drawn(grid, 11)
    once, again = (pattern.select(q, k, grid, state_of(pattern, grid, v=v)) for _ in range(2))
    assert torch.equal(once.indices.bits, again.indices.bits)
    assert torch.equal(once.kept_pairs, again.kept_pairs)
    assert once.compensate == pattern.compensate


@pytest.mark.parametrize("pattern", EXAMPLES["topblocks"], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_and_extreme_values_give_no_nan(pattern: ds.TopBlocks, dtype: torch.dtype) -> None:
    grid = ds.Grid(2, 8, 16, suffix=9)
    for factor in (0.0, 1.0, 200.0):
        q, k, v = ((x * factor).to(dtype) for x in drawn(grid, 1))
        state = state_of(pattern, grid, torch.tensor([256, 260], dtype=torch.int32), v)
        selection = pattern.select(q, k, grid, state)
        assert selection.kept_pairs.isfinite().all()
        assert (selection.kept_pairs > 0).all()
        assert selection.indices.block_mask()[:, : state.layout.video_blocks].any(-1).all()


def test_ties_go_to_the_lower_block() -> None:
    pattern, grid = ds.TopBlocks(keep=0.5, order="raster"), ds.Grid(4, 8, 16)
    flat = torch.ones(1, grid.tokens, 1, 8)
    kept = pattern.select(flat, flat, grid, state_of(pattern, grid)).indices.block_mask()
    assert kept[0].tolist() == [[True, True, False, False]] * 4


def recalls(pattern: ds.TopBlocks, q: Tensor, k: Tensor, state: PatternState, selection: Selection) -> Tensor:
    score = scores_of(pattern, q, k, state, state.layout.video_blocks)[..., : state.layout.video_blocks].softmax(-1)
    kept = selection.indices.block_mask().unflatten(0, score.shape[:2])
    video = state.layout.video_blocks
    return (score * kept[:, :, :video, :video]).sum(-1).mean(-1)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([0.1, 0.25, 0.5, 0.8, 1.0]), st.integers(1, 7))
def test_adaptive_heads_share_out_one_budget(seed: int, keep: float, heads: int) -> None:
    grid = ds.Grid(2, 8, 12, suffix=9)
    q, k, _ = drawn(grid, seed, heads, heads)
    # from nearly uniform heads to nearly one-hot ones
    q = (
        q
        * torch.linspace(0.05, 6, heads)[torch.randperm(heads, generator=torch.Generator().manual_seed(seed))][:, None]
    )
    equal, adaptive = (ds.TopBlocks(keep, "tile:1x4x4", heads=word) for word in ("equal", "adaptive"))
    state = state_of(equal, grid)
    video = state.layout.video_blocks
    common, (count, *_) = equal.select(q, k, grid, state), equal.kept_blocks(video, heads)
    share = recalls(equal, q, k, state, common)
    found = adaptive.select(q, k, grid, state).indices.block_mask()[:, :video, :video].sum(-1)
    assert (found == found[:, :1]).all(), "all rows of a head keep the same number"
    found = found[:, 0].view(2, heads)
    moved = min(count // 2, video - count)
    for b in range(2):
        many = min(int((share[b] > 0.8).sum()), heads // 2)
        order = share[b].argsort(descending=True, stable=True)
        assert (found[b][order[:many]] == count - moved).all()
        assert (found[b][order[heads - many :]] == count + moved).all()
        assert (found[b][order[many : heads - many]] == count).all()
    assert (found.sum(1) == heads * count).all()


def test_clusters_choose_among_sorted_tokens() -> None:
    """Two kinds of tokens, mixed everywhere: sorted, half of the blocks hold all of the mass."""
    grid = ds.Grid(4, 8, 16, suffix=3)
    kind = torch.arange(grid.video_tokens) % 2
    x = torch.zeros(1, grid.tokens, 2, 8)
    x[0, : grid.video_tokens, :, 0] = torch.where(kind == 0, 8.0, -8.0)[:, None]
    v = torch.randn(1, grid.tokens, 2, 8)
    state = PatternState(ds.TokenOrder("raster").layout(grid), 1.0, v=v)
    outs = {}
    for clusters in (None, 2):
        pattern = ds.TopBlocks(0.5, "raster", clusters=clusters)
        selection = pattern.select(x, x, grid, state)
        outs[clusters] = attend_selection(selection, x, x, v, state.layout, 1.0, None, "reference").out
        assert (selection.head_order is None) == (clusters is None)
    dense = ds.sparse_attention(x, x, v, ds.TopBlocks(1.0, "raster"), grid, backend="reference", scale=1.0)
    torch.testing.assert_close(outs[2], dense, atol=1e-5, rtol=1e-5)
    assert (outs[None] - dense).abs().max() > 0.1
    assert selection.head_order is not None
    sorted_kind = kind[selection.head_order.k[0, 0]]
    assert sorted_kind.diff().abs().sum() == 1


@settings(max_examples=8, deadline=None)
@given(grid=GRIDS, seed=st.integers(0, 2**31), hides=st.booleans())
def test_clustered_heads_attend_to_their_own_blocks(grid: ds.Grid, seed: int, hides: bool) -> None:
    """Each head's block mask, carried back to the tokens by its own two orders, is what was attended."""
    pattern = ds.TopBlocks(0.4, clusters=(5, 3))
    lengths = torch.tensor([grid.tokens, max(1, grid.tokens - 9)], dtype=torch.int32) if hides else None
    q, k, v = (x.double() for x in drawn(grid, seed))
    state = state_of(pattern, grid, lengths)
    selection = pattern.select(q, k, grid, state)
    order = selection.head_order
    assert order is not None
    out = attend_selection(selection, q, k, v, state.layout, state.scale, lengths, "reference").out
    text = torch.arange(grid.video_tokens, grid.tokens)
    for b, h in itertools.product(range(2), range(4)):
        rows, columns = torch.cat([order.q[b, h], text]), torch.cat([order.k[b, h // 2], text])
        mask = torch.zeros(grid.tokens, grid.tokens, dtype=torch.bool)
        mask[rows[:, None], columns] = selection.indices.token_mask(b * 4 + h)
        if lengths is not None:
            mask[:, int(lengths[b]) :] = False
        logits = (q[b, :, h] @ k[b, :, h // 2].T * state.scale).masked_fill(~mask, -torch.inf)
        torch.testing.assert_close(out[b, :, h], logits.softmax(-1).nan_to_num() @ v[b, :, h // 2])


@pytest.mark.parametrize("score", ["exact", "sampled"])
def test_exact_scores_remember_rows_whatever_their_order(score: str) -> None:
    grid = ds.Grid(3, 8, 16, suffix=3)
    q, k, _ = drawn(grid, 2)
    pattern = ds.TopBlocks(0.5, score=score, clusters=4)
    state = state_of(pattern, grid)
    first = pattern.select(q, k, grid, state)
    if score == "exact":
        level = torch.einsum("bqhd,bkhd->bqhk", q, k.repeat_interleave(2, 2)) * state.scale
        expected = level.logsumexp(-1)[:, : grid.video_tokens]
        torch.testing.assert_close(state.memory["lse"], expected, atol=1e-4, rtol=1e-4)
    order = first.head_order
    assert order is not None
    moved = HeadOrder.to_kernel(q, order.q)
    assert torch.equal(HeadOrder.from_kernel(moved, order.q), q)
    again = pattern.select(q, k, grid, state)
    assert again.kept_pairs.isfinite().all()
