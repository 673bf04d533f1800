"""Token orders are permutations that keep text apart and cut blocks of at most 128 tokens."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_sparse.grid import Grid
from dit_sparse.order import TokenOrder, choose_tile

GRIDS = st.builds(
    Grid,
    st.integers(1, 9),
    st.integers(1, 13),
    st.integers(1, 17),
    prefix=st.integers(0, 3),
    suffix=st.integers(0, 140),
)
ORDERS = st.sampled_from(["raster", "tile", "tile:2x3x5", "morton"])


@settings(max_examples=150, deadline=None)
@given(GRIDS, ORDERS)
def test_layout_is_a_permutation_in_disjoint_blocks(grid: Grid, order: str) -> None:
    layout = TokenOrder.parse(order).layout(grid)
    x = torch.arange(grid.tokens)[None, :, None, None].expand(2, -1, 1, 1)
    assert torch.equal(layout.from_kernel(layout.to_kernel(x)), x)
    positions = torch.cat([torch.arange(s, s + n) for s, n in zip(layout.start, layout.length, strict=True)])
    assert torch.equal(positions.sort().values, torch.arange(grid.tokens))
    assert int(layout.length.max()) <= 128
    kernel = layout.to_kernel(x)[0, :, 0, 0]
    video = kernel[: grid.video_tokens]
    assert ((video >= grid.prefix) & (video < grid.prefix + grid.video_tokens)).all()
    text = torch.cat([torch.arange(grid.prefix), torch.arange(grid.prefix + grid.video_tokens, grid.tokens)])
    assert torch.equal(kernel[grid.video_tokens :], text)
    assert layout.start[layout.video_blocks :].ge(grid.video_tokens).all()


@settings(max_examples=80, deadline=None)
@given(GRIDS)
def test_tiles_are_boxes(grid: Grid) -> None:
    layout = TokenOrder("tile").layout(grid)
    for row, length in zip(layout.video_index(), layout.length[: layout.video_blocks], strict=True):
        index = row[: int(length)]
        assert (row[int(length) :] == -1).all()
        axes = (index // grid.frame_tokens, index // grid.width % grid.height, index % grid.width)
        assert math.prod(int(a.max() - a.min()) + 1 for a in axes) == int(length)


@pytest.mark.parametrize(
    ("shape", "most"),
    [
        ((21, 30, 52), 1.07),  # Wan 480p: no tile of 128 divides it
        ((21, 45, 80), 1.07),  # Wan 720p
        ((33, 45, 80), 1.09),  # HunyuanVideo 720p
        ((16, 32, 32), 1.0),  # a power of two: nothing is wasted
        ((1, 64, 64), 1.0),  # an image
    ],
)
def test_chosen_tile_wastes_little(shape: tuple[int, int, int], most: float) -> None:
    tile = choose_tile(shape)
    blocks = math.prod(math.ceil(n / size) for n, size in zip(shape, tile, strict=True))
    assert math.prod(tile) <= 128
    assert blocks <= most * math.ceil(math.prod(shape) / 128)


def test_morton_follows_the_z_curve() -> None:
    layout = TokenOrder("morton").layout(Grid(2, 2, 2))
    assert layout.order is None, "on 2x2x2 the Z curve is the raster order"
    order = TokenOrder("morton").layout(Grid(1, 4, 4)).order
    assert order is not None
    assert order.tolist()[:8] == [0, 1, 4, 5, 2, 3, 6, 7]


@pytest.mark.parametrize("text", ["hilbert", "tile:2x2", "tile:axbxc", "tile:8x8x8", "raster:2x2x2", "tile:0x1x1"])
def test_bad_orders_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"order|tile"):
        TokenOrder.parse(text)
