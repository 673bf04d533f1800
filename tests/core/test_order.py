"""Token orders are permutations that keep text apart and cut blocks of at most 128 tokens."""

from __future__ import annotations

import itertools
import math
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dit_sparse.curves import gilbert, hilbert
from dit_sparse.grid import Grid
from dit_sparse.order import KINDS, TokenOrder, choose_column, choose_tile

# primes and 1 on every axis; text in front, behind, both or none
SIZES = st.sampled_from([1, 2, 3, 4, 5, 7, 8, 11, 13])
GRIDS = st.builds(
    Grid, SIZES, SIZES, st.integers(1, 17), prefix=st.sampled_from([0, 3, 130]), suffix=st.sampled_from([0, 1, 140])
)
AXES_ORDERS = ["axes:" + "".join(letters) for letters in itertools.permutations("fhw")]
ORDERS = [*(kind for kind in KINDS if kind != "axes"), *AXES_ORDERS, "tile:2x3x5"]
WAN_480P, WAN_720P = (21, 30, 52), (21, 45, 80)


def places(order: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """Return (frame, row, column) of raster indices, int64 [n, 3]."""
    return torch.stack(torch.unravel_index(order, shape), 1)


def steps(order: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """Return the length of each step along an order, in places of the grid."""
    return places(order, shape).diff(dim=0).abs().sum(1)


@settings(max_examples=150, deadline=None)
@given(GRIDS, st.sampled_from(ORDERS))
def test_layout_is_a_permutation_in_disjoint_blocks(grid: Grid, order: str) -> None:
    layout = TokenOrder.parse(order).layout(grid)
    x = torch.arange(grid.tokens)[None, :, None, None].expand(2, -1, 1, 1)
    assert torch.equal(layout.from_kernel(layout.to_kernel(x)), x)
    positions = torch.cat([torch.arange(s, s + n) for s, n in zip(layout.start, layout.length, strict=True)])
    assert torch.equal(positions.sort().values, torch.arange(grid.tokens))
    assert int(layout.length.max()) <= 128
    kernel = layout.to_kernel(x)[0, :, 0, 0]
    video = kernel[: grid.video_tokens]
    assert torch.equal(video.sort().values, torch.arange(grid.prefix, grid.prefix + grid.video_tokens))
    text = torch.cat([torch.arange(grid.prefix), torch.arange(grid.prefix + grid.video_tokens, grid.tokens)])
    assert torch.equal(kernel[grid.video_tokens :], text)
    assert layout.start[layout.video_blocks :].ge(grid.video_tokens).all()
    alone = x[:, grid.prefix : grid.prefix + grid.video_tokens]
    assert torch.equal(layout.to_kernel(alone)[0, :, 0, 0], video)
    assert torch.equal(layout.from_kernel(layout.to_kernel(alone)), alone)


@pytest.mark.parametrize("text", ORDERS)
def test_text_form(text: str) -> None:
    assert str(TokenOrder.parse(text)) == text
    assert TokenOrder.parse(str(TokenOrder.parse(text))) == TokenOrder.parse(text)


def test_axes_name_the_slowest_first() -> None:
    grid = Grid(2, 3, 5)
    assert TokenOrder.parse("axes:fhw").layout(grid).order is None
    assert TokenOrder.parse("raster").layout(grid).order is None
    order = TokenOrder.parse("axes:hwf").layout(grid).order
    assert order is not None
    # the frames of one place side by side: Sparse VideoGen's order of temporal heads
    assert order[:4].tolist() == [0, 15, 1, 16]
    slowest_column = TokenOrder.parse("axes:wfh").layout(grid).order
    assert slowest_column is not None
    assert slowest_column[:4].tolist() == [0, 5, 10, 15]


@settings(max_examples=80, deadline=None)
@given(GRIDS, st.sampled_from(["tile", "column", "tile:2x3x5"]))
def test_tiles_are_boxes(grid: Grid, order: str) -> None:
    layout = TokenOrder.parse(order).layout(grid)
    for row, length in zip(layout.video_index(), layout.length[: layout.video_blocks], strict=True):
        index = row[: int(length)]
        assert (row[int(length) :] == -1).all()
        sides = places(index, grid.shape).aminmax(dim=0)
        assert int((sides.max - sides.min + 1).prod()) == int(length)
        if order == "column":
            assert int(sides.max[0] - sides.min[0]) + 1 == grid.frames


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


@pytest.mark.parametrize(
    ("shape", "tile"),
    [
        (WAN_480P, (21, 3, 2)),  # 126 tokens; 2x3 would leave a ragged column of blocks
        ((1, 64, 64), (1, 8, 16)),  # an image: no frames to span
        ((33, 45, 80), (33, 1, 3)),
        ((129, 4, 4), (65, 1, 1)),  # more frames than a block holds: two equal shares
        ((128, 4, 4), (128, 1, 1)),
    ],
)
def test_columns_span_the_frames(shape: tuple[int, int, int], tile: tuple[int, int, int]) -> None:
    assert choose_column(shape) == tile


@pytest.mark.parametrize("shape", [(2, 2, 2), (8, 8, 8), (16, 16, 16), (1, 16, 16), (1, 1, 8), (4, 1, 4)])
def test_hilbert_goes_from_neighbour_to_neighbour(shape: tuple[int, int, int]) -> None:
    assert (steps(hilbert(shape), shape) == 1).all()


def test_hilbert_of_a_box_is_that_of_the_cube_without_the_places_beyond() -> None:
    shape = (3, 5, 7)
    cube = places(hilbert((8, 8, 8)), (8, 8, 8))
    inside = cube[(cube < torch.tensor(shape)).all(1)]
    assert torch.equal(places(hilbert(shape), shape), inside)


@settings(max_examples=60, deadline=None)
@given(st.tuples(SIZES, SIZES, st.integers(1, 40)))
def test_gilbert_goes_from_neighbour_to_neighbour_in_any_box(shape: tuple[int, int, int]) -> None:
    assert (steps(gilbert(shape), shape) == 1).all()


# video of Wan and HunyuanVideo, an image, and odd sizes on each axis
@pytest.mark.parametrize("shape", [WAN_480P, WAN_720P, (33, 45, 80), (1, 45, 79), (31, 15, 23)])
def test_gilbert_on_real_grids(shape: tuple[int, int, int]) -> None:
    order = gilbert(shape)
    assert torch.equal(order.sort().values, torch.arange(math.prod(shape)))
    assert (steps(order, shape) == 1).all()


def test_blocks_of_curves_and_tiles_are_compact() -> None:
    def box(kind: str) -> float:
        """Return the mean volume of the boxes around the blocks, in tokens."""
        volumes = []
        for row in TokenOrder(kind).layout(Grid(*WAN_480P)).video_index():
            sides = places(row[row >= 0], WAN_480P).aminmax(dim=0)
            volumes.append(int((sides.max - sides.min + 1).prod()))
        return sum(volumes) / len(volumes)

    raster, found = box("raster"), {kind: box(kind) for kind in ("tile", "column", "morton", "hilbert", "gilbert")}
    assert max(found.values()) < raster, found
    assert max(found["hilbert"], found["gilbert"]) < 0.6 * raster, found
    assert max(found["tile"], found["column"]) <= 128, found


@pytest.mark.parametrize("order", ORDERS)
def test_a_layout_is_made_quickly(order: str) -> None:
    start = time.process_time()
    TokenOrder.parse(order).layout(Grid(*WAN_720P, suffix=226))
    assert time.process_time() - start < 2.0


@pytest.mark.parametrize(
    "text",
    [
        "hilbrt", "tile:2x2", "tile:axbxc", "tile:8x8x8", "raster:2x2x2", "tile:0x1x1", "hilbert:2x2x2", "column:2x2x2",
        "axes", "axes:fh", "axes:fhh", "axes:fhwf", "axes:2x2x2", "raster:hwf",
    ],
)  # fmt: skip
def test_bad_orders_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"order|tile"):
        TokenOrder.parse(text)


def test_axes_and_tile_belong_to_their_kinds() -> None:
    with pytest.raises(ValueError, match="takes axes"):
        TokenOrder("hilbert", axes="hwf")
    with pytest.raises(ValueError, match="takes a tile"):
        TokenOrder("axes", tile=(2, 2, 2), axes="hwf")
