"""Neighborhood and radial attention against their definitions, written a second time, slowly."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dit_sparse as ds

GRIDS = st.builds(ds.Grid, st.integers(1, 7), st.integers(1, 11), st.integers(1, 13))


def places(grid: ds.Grid) -> list[tuple[int, int, int]]:
    return list(itertools.product(*map(range, grid.shape)))


def window_by_hand(length: int, w: int, s: int, d: int, causal: bool, i: int) -> set[int]:
    """Keys of query i on one axis, as the definition reads: within the query's residue class, a shifted window."""
    members = [x for x in range(length) if x % d == i % d]
    place, last = members.index(i), len(members) - 1
    if causal:
        leader = min(place - place % s + s - 1, last)
        return set(members[max(0, leader - w + 1) : place + 1])
    leader = min(place - place % s + s // 2, last)
    start = min(max(0, leader - w // 2), last + 1 - w)
    return set(members[start : start + w])


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_neighborhood_is_the_product_of_three_windows(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.integers(1, 6)) for _ in range(3))
    dilation = tuple(data.draw(st.integers(1, n)) for n in shape)
    window = tuple(data.draw(st.integers(1, n // d)) for n, d in zip(shape, dilation, strict=True))
    stride = tuple(data.draw(st.integers(1, w)) for w in window)
    causal = tuple(data.draw(st.booleans()) for _ in range(3))
    mask = ds.Neighborhood(window, stride, dilation, causal).token_mask(ds.Grid(*shape))
    every = places(ds.Grid(*shape))
    for q, query in enumerate(every):
        per_axis = [
            window_by_hand(*arguments) for arguments in zip(shape, window, stride, dilation, causal, query, strict=True)
        ]
        expected = [all(x in keys for x, keys in zip(key, per_axis, strict=True)) for key in every]
        assert mask[q].tolist() == expected


@settings(max_examples=60, deadline=None)
@given(GRIDS, st.booleans())
def test_radial_follows_the_papers_rule(grid: ds.Grid, sink: bool) -> None:
    s, mask = grid.frame_tokens, ds.Radial(sink=sink).token_mask(grid)
    for i, j in itertools.product(range(grid.frames), repeat=2):
        distance, power = abs(i - j), 1
        while power * 2 <= distance:
            power *= 2
        for k, m in itertools.product(range(s), repeat=2):
            if power <= s:
                kept = (abs(k - m) + 1) * power <= s
            else:
                kept = k == m and distance % (-(-power // s)) == 0
            assert bool(mask[i * s + k, j * s + m]) == (kept or (sink and j == 0))


def test_radial_grows_like_n_log_n() -> None:
    """At 1x, 2x, 4x and 8x frames each doubling adds keys to a query instead of doubling them.

    A band of distances [2^e, 2^(e + 1)) on both sides holds 2^(e + 1) frames of fewer than 2 s / 2^e keys each.
    """
    frames, s = (8, 16, 32, 64), 16
    pairs = [int(ds.Radial(sink=False).token_mask(ds.Grid(count, 4, 4)).sum()) for count in frames]
    growth = [many / few for few, many in itertools.pairwise(pairs)]
    assert growth == sorted(growth, reverse=True), "the factor per doubling falls towards 2; n squared would stay at 4"
    assert growth[-1] < 2.5
    keys = [kept / (count * s) for count, kept in zip(frames, pairs, strict=True)]
    assert max(many - few for few, many in itertools.pairwise(keys)) < 4 * s


def published_radial_by_hand(grid: ds.Grid, decay: float, sink: bool) -> list[list[bool]]:
    """The published code's mask as METHODS describes it, with plain loops over frame pairs and blocks."""
    s, n = grid.frame_tokens, grid.video_tokens
    token = torch.zeros(n, n, dtype=torch.bool)
    for i, j in itertools.product(range(grid.frames), repeat=2):
        distance = abs(i - j)
        width = 2.0 ** s.bit_length() / 2.0 ** distance.bit_length()
        window = s if distance <= 1 else max(width * decay, 128)
        if (width < 128 and distance % int(128 / width) != 0) and not (sink and j == 0):
            continue
        rows, columns = torch.arange(s)[:, None], torch.arange(s)
        near = torch.ones(s, s, dtype=torch.bool) if sink and j == 0 else (rows - columns).abs() <= window
        token[i * s : (i + 1) * s, j * s : (j + 1) * s] = near
    kept = []
    for rows in token.split(128):
        kept.append([])
        for part in rows.split(128, dim=1):
            share = part.float().mean(0)
            kept[-1].append(bool((share > 1 / 3).sum() > 0.6 * (share > 0).sum()))
    return kept


@pytest.mark.parametrize(
    ("grid", "decay", "sink"),
    [
        (ds.Grid(12, 16, 16), 0.2, True),  # a frame is two blocks
        (ds.Grid(9, 13, 17), 0.95, False),  # blocks straddle frames, the last one is short
        (ds.Grid(20, 5, 7), 0.5, True),  # a frame is smaller than a block: the frame frequency drops
    ],
)
def test_radial_block_form_is_the_published_one(grid: ds.Grid, decay: float, sink: bool) -> None:
    mask = ds.Radial(kind="block", decay=decay, sink=sink).block_mask(grid)
    assert mask.tolist() == published_radial_by_hand(grid, decay, sink)


def tiles_by_hand(tokens: int, tile: int, k: int, i: int) -> set[int]:
    """Keys of query i on one axis by sliding tile attention's rule."""
    n, half = -(-tokens // tile), k // 2
    centre = min(max(i // tile, half), n - 1 - half)  # as torch.clamp: the upper end wins where the range is empty
    return {j for j in range(tokens) if abs(j // tile - centre) <= half}


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_tile_clamp_is_sliding_tile_attention(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.integers(1, 7)) for _ in range(3))
    tile = tuple(data.draw(st.integers(1, n)) for n in shape)
    k = tuple(data.draw(st.integers(1, -(-n // t))) for n, t in zip(shape, tile, strict=True))
    window = tuple(a * b for a, b in zip(k, tile, strict=True))
    grid = ds.Grid(*shape)
    mask = ds.Neighborhood(window, tile, clamp="tile").token_mask(grid)
    every = places(grid)
    for q, query in enumerate(every):
        keys = [tiles_by_hand(*arguments) for arguments in zip(shape, tile, k, query, strict=True)]
        assert mask[q].tolist() == [all(x in seen for x, seen in zip(key, keys, strict=True)) for key in every]


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_both_clamps_agree_where_tiles_divide_and_windows_are_odd(data: st.DataObject) -> None:
    tile = tuple(data.draw(st.integers(1, 3)) for _ in range(3))
    count = tuple(data.draw(st.sampled_from((1, 3, 5))) for _ in range(3))
    k = tuple(data.draw(st.sampled_from([one for one in (1, 3, 5) if one <= n])) for n in count)
    grid = ds.Grid(*(t * n for t, n in zip(tile, count, strict=True)))
    window = tuple(a * b for a, b in zip(k, tile, strict=True))
    sliding = ds.Neighborhood(window, tile, clamp="tile")
    assert torch.equal(sliding.token_mask(grid), replace(sliding, clamp="token").token_mask(grid))


def test_an_even_tile_window_sees_one_tile_more() -> None:
    grid = ds.Grid(1, 1, 21)
    masks = [ds.Neighborhood((1, 1, 3 * k), (1, 1, 3), clamp="tile").token_mask(grid) for k in (2, 3, 4, 5, 6, 7)]
    assert torch.equal(masks[0], masks[1])
    assert torch.equal(masks[2], masks[3])
    assert masks[5].all()
    assert not masks[4].all() or torch.equal(masks[4], masks[5])
    assert ds.Neighborhood((1, 1, 18), (1, 1, 3), clamp="tile").token_mask(ds.Grid(1, 1, 17)).all(), "even k of all"


def test_a_fraction_fits_beside_its_dilation() -> None:
    grid = ds.Grid(9, 9, 9)
    mask = ds.Neighborhood(0.5, dilation=2).token_mask(grid)
    index = torch.arange(grid.video_tokens)
    assert ds.Neighborhood(0.5, dilation=2).window_tokens(grid) == (4, 4, 4)
    assert (mask.sum(1) == 64).all()
    assert mask[index, index].all()


def test_radial_decay_has_a_floor() -> None:
    grid = ds.Grid(6, 32, 40)
    found = ds.Radial(kind="block").knob_settings(grid)
    least, below = found[0].block_mask(grid), replace(found[0], decay=found[0].decay / 4).block_mask(grid)
    assert torch.equal(least, below)
    assert not torch.equal(least, found[len(found) // 2].block_mask(grid))
    assert found[-1].decay == 1.0
    assert len(ds.Radial(kind="block").knob_settings(ds.Grid(5, 6, 7))) == 1, "windows are at their least already"
