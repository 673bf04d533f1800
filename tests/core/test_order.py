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

from dit_sparse.curves import gilbert, hilbert, strips
from dit_sparse.grid import Grid
from dit_sparse.order import KINDS, TokenOrder, choose_column, choose_strip, choose_tile

# primes and 1 on every axis; text in front, behind, both or none
SIZES = st.sampled_from([1, 2, 3, 4, 5, 7, 8, 11, 13])
GRIDS = st.builds(
    Grid, SIZES, SIZES, st.integers(1, 17), prefix=st.sampled_from([0, 3, 130]), suffix=st.sampled_from([0, 1, 140])
)
AXES_ORDERS = ["axes:" + "".join(letters) for letters in itertools.permutations("fhw")]
ORDERS = [*(kind for kind in KINDS if kind != "axes"), *AXES_ORDERS, "tile:2x3x5", "strips:2x3"]
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


# no tile of 128 divides them: Wan at 480p and 720p, HunyuanVideo at 720p, CogVideoX; the bundled model's two
VIDEOS = [WAN_480P, WAN_720P, (33, 45, 80), (13, 30, 45)]
RAGGED = [*VIDEOS, (17, 16, 16), (17, 32, 32)]


@pytest.mark.parametrize("shape", RAGGED)
def test_strips_waste_no_more_than_one_block(shape: tuple[int, int, int]) -> None:
    layout = TokenOrder("strips").layout(Grid(*shape, suffix=77))
    tokens, blocks = math.prod(shape), layout.video_blocks
    assert blocks == math.ceil(tokens / 128)
    assert (blocks * 128 / tokens) ** 2 <= 1.02, "padded pairs against real ones"


@settings(max_examples=80, deadline=None)
@given(GRIDS, st.sampled_from(["strips", "strips:2x3", "strips:5x1", "strips:1x128"]))
def test_blocks_of_strips_are_whole_but_for_the_last_one(grid: Grid, order: str) -> None:
    layout = TokenOrder.parse(order).layout(grid)
    length = layout.length[: layout.video_blocks]
    assert (length[:-1] == 128).all()
    assert int(length.sum()) == grid.video_tokens
    assert layout.length[layout.video_blocks :].sum() == grid.text_tokens


@settings(max_examples=80, deadline=None)
@given(st.tuples(SIZES, SIZES, st.integers(1, 40)), st.tuples(st.integers(1, 6), st.integers(1, 6)))
def test_strips_go_from_neighbour_to_neighbour_but_between_bars(
    shape: tuple[int, int, int], strip: tuple[int, int]
) -> None:
    order = strips(shape, strip)
    assert torch.equal(order.sort().values, torch.arange(math.prod(shape)))
    step, parts = steps(order, shape), parts_of(shape, strip)
    assert int((step > 1).sum()) < math.prod(parts)
    thickest = [math.ceil(size / count) for size, count in zip(shape[:2], parts, strict=True)]
    assert max(step.tolist(), default=0) <= sum(thickest)


@pytest.mark.parametrize("strip", [(4, 4), (5, 5), (9, 4)])  # even and odd sizes: the walk turns otherwise
@pytest.mark.parametrize("shape", RAGGED)
def test_strips_are_bars(shape: tuple[int, int, int], strip: tuple[int, int]) -> None:
    order, parts = strips(shape, strip), parts_of(shape, strip)
    jumps = (steps(order, shape) > 1).nonzero().flatten() + 1
    bars = order.tensor_split(jumps)
    assert len(bars) == math.prod(parts)
    for bar in bars:
        place = places(bar, shape)
        sides = place.aminmax(dim=0)
        box: list[int] = (sides.max - sides.min + 1).tolist()
        assert math.prod(box) == len(bar)
        assert box[2] == shape[2]
        for size, count, side in zip(shape[:2], parts, box[:2], strict=True):
            assert size // count <= side <= math.ceil(size / count), "parts are equal to one"
        column = place[:, 2].diff()
        assert (column >= 0).all() or (column <= 0).all(), "cross-section by cross-section"


def parts_of(shape: tuple[int, int, int], strip: tuple[int, int]) -> list[int]:
    """Return in how many parts frames and rows are cut: the number nearest to their share."""
    return [max(1, math.floor(size / part + 0.5)) for size, part in zip(shape[:2], strip, strict=True)]


@pytest.mark.parametrize(
    ("shape", "strip"),
    [
        (WAN_480P, (5, 5)),
        ((1, 64, 64), (1, 11)),  # an image
        ((2, 45, 80), (2, 8)),  # fewer frames than a block would have
        ((17, 16, 16), (9, 4)),  # a small picture: deeper
    ],
)
def test_chosen_strip(shape: tuple[int, int, int], strip: tuple[int, int]) -> None:
    assert choose_strip(shape) == strip
    chosen, given_strip = (
        order.layout(Grid(*shape)).order for order in (TokenOrder("strips"), TokenOrder("strips", strip=strip))
    )
    assert chosen is not None
    assert given_strip is not None
    assert torch.equal(chosen, given_strip)


@pytest.mark.parametrize("shape", VIDEOS)
def test_blocks_of_strips_are_as_compact_as_tiles(shape: tuple[int, int, int]) -> None:
    def spread(order: str) -> float:
        """Return the mean squared distance of a token from the centre of its block."""
        total = 0.0
        for row in TokenOrder.parse(order).layout(Grid(*shape)).video_index():
            place = places(row[row >= 0], shape).double()
            total += float((place - place.mean(0)).square().sum())
        return total / math.prod(shape)

    found = {order: spread(order) for order in ("strips", "tile:4x4x8", "gilbert", "hilbert")}
    assert found["strips"] < 1.15 * found["tile:4x4x8"], found
    assert found["strips"] < min(found["gilbert"], found["hilbert"]), found


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
        "strips:4", "strips:4x4x8", "strips:0x4", "strips:16x9", "raster:4x4", "tile:4x4",
        "axes", "axes:fh", "axes:fhh", "axes:fhwf", "axes:2x2x2", "raster:hwf",
    ],
)  # fmt: skip
def test_bad_orders_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"order|tile|strip"):
        TokenOrder.parse(text)


@pytest.mark.parametrize("text", ["strips:16x9", "strips:0x4", "tile:8x8x8"])
def test_sizes_that_do_not_fit_are_told_so(text: str) -> None:
    with pytest.raises(ValueError, match="at most 128"):
        TokenOrder.parse(text)


def test_axes_and_tile_belong_to_their_kinds() -> None:
    with pytest.raises(ValueError, match="takes axes"):
        TokenOrder("hilbert", axes="hwf")
    with pytest.raises(ValueError, match="takes a tile"):
        TokenOrder("axes", tile=(2, 2, 2), axes="hwf")
    with pytest.raises(ValueError, match="takes a strip"):
        TokenOrder("tile", strip=(4, 4))
