"""Static patterns, each against its definition written a second time, slowly; refusals and densities."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, fields, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dit_sparse as ds
from dit_sparse.masks import Rule
from dit_sparse.patterns import PatternState, StaticPattern
from dit_sparse.patterns.base import FARTHEST_MISS

GRIDS = st.builds(ds.Grid, st.integers(1, 7), st.integers(1, 11), st.integers(1, 13))
SMALL = st.builds(ds.Grid, st.integers(1, 5), st.integers(1, 5), st.integers(1, 6))


def places(grid: ds.Grid) -> list[tuple[int, int, int]]:
    return list(itertools.product(*map(range, grid.shape)))


@settings(max_examples=25, deadline=None)
@given(SMALL, st.sampled_from(["diagonal", "multi-diagonal"]), st.one_of(st.integers(1, 9), st.floats(0.01, 1.0)))
def test_stripes_are_bands(grid: ds.Grid, kind: str, width: int | float) -> None:
    s, n = grid.frame_tokens, grid.video_tokens
    mask = ds.Stripes(kind, width).token_mask(grid).tolist()
    available = n if kind == "diagonal" else s
    w = width if isinstance(width, int) else max(1, math.floor(width * available + 0.5))
    for q, k in itertools.product(range(n), repeat=2):
        distance = abs(q - k) if kind == "diagonal" else abs(q % s - k % s)
        assert mask[q][k] == (distance <= w)


@pytest.mark.parametrize(("width", "columns"), [(1, [0]), (129, [0, 3]), (0.5, [0, 2, 4]), (1.0, [0, 1, 2, 3, 4, 5])])
def test_vertical_stripes_are_spread_evenly(width: int | float, columns: list[int]) -> None:
    grid = ds.Grid(5, 9, 15)  # 675 tokens: six runs, the last one short
    pattern = ds.Stripes("vertical", width)
    assert pattern.stripe_columns(grid).nonzero().flatten().tolist() == columns
    index = torch.arange(grid.video_tokens)
    read = torch.tensor([int(key) // 128 in columns for key in index])
    assert torch.equal(pattern.token_mask(grid), read | ((index[:, None] - index).abs() <= 128))


@settings(max_examples=25, deadline=None)
@given(GRIDS, st.sampled_from(["spatial", "temporal"]), st.floats(0.01, 1.0), st.booleans())
def test_frames_are_bands_in_their_order(grid: ds.Grid, kind: str, width: float, sink: bool) -> None:
    n, s = grid.video_tokens, grid.frame_tokens
    number = torch.arange(n).view(grid.shape) if kind == "spatial" else torch.arange(n).view(s, -1).T
    place = number.flatten()
    band = math.ceil(max(1, math.floor(width * n + 0.5)) / 128) * 128
    expected = (place[:, None] - place).abs() <= band
    expected[:, :s] |= sink
    assert torch.equal(ds.Frames(kind, width, sink).token_mask(grid), expected)


@pytest.mark.parametrize("kind", ["spatial", "temporal"])
def test_the_density_of_a_band_is_the_published_one(kind: str) -> None:
    grid, blocks = ds.Grid(8, 16, 32), 32
    for width in (5 / 32, 0.25):
        density, computed = ds.Frames(kind, width).densities(grid, sampled_blocks=None)
        assert density == pytest.approx(1 - (1 - width) ** 2, abs=1e-3)
        assert computed == pytest.approx(1 - (1 - width) ** 2, abs=2 / blocks), "a solid band in its own order"


def powers_by_hand(a: int, b: int, unit: int, window: int) -> bool:
    return abs(a // unit - b // unit) in (0, 1, 2, 4, 8, 16) or abs(a - b) <= window


@settings(max_examples=30, deadline=None)
@given(st.data(), st.booleans())
def test_powers_is_the_product_of_three_rules(data: st.DataObject, sink: bool) -> None:
    shape = (data.draw(st.integers(1, 6)), data.draw(st.integers(1, 4)), data.draw(st.integers(1, 13)))
    unit = tuple(data.draw(st.integers(1, 3)) for _ in range(3))
    window = tuple(data.draw(st.integers(0, 3)) for _ in range(3))
    grid = ds.Grid(*shape)
    mask = ds.Powers(unit, window, sink).token_mask(grid).tolist()
    every = places(grid)
    for (q, query), (k, key) in itertools.product(enumerate(every), repeat=2):
        near = all(powers_by_hand(*arguments) for arguments in zip(query, key, unit, window, strict=True))
        assert mask[q][k] == (near or (sink and key[0] == 0))


@settings(max_examples=30, deadline=None)
@given(st.data(), st.integers(1, 5))
def test_strided_heads_share_the_tiles(data: st.DataObject, stride: int) -> None:
    grid = data.draw(SMALL)
    tile = tuple(data.draw(st.integers(1, 3)) for _ in range(3))
    local = tuple(data.draw(st.integers(0, 1)) for _ in range(3))
    pattern = ds.Strided(stride, tile, local)
    masks = [one.token_mask(grid) for one in pattern.variants(grid)]
    assert torch.stack(masks).any(0).all(), "between them the heads read everything"
    every = [tuple(x // t for x, t in zip(place, tile, strict=True)) for place in places(grid)]
    for (q, query), (k, key) in itertools.product(enumerate(every), repeat=2):
        near = all(abs(a - b) <= reach for a, b, reach in zip(query, key, local, strict=True))
        assert [bool(mask[q, k]) for mask in masks] == [near or sum(key) % stride == turn for turn in range(stride)]


def test_strided_heads_take_turns() -> None:
    pattern, grid = ds.Strided(3, (1, 2, 5)), ds.Grid(2, 5, 11)
    layout = pattern.token_order().layout(grid)
    q = torch.randn(2, grid.tokens, 4, 8)
    indices = pattern.select(q, q, grid, PatternState(layout, 1.0)).indices
    order = torch.arange(grid.tokens) if layout.order is None else layout.order
    for head, row in enumerate(indices.head_of.tolist()):
        expected = replace(pattern, phase=head % 4 % 3).token_mask(grid)
        assert torch.equal(indices.token_mask(row), expected[order][:, order])


@pytest.mark.parametrize(
    "pattern",
    [
        ds.Neighborhood(1.0),
        ds.Neighborhood(1.0, stride=(2, 3, 5), clamp="tile"),
        ds.Frames("spatial", 1.0),
        ds.Frames("temporal", 1.0),
        ds.AutoFrames(1.0),
        ds.Stripes("diagonal", 1.0),
        ds.Stripes("multi-diagonal", 1.0),
        ds.Stripes("vertical", 1.0),
        ds.Powers(window=1.0),
        ds.Strided(1),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "grid", [ds.Grid(3, 5, 11, suffix=9), ds.Grid(1, 7, 37, prefix=4), ds.Grid(13, 1, 17)], ids=str
)
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_keeping_everything_is_dense(pattern: ds.Pattern, grid: ds.Grid, backend: str) -> None:
    q, k, v = (torch.randn(2, grid.tokens, 3, 16) for _ in range(3))
    out = ds.sparse_attention(q, k, v, pattern, grid, backend=backend)
    expected = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2).double() for x in (q, k, v)))
    assert (out - expected.transpose(1, 2)).abs().max() < 1e-5


KNOBS = [
    ds.Neighborhood(), ds.Neighborhood(stride=(2, 4, 4), order="tile:2x4x8"), ds.Neighborhood(dilation=(1, 2, 2)),
    ds.Neighborhood(stride=(4, 4, 8), order="tile:4x4x8", clamp="tile"), ds.Radial(kind="block"), ds.Frames(),
    ds.Frames("temporal"), ds.AutoFrames(), ds.Stripes("diagonal"), ds.Stripes("multi-diagonal"),
    ds.Stripes("vertical"), ds.Powers(), ds.Powers(unit=1, order="tile"), ds.Strided(),
]  # fmt: skip


@pytest.mark.parametrize("pattern", KNOBS, ids=str)
def test_the_knob_reaches_a_density(pattern: ds.Pattern) -> None:
    # radial windows have room to shrink only where a frame is some blocks large
    grid = ds.Grid(3, 16, 40) if isinstance(pattern, ds.Radial) else ds.Grid(4, 16, 16)
    static = pattern.candidates()[0] if isinstance(pattern, ds.AutoFrames) else pattern
    assert isinstance(static, StaticPattern)
    computed = [one.densities(grid)[1] for one in static.knob_settings(grid)]
    low, high = computed[0], computed[-1]
    assert low == min(computed) < max(computed) == high
    for target in (low, (low + high) / 2, high):
        if min(abs(one - target) for one in computed) > FARTHEST_MISS * target:  # tiles of a small grid
            with pytest.raises(ValueError, match=r"nothing nearer to"):
                pattern.with_density(grid, target)
            continue
        found = pattern.with_density(grid, target)
        assert type(found) is type(pattern)
        changed = {f.name for f in fields(found) if getattr(found, f.name) != getattr(pattern, f.name)}
        assert changed <= {pattern.knob}
        reached = (found.candidates()[0] if isinstance(found, ds.AutoFrames) else found).densities(grid)[1]
        assert abs(reached - target) <= min(abs(one - target) for one in computed) + 0.02
    for beyond in (low * 0.9, high * 1.1):
        with pytest.raises(ValueError, match=r"reaches computed densities from \d\.\d+ to"):
            pattern.with_density(grid, beyond)


def test_a_class_defined_anew_is_counted_anew() -> None:
    """Densities are remembered; in a notebook a class may come again under its old name, with another rule."""
    found = []
    for frames in (1, 3):

        @dataclass(frozen=True, eq=False)
        class Mine(StaticPattern):
            name, exact = "mine", "token"

            def token_rule(self, grid: ds.Grid, device: torch.device | str, frames: int = frames) -> Rule:
                return lambda q_index, k_index: k_index // grid.frame_tokens < frames + 0 * q_index

        found.append(Mine().densities(ds.Grid(4, 8, 16)))
        assert Mine().densities(ds.Grid(4, 8, 16)) == found[-1]
    assert [one[0] for one in found] == [0.25, 0.75]


@pytest.mark.parametrize("pattern", [ds.Dense(), ds.Skip(), ds.Radial()], ids=str)
def test_patterns_without_a_knob_state_their_density(pattern: ds.Pattern) -> None:
    with pytest.raises(ValueError, match=r"no knob for its density; it is \d\.\d+ on the grid 4x8x16"):
        pattern.with_density(ds.Grid(4, 8, 16), 0.3)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ds.Neighborhood(window=0), "window"),
        (lambda: ds.Neighborhood(window=1.5), "window"),
        (lambda: ds.Neighborhood(window=(1, 2)), "three"),
        (lambda: ds.Neighborhood(window=True), "window"),
        (lambda: ds.Neighborhood(window=3, stride=0), "stride"),
        (lambda: ds.Neighborhood(window=3, dilation=0), "dilation"),
        (lambda: ds.Neighborhood(window=3, causal=1), "causal"),
        (lambda: ds.Neighborhood(window=9).check(ds.Grid(3, 9, 9)), "frames window=9 on 3 tokens"),
        (lambda: ds.Neighborhood(window=2, dilation=2).check(ds.Grid(3, 9, 9)), "dilation"),
        (lambda: ds.Neighborhood(window=0.75, dilation=2).check(ds.Grid(9, 9, 9)), "dilation"),
        (lambda: ds.Neighborhood(window=2, stride=3).check(ds.Grid(9, 9, 9)), "stride"),
        (lambda: ds.Neighborhood(clamp="block"), "clamp must be one of token, tile"),
        (lambda: ds.Neighborhood(clamp="tile", dilation=(1, 1, 2)), "neither dilation nor causal"),
        (lambda: ds.Neighborhood(clamp="tile", causal=(True, False, False)), "neither dilation nor causal"),
        (lambda: ds.Neighborhood(5, 2, clamp="tile").check(ds.Grid(9, 9, 9)), "whole tiles .* use 4"),
        (lambda: ds.Neighborhood(12, 2, clamp="tile").check(ds.Grid(9, 9, 9)), "at most 10"),
        (lambda: ds.Radial(kind="spiral"), "kind"),
        (lambda: ds.Radial(decay=0.0), "decay"),
        (lambda: ds.Radial(sink=1), "sink"),
        (lambda: ds.Radial(kind="block", order="tile"), "order='raster'"),
        (lambda: ds.Frames("auto"), "autoframes"),
        (lambda: ds.Frames(width=0), "width"),
        (lambda: ds.Frames(width=2), "width"),
        (lambda: ds.Frames(sink="yes"), "sink"),
        (lambda: ds.Frames(order="zigzag"), "token order"),
        (lambda: ds.AutoFrames(width=True), "width"),
        (lambda: ds.AutoFrames(rows=0), "rows"),
        (lambda: ds.Stripes("horizontal"), "kind must be one of diagonal, multi-diagonal, vertical"),
        (lambda: ds.Stripes(width=0), "width"),
        (lambda: ds.Stripes(width=1.1), "width"),
        (lambda: ds.Powers(unit=0), "unit"),
        (lambda: ds.Powers(unit=(1, 2)), "three"),
        (lambda: ds.Powers(window=-1), "window"),
        (lambda: ds.Powers(window=False), "window"),
        (lambda: ds.Powers(sink=None), "sink"),
        (lambda: ds.Strided(stride=0), "stride"),
        (lambda: ds.Strided(tile=(1, 0, 2)), r"tile \(height\)"),
        (lambda: ds.Strided(local=-1), "local"),
        (lambda: ds.Strided(4, phase=4), "phase must be in 0..stride - 1 = 3"),
        (lambda: ds.Strided(4, phase=True), "phase"),
    ],
)
def test_bad_configurations_are_refused(build: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()  # type: ignore[operator]
