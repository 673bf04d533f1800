"""`plans show`: pictures and densities of every pattern, and the page that shows them."""

from __future__ import annotations

import re
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image
from torch import Tensor

from dit_sparse.attention import sparse_attention
from dit_sparse.grid import Grid
from dit_sparse.patterns import PATTERNS, Pattern, pattern_from_text
from dit_sparse.search.pictures import GAP_PIXELS, PALETTE, PICTURE_PIXELS, draw, made_up
from dit_sparse.search.plans import parse_grid
from dit_sparse.spec import parse_spec
from tests.compare.test_cli import ROOT, dit_sparse, refused
from tests.core.examples import EXAMPLES


def picture(tmp_path: Path, spec: str, grid: str) -> Tensor:
    """Return the drawn shades, uint8 [rows, columns], of `plans show`."""
    path = tmp_path / "picture.png"
    result = dit_sparse("plans", "show", spec, "--grid", grid, "--png", path)
    assert result.exit_code == 0, result.output
    return torch.from_numpy(numpy.array(Image.open(path).convert("L")))


def test_a_picture_shows_what_each_block_does(tmp_path: Path) -> None:
    grid = "4x8x8+30"  # two video blocks and one of text
    side = PICTURE_PIXELS // 3
    empty, partial, full = PALETTE["empty"], PALETTE["partial"], PALETTE["full"]
    dense = picture(tmp_path, "dense", grid)
    assert dense.shape == (3 * side, 3 * side)
    assert dense.unique().tolist() == [full]
    skip = picture(tmp_path, "skip", grid)
    assert skip[: 2 * side].unique().tolist() == [empty], "video queries read nothing, not even text"
    assert skip[2 * side :].unique().tolist() == [full], "text queries stay dense"
    near = picture(tmp_path, "neighborhood:window=1x1x1", grid)
    assert near[:side, :side].unique().tolist() == [partial]
    assert near[:side, side : 2 * side].unique().tolist() == [empty]
    assert near[:, 2 * side :].unique().tolist() == [full]
    heads = picture(tmp_path, "topblocks:keep=0.5", grid)
    assert heads.shape == (3 * side, 2 * 3 * side + GAP_PIXELS), "one panel for each made-up head"
    assert (heads[:side] == full).sum() >= 2 * 2 * side * side, "half of the video and the text, in both heads"


@pytest.mark.parametrize("name", PATTERNS)
def test_every_pattern_can_be_drawn(tmp_path: Path, name: str) -> None:
    for pattern in EXAMPLES[name]:
        draw(pattern, Grid(5, 6, 8, suffix=9), tmp_path / "drawn.png")
        assert (tmp_path / "drawn.png").read_bytes().startswith(b"\x89PNG")
        (tmp_path / "drawn.png").unlink()


def test_densities_of_patterns_that_choose_by_content() -> None:
    shown = dit_sparse("plans", "show", "topblocks:keep=0.25", "--grid", "8x16x16").stdout
    assert "keep 25.0% (skip 75.0%), in whole blocks 25.0%, on a made-up input" in shown
    assert "chosen from the content" in dit_sparse("plans", "show", "balanced", "--grid", "21x30x52").stdout
    static = dit_sparse("plans", "show", "radial", "--grid", "8x16x16").stdout
    assert "made-up" not in static
    assert "made up for at most" in refused(
        dit_sparse("plans", "show", "topblocks", "--grid", "21x30x52", "--png", "none.png")
    )


def test_the_made_up_input_is_local_with_places_that_all_look_at() -> None:
    grid = Grid(7, 12, 12, suffix=5)
    q, k, v = made_up(grid)
    again = made_up(grid)
    assert all(torch.equal(one, other) for one, other in zip((q, k, v), again, strict=True))
    video = slice(grid.video_tokens)
    weight = (torch.einsum("qhd,khd->hqk", q[0, video], k[0, video]) / 8).softmax(-1)
    place = torch.stack(torch.unravel_index(torch.arange(grid.video_tokens), grid.shape), 1).float()
    apart = (place[:, None] - place).abs()
    near = (apart <= torch.tensor([1.0, 1.0, 1.0])).all(-1)
    assert (weight * near).sum(-1).mean() > 4 * near.double().mean(), "attention is local"
    same_place = (apart[..., 1:] == 0).all(-1)
    along = (weight * (same_place & (apart[..., 0] > 2))).sum(-1).mean(-1)
    assert along[1] > 2 * along[0], "head 1 looks along the frames"
    received = weight.mean(1)  # [head, key]
    assert (received.amax(1) > 5 / grid.video_tokens).all(), "some keys are read by all"


def test_the_pages_about_patterns_are_whole() -> None:
    page = (ROOT / "docs/patterns.md").read_text()
    sections = re.findall(r"^## .*?`(\w+)`", page, re.MULTILINE)
    assert sorted(sections) == sorted(PATTERNS), "one section for each pattern"
    commands = re.findall(r"^dit-sparse plans show (\S+) --grid (\S+) --png (\S+)$", page, re.MULTILINE)
    assert len(commands) >= len(PATTERNS)
    for spec, grid, png in commands:
        parse_grid(grid)
        assert parse_spec(spec).rules
        assert f"({Path(png).relative_to('docs')})" in page, f"{png} is drawn and not shown"
        assert (ROOT / png).stat().st_size < 20_000
    drawn = {png for _, _, png in commands}
    assert {str(file.relative_to(ROOT)) for file in (ROOT / "docs/media/patterns").iterdir()} == drawn


def test_what_the_page_of_methods_writes_can_be_run() -> None:
    page = (ROOT / "docs/methods.md").read_text()
    rows = [line.split("|")[1:-1] for line in page.splitlines() if line.startswith("| ") and not line.startswith("|-")]
    assert all(len(row) in (2, 3) for row in rows)
    written = [code for row in rows for code in re.findall(r"`([a-z]+(?::[^`]*)?)`", "|".join(row[1:]))]
    patterns = {pattern_from_text(code) for code in written if code.partition(":")[0] in PATTERNS and code != "cached"}
    assert {pattern.name for pattern in patterns} == set(PATTERNS), "every pattern stands for a method"
    for pattern in patterns:
        pattern.check(Grid(21, 30, 52))
        assert pattern_from_text(str(pattern)) == pattern
        grid = next(grid for grid in (Grid(5, 8, 8, suffix=3), Grid(18, 24, 24, suffix=3)) if fits(pattern, grid))
        q, k, v = torch.randn(3, 1, grid.tokens, 2, 16)
        out = sparse_attention(q, k, v, pattern.at_layer(0), grid, backend="cpu")
        assert isinstance(out, Tensor)
        assert out.isfinite().all(), pattern
        assert out[:, : grid.video_tokens].any() == (pattern.name != "skip"), pattern


def fits(pattern: Pattern, grid: Grid) -> bool:
    try:
        pattern.check(grid)
    except ValueError:  # windows and strides in tokens
        return False
    return True
