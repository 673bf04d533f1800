"""Every score against its definition, and the row samples and clusters that estimates are made of."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import dit_sparse as ds
from dit_sparse.estimate import blocks as blocks_module
from dit_sparse.estimate.blocks import Blocks
from dit_sparse.estimate.clusters import cluster_order, kmeans
from dit_sparse.estimate.row_scores import exact_score, rows_of_blocks
from dit_sparse.estimate.table import SCORES, parse_score
from tests.core.score_definitions import DEFINITIONS, exact

# Ragged tiles, axes of size 1, text before, after, both or none; small, for the definitions loop over everything.
GRIDS = st.builds(
    ds.Grid, st.integers(1, 3), st.integers(1, 5), st.integers(1, 5), prefix=st.sampled_from([0, 3]),
    suffix=st.sampled_from([0, 5]),
)  # fmt: skip
# Each score with its default, and with a number that divides neither blocks, tiles nor heads.
SPECS = [
    "mean", "lse:4", "lse:3", "antidiagonal:8", "antidiagonal:3", "exact", "sampled:1", "sampled:5", "lowbit:4",
    "lowbit:8", "proxy:4", "proxy:3", "region:8", "region:3",
]  # fmt: skip


def drawn(grid: ds.Grid, seed: int, heads: int = 4, kv_heads: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(2, grid.tokens, heads, 8, generator=generator)
    return q * 2, torch.randn(2, grid.tokens, kv_heads, 8, generator=generator) * 2


def scene(grid: ds.Grid, seed: int, text_rows: bool = False, hides: bool = False) -> Blocks:
    layout = ds.TokenOrder("tile", (1, 2, 3)).layout(grid)
    scored = layout.blocks if text_rows else layout.video_blocks
    lengths = torch.tensor([grid.tokens, max(1, grid.tokens - 4)], dtype=torch.int32) if hides else None
    return Blocks(layout, scored, 8**-0.5, lengths, seed)


@pytest.mark.parametrize("spec", SPECS)
@settings(max_examples=8, deadline=None)
@given(grid=GRIDS, seed=st.integers(0, 2**31), text_rows=st.booleans(), hides=st.booleans(), tiny=st.booleans())
def test_scores_follow_their_definitions(
    spec: str, grid: ds.Grid, seed: int, text_rows: bool, hides: bool, tiny: bool
) -> None:
    q, k = drawn(grid, seed)
    given = scene(grid, seed, text_rows, hides)
    if hides:
        k[1, int(given.kv_lengths[1]) :] = torch.nan
    score, number = parse_score(spec)
    with pytest.MonkeyPatch.context() as patch:
        if tiny:  # every piece of the work by itself
            patch.setattr(blocks_module, "PIECE_ELEMENTS", 1)
        found = score.estimate(q, k, given, number)
    expected = DEFINITIONS[spec.partition(":")[0]](q, k.nan_to_num(), given, number)
    assert found.dtype == torch.float32
    # one number that falls on the other side of a rounding border moves a 4-bit score by some thousandths
    tolerance = 1e-2 if spec.startswith("lowbit") else 2e-5
    torch.testing.assert_close(found.double(), expected, atol=tolerance, rtol=tolerance)


@settings(max_examples=10, deadline=None)
@given(grid=GRIDS, seed=st.integers(0, 2**31), hides=st.booleans())
def test_later_exact_searches_use_the_first_lse(grid: ds.Grid, seed: int, hides: bool) -> None:
    (q, k), (later_q, later_k), given = drawn(grid, seed), drawn(grid, seed + 1), scene(grid, seed, hides=hides)
    first = exact_score(q, k, given)
    lse = given.memory["lse"]
    assert tuple(lse.shape) == (2, grid.video_tokens, 4)
    found = exact_score(later_q, later_k, given)
    assert given.memory["lse"] is lse
    torch.testing.assert_close(found.double(), exact(later_q, later_k, given, 1, lse), atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(exact_score(q, k, given), first, atol=2e-5, rtol=2e-5)


def test_an_outlived_lse_leaves_scores_finite() -> None:
    grid = ds.Grid(2, 4, 6)
    (q, k), given = drawn(grid, 0), scene(grid, 0)
    for level in (-500.0, 500.0):
        given.memory["lse"] = torch.full((2, grid.video_tokens, 4), level)
        assert exact_score(q, k, given).isfinite().all()


@pytest.mark.parametrize("spec", SPECS)
def test_where_no_key_is_visible_all_is_hidden(spec: str) -> None:
    grid = ds.Grid(2, 3, 4)
    q, k = drawn(grid, 1)
    layout = ds.TokenOrder("raster").layout(grid)
    given = Blocks(layout, layout.video_blocks, 0.3, torch.tensor([0, 24], dtype=torch.int32))
    k[0] = torch.nan
    score, number = parse_score(spec)
    found = score.estimate(q, k, given, number)
    assert (found[0] == -torch.inf).all()
    assert found[1].isfinite().all()


def test_log_mass_beats_the_mean_where_a_block_is_not_alike() -> None:
    """What lse, antidiagonal, exact and sampled are for: one strong key in a block of strangers."""
    grid = ds.Grid(1, 8, 128)
    layout = ds.TokenOrder("raster").layout(grid)
    q, k = torch.zeros(1, grid.tokens, 1, 16), torch.zeros(1, grid.tokens, 1, 16)
    q[..., 0] = 4.0
    k[:, :, :, 0] = 1.0  # every block is worth the same...
    k[:, 256:384, :, 0] = torch.linspace(-20, 20, 128)[None, :, None]  # ... but one, whose mean is less
    given = Blocks(layout, layout.video_blocks, 0.25, memory={})
    best = {spec: parse_score(spec)[0].estimate(q, k, given, parse_score(spec)[1]).argmax(-1) for spec in SPECS}
    assert not (best["mean"] == 2).any()
    for spec in ("lse:4", "antidiagonal:8", "exact", "sampled:1", "lowbit:8"):
        assert (best[spec] == 2).all(), spec


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 128), min_size=1, max_size=9), st.integers(1, 128), st.integers(0, 2**32))
def test_sampled_rows_are_strata_of_their_blocks(lengths: list[int], per_block: int, seed: int) -> None:
    length = torch.tensor(lengths, dtype=torch.int32)
    start = length.cumsum(0, dtype=torch.int32) - length
    rows, share = rows_of_blocks(start, length, per_block, seed)
    for block, tokens in enumerate(lengths):
        real = rows[block][share[block] > 0] - int(start[block])
        count = min(per_block, tokens)
        assert len(real) == count
        edges = [tokens * row // count for row in range(count + 1)]
        assert all(edges[row] <= int(at) < edges[row + 1] for row, at in enumerate(real))
        parts = [(last - first) / tokens for first, last in itertools.pairwise(edges)]
        torch.testing.assert_close(share[block][:count], torch.tensor(parts))
        assert (rows[block] >= start[block]).all()
        assert (rows[block] < start[block] + tokens).all()
        torch.testing.assert_close(share[block].sum(), torch.tensor(1.0))


def test_other_seeds_draw_other_rows_and_all_rows_are_drawn() -> None:
    length = torch.full((5,), 100, dtype=torch.int32)
    start = length.cumsum(0, dtype=torch.int32) - length
    drawn_rows = torch.stack([rows_of_blocks(start, length, 3, seed)[0] for seed in range(3000)])
    counts = torch.bincount(drawn_rows.flatten(), minlength=500)
    assert (counts > 60).all()  # 90 expected
    assert (counts < 120).all()
    assert torch.equal(drawn_rows[7], rows_of_blocks(start, length, 3, 7)[0])


def test_kmeans_finds_separate_clusters_and_keeps_empty_ones() -> None:
    generator = torch.Generator().manual_seed(0)
    truth = torch.arange(200) // 50  # evenly spread starts meet each of them
    points = torch.randn(3, 200, 8, generator=generator) * 0.1 + torch.eye(8)[truth] * 9
    centroids, label = kmeans(points, 4)
    for group in range(3):
        assert [label[group][truth == c].unique().numel() for c in range(4)] == [1] * 4
        assert label[group].unique().numel() == 4
    far = torch.cat([centroids, torch.full((3, 1, 8), 1e3)], 1)
    kept, _ = kmeans(points, 5, far, rounds=2)
    assert torch.equal(kept[:, 4], far[:, 4])
    torch.testing.assert_close(kept[:, :4], centroids)


def test_kmeans_never_gets_worse_and_ends_at_the_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    points = torch.randn(2, 300, 6, generator=torch.Generator().manual_seed(3))
    spread = []
    for rounds in (1, 2, 5, 20):
        centroids, label = kmeans(points, 11, rounds=rounds)
        assert torch.equal(label, torch.cdist(points, centroids).argmin(-1))
        spread.append(float((points - centroids.gather(1, label[..., None].expand(-1, -1, 6))).square().sum()))
    assert spread == sorted(spread, reverse=True)
    monkeypatch.setattr(blocks_module, "PIECE_ELEMENTS", 700)
    pieced = kmeans(points, 11, rounds=20)
    torch.testing.assert_close(pieced[0], centroids)
    assert torch.equal(pieced[1], label)


def test_cluster_orders_sort_each_head_and_start_warm() -> None:
    grid, memory = ds.Grid(2, 6, 9, suffix=5), {}
    q, k = drawn(grid, 5)
    lengths = torch.tensor([108, 100], dtype=torch.int32)
    k[1, 100:] = torch.nan
    order = cluster_order(q, k, 108, (7, 500), memory, lengths)
    assert tuple(order.q.shape) == (2, 4, 108)
    assert tuple(order.k.shape) == (2, 2, 108)
    for sorted_heads in (order.q, order.k):
        assert torch.equal(sorted_heads.sort(-1).values, torch.arange(108).expand_as(sorted_heads))
    assert torch.equal(order.k[1, :, 100:], torch.arange(100, 108).expand(2, -1)), "hidden keys stay the last ones"
    points = q[:, :108].transpose(1, 2).flatten(0, 1)
    centroids, label = kmeans(points, 7)
    ordered = label.gather(1, order.q.flatten(0, 1))
    assert torch.equal(ordered, ordered.sort(-1).values)
    torch.testing.assert_close(memory["centroids of q"], centroids)
    cluster_order(q, k, 108, (7, 500), memory, lengths)
    again, _ = kmeans(points, 7, centroids, rounds=2)
    torch.testing.assert_close(memory["centroids of q"], again)


def test_every_score_has_a_definition() -> None:
    assert set(DEFINITIONS) == set(SCORES) == {spec.partition(":")[0] for spec in SPECS}
