"""What a token reads, against the definition and against blocks that are walked one by one."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from dit_sparse.app.choice import (
    READ,
    SKIPPED,
    STOOD_FOR,
    Choice,
    Served,
    keys_of,
    served,
    static_choice,
    static_part,
    text_tokens_read,
)
from dit_sparse.app.neighbourhood import (
    COLOURS,
    HERE,
    THROUGH,
    Sheet,
    neighbourhood_image,
    neighbourhood_text,
    token_at,
)
from dit_sparse.grid import Grid
from dit_sparse.kernels.indices import from_block_mask
from dit_sparse.order import TokenOrder
from dit_sparse.patterns import Cached, Neighborhood, Pattern, Skip, Strided, TopBlocks
from dit_sparse.plan import Plan, Rule
from dit_sparse.selection import HeadOrder
from tests.core.examples import EXAMPLES

STATIC = [pattern for some in EXAMPLES.values() for pattern in some if static_part(pattern) is not None]
GRID = Grid(5, 6, 8, prefix=3, suffix=9)


def tokens(grid: Grid) -> list[tuple[int, int, int]]:
    return [(t, y, x) for t in range(grid.frames) for y in range(grid.height) for x in range(grid.width)]


@pytest.mark.parametrize("pattern", [*STATIC, Cached(Neighborhood(0.4))], ids=str)
def test_static_patterns_are_told_by_their_definition(pattern: Pattern) -> None:
    choice = static_choice(Served(pattern.at_layer(0), 0, 2), GRID)
    assert choice is not None
    static = static_part(pattern)
    assert static is not None
    mask = static.variants(GRID)[0].token_mask(GRID)  # [S, S], text in its place
    video = slice(GRID.prefix, GRID.prefix + GRID.video_tokens)
    by_blocks = Choice(choice.pattern, choice.layout, choice.indices)  # without the definition: from blocks and tiles
    for number, token in random.sample(list(enumerate(tokens(GRID))), 25):
        wanted = mask[GRID.prefix + number]
        assert torch.equal(keys_of(choice, token) == READ, wanted[video].view(GRID.shape))
        assert torch.equal(keys_of(by_blocks, token) == READ, wanted[video].view(GRID.shape))
        assert text_tokens_read(choice, token) == int(wanted.sum() - wanted[video].sum())


def test_heads_that_take_turns() -> None:
    plan = Plan((Rule(Strided(3), heads=(1, 2, 4)), Rule(TopBlocks(0.2), heads=(0,)), Rule(TopBlocks(0.4), heads=(3,))))
    found = [served(plan, 2, 6, None, 1, head) for head in range(6)]
    phases = [one.definition(GRID) for one in found]
    assert [one.phase for one in phases if isinstance(one, Strided)] == [0, 1, 2]
    assert found[0].pattern == found[3].pattern, "budgets share a call"
    assert (found[0].place, found[3].place, found[0].members) == (0, 1, 2)
    assert static_choice(found[0], GRID) is None
    assert str(found[5].pattern) == "dense"
    for layer, head in ((2, 0), (-1, 0), (0, 6), (0, -1)):
        with pytest.raises(ValueError, match="does not exist: the model has"):
            served(plan, 2, 6, None, layer, head)


@pytest.mark.parametrize("compensate", [False, True])
@pytest.mark.parametrize("own_order", [False, True])  # of the head, as clusters have
def test_blocks_that_the_content_chose(compensate: bool, own_order: bool) -> None:
    layout = TokenOrder.parse(random.choice(["tile:2x3x4", "strips:2x2", "raster", "axes:hwf"])).layout(GRID)
    mask = torch.rand(1, layout.blocks, layout.blocks) < 0.5
    blocks = (layout.start, layout.length, layout.start, layout.length)
    indices = from_block_mask(mask, torch.zeros(1), *blocks)
    count = GRID.video_tokens
    order = HeadOrder(torch.randperm(count)[None, None], torch.randperm(count)[None, None]) if own_order else None
    choice = Choice("made", layout, indices, compensate, head_order=order)

    # where the token at each place of the grid stands when blocks are cut, counted by hand
    kernel_to_raster = list(range(count)) if layout.order is None else [int(i) - GRID.prefix for i in layout.order]
    kernel_to_raster = kernel_to_raster[:count]

    def block_of(raster: int, head_order: torch.Tensor | None) -> int:
        position = kernel_to_raster.index(raster)
        if head_order is not None:
            position = head_order[0, 0].tolist().index(position)
        starts = zip(layout.start.tolist(), layout.length.tolist(), strict=True)
        return next(i for i, (start, length) in enumerate(starts) if start <= position < start + length)

    of_keys = [block_of(raster, None if order is None else order.k) for raster in range(count)]
    for query, token in random.sample(list(enumerate(tokens(GRID))), 12):
        row = mask[0, block_of(query, None if order is None else order.q)]
        levels = keys_of(choice, token).flatten().tolist()
        assert levels == [READ if row[block] else STOOD_FOR if compensate else SKIPPED for block in of_keys]
        of_text = layout.length[layout.video_blocks :]
        assert text_tokens_read(choice, token) == int((of_text * row[layout.video_blocks :]).sum())
    for outside in ((5, 0, 0), (0, 6, 0), (0, 0, -1)):
        with pytest.raises(ValueError, match="must lie on the grid"):
            keys_of(choice, outside)


@pytest.mark.parametrize("width_pixels", [1, 97, 390, 720])  # less than a token, odd, a phone, a desk
@pytest.mark.parametrize("grid", [Grid(1, 1, 1), Grid(17, 16, 16), Grid(3, 30, 52), GRID], ids=str)
def test_clicks_come_back_to_tokens(grid: Grid, width_pixels: int) -> None:
    sheet = Sheet(grid, width_pixels)
    covered: dict[tuple[int, int], tuple[int, int, int]] = {}
    for frame, row, column in tokens(grid):
        left, top = sheet.corner(frame)
        for y in range(sheet.cell):
            for x in range(sheet.cell):
                pixel = left + column * sheet.cell + x, top + row * sheet.cell + y
                assert pixel not in covered, "two tokens on one pixel"
                covered[pixel] = frame, row, column
    width, height = sheet.size
    assert all(0 <= x < width and 0 <= y < height for x, y in covered)
    assert width <= width_pixels or sheet.columns == 1
    across, down = sheet.pitch
    beyond = [(x, y) for x in range(-across, width + across) for y in range(-down, height + down)]
    for pixel in random.sample(beyond, min(40_000, len(beyond))):
        assert token_at(*pixel, grid, width_pixels) == covered.get(pixel), pixel
    for pixel in random.sample(list(covered), min(500, len(covered))):
        assert token_at(*pixel, grid, width_pixels) == covered[pixel]


@pytest.mark.parametrize("compensate", [False, True])
def test_the_image_lights_what_is_read(compensate: bool) -> None:
    grid = Grid(4, 7, 6)
    layout = TokenOrder("raster").layout(grid)
    mask = torch.tensor([[[True, False], [False, True]]])
    indices = from_block_mask(mask, torch.zeros(1), layout.start, layout.length, layout.start, layout.length)
    choice = Choice("made", layout, indices, compensate)
    token = random.choice(tokens(grid))
    image, levels = neighbourhood_image(choice, token, 200), keys_of(choice, token)
    sheet = Sheet(grid, 200)
    assert image.size == sheet.size
    for other in tokens(grid):
        left, top = sheet.corner(other[0])
        pixel = image.getpixel((left + other[2] * sheet.cell + sheet.cell // 2, top + other[1] * sheet.cell))
        assert pixel == (HERE if other == token else COLOURS[int(levels[other])])
    count = int((levels == READ).sum())
    told = neighbourhood_text(choice, token)
    assert f"reads {count} of 168 video tokens" in told
    assert ("means of their blocks" in told) == compensate
    blank = neighbourhood_image(choice, None, 200)
    assert blank.size == image.size
    assert HERE not in {colour for _, colour in blank.getcolors(1 << 16) or []}
    assert "Choose a token" in neighbourhood_text(choice, None)


def test_a_clip_shines_through() -> None:
    choice = static_choice(Served(Neighborhood(0.5), 0, 1), Grid(5, 6, 6))
    assert choice is not None
    clip = np.stack([np.full((4, 4, 3), 10 * frame, np.uint8) for frame in range(17)])  # each frame its own grey
    token, sheet = (2, 3, 3), Sheet(choice.grid, 300)
    image, levels = neighbourhood_image(choice, token, 300, clip), keys_of(choice, token)
    for other in tokens(choice.grid):
        left, top = sheet.corner(other[0])
        found = image.getpixel((left + other[2] * sheet.cell, top + other[1] * sheet.cell))
        level, behind = int(levels[other]), 10 * 4 * other[0]
        mixed = [THROUGH[level] * behind + (1 - THROUGH[level]) * part for part in COLOURS[level][:3]]
        wanted = HERE if other == token else (*mixed, 255)
        assert found == pytest.approx(wanted, abs=1.5)


def test_skip_reads_nothing() -> None:
    choice = static_choice(Served(Skip(), 0, 1), GRID)
    assert choice is not None
    assert not keys_of(choice, (0, 0, 0)).any()
    assert "reads 0 of 240 video tokens" in neighbourhood_text(choice, (0, 0, 0))
    assert "Of 12 text tokens it reads 0." in neighbourhood_text(choice, (0, 0, 0))
