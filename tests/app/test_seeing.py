"""The map against the plan, the mask against the definition, the recall chart against plain loops."""

from __future__ import annotations

import copy
import itertools
import random
import re

import numpy as np
import pytest
import torch

from dit_sparse.app.choice import Choice, Served, static_choice
from dit_sparse.app.recall import recall_chart, step_means
from dit_sparse.app.seeing import known_density, mask_image, mask_text, plan_map
from dit_sparse.app.stored import grid_of, job_of, options_of, plan_of, run_of
from dit_sparse.grid import Grid
from dit_sparse.kernels.indices import from_block_mask
from dit_sparse.order import TokenOrder
from dit_sparse.patterns import Cached, Dense, Neighborhood, Pattern, Radial, Strided, TopBlocks
from dit_sparse.plan import Plan, Rule
from dit_sparse.search.heads_map import kind_of, shade_of
from dit_sparse.search.pictures import PALETTE
from dit_sparse.search.report import validate
from tests.app.made import made_report, monitored
from tests.search.made_reports import EVIL, Page

GRID = Grid(5, 8, 12, suffix=7)
PATTERNS: list[Pattern] = [
    Dense(), Neighborhood(0.4), Strided(3), TopBlocks(0.3), TopBlocks(mass=0.9), Cached(TopBlocks(0.1), 3),
    Cached(TopBlocks(0.1), densities=(0.4, 0.2)), Cached(Radial(), 2), TopBlocks(0.2, heads="adaptive"),
]  # fmt: skip


def drawn_plan(layers: int, heads: int) -> Plan:
    def some(count: int) -> tuple[int, ...]:
        return tuple(sorted(random.sample(range(count), random.randint(1, count))))

    windows = [(0.0, 0.4), (0.25, 1.0), (0.0, 1.0)]
    rules = [Rule(random.choice(PATTERNS), random.choice(windows), None, some(layers), some(heads)) for _ in range(12)]
    return Plan((Rule(Dense(), layers=(-1,)), *rules))


def counted_density(pattern: Pattern, grid: Grid = GRID) -> float | None:
    """Return the share of pairs in blocks that hold a kept pair, from the whole token mask."""
    static = pattern.pattern if isinstance(pattern, Cached) else pattern
    if isinstance(static, TopBlocks):
        whole = static.mass is None and static.heads == "equal"
        return static.keep if whole and getattr(pattern, "densities", None) is None else None  # type: ignore[return-value]
    shares = []
    for variant in static.variants(grid):  # type: ignore[attr-defined]
        layout = static.token_order().layout(grid)
        index = torch.arange(grid.video_tokens)
        kept = variant.keep(index[:, None], index[None], grid)
        blocks = [row[row >= 0] for row in layout.video_index()]
        pairs = sum(len(a) * len(b) for a, b in itertools.product(blocks, blocks) if kept[a[:, None], b].any())
        shares.append(pairs / grid.video_tokens**2)
    return sum(shares) / len(shares)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_known_densities(pattern: Pattern) -> None:
    for grid in (GRID, Grid(9, 16, 13)):
        assert known_density(pattern, grid) == pytest.approx(counted_density(pattern, grid))


@pytest.mark.parametrize(("layers", "heads", "fraction"), [(5, 3, 0.0), (14, 12, 0.3), (1, 1, None)])
def test_the_map_is_that_of_the_plan(layers: int, heads: int, fraction: float | None) -> None:
    plan = drawn_plan(layers, heads)
    page = plan_map(plan, GRID, layers, heads, fraction)
    read = Page(page)
    told = [text for tag, text in read.texts if tag == "title"]
    classes = [attributes["class"] for attributes in read.of("rect")]
    marks = re.findall(r'<text class="marks"[^>]*>(.*?)</text>', page)
    wanted = [plan.for_depth(layers).patterns_at(fraction, "transformer", layer, heads) for layer in range(layers)]
    assert marks == ["".join(kind_of(str(pattern))[0] for pattern in row) for row in wanted]
    cells = [(layer, head, pattern) for layer, row in enumerate(wanted) for head, pattern in enumerate(row)]
    for text, name, (layer, head, pattern) in zip(told, classes, cells, strict=True):
        assert text.startswith(f"layer {layer}, head {head}: {pattern}, ")
        density = counted_density(pattern)
        assert name == ("unknown" if density is None else f"s{shade_of(density)}")
        assert ("decided by the content" in text) == (density is None)
    for pattern in {pattern for row in wanted for pattern in row}:
        assert str(pattern) in read.text
    assert all(a.get("aria-label") for a in read.of("svg"))


def test_names_in_the_map_are_text() -> None:
    page = Page(plan_map(Plan.dense(), GRID, 2, 2, 0.5, EVIL))
    assert not page.of("script")
    assert not page.of("img")
    assert " ".join(EVIL.split()) in page.text
    with pytest.raises(ValueError, match="window"):
        plan_map(Plan.of(Neighborhood(window=(30, 1, 1))), GRID, 2, 2, 0.5)


def test_the_mask_tells_full_partial_and_empty() -> None:
    found = static_choice(Served(Neighborhood(0.5), 0, 1), Grid(6, 10, 10, suffix=20))
    assert found is not None
    image = np.array(mask_image(found))
    blocks = found.layout.blocks
    side = image.shape[0] // blocks
    index = [row[row >= 0] for row in found.layout.video_index()]
    assert found.definition is not None
    counts = dict.fromkeys(("full", "partial", "empty"), 0)
    for q, k in itertools.product(range(blocks), repeat=2):
        kept = torch.ones(1, dtype=torch.bool)  # text
        if q < len(index) and k < len(index):
            kept = found.definition.keep(index[q][:, None], index[k][None], found.grid)
        kind = "full" if kept.all() else "partial" if kept.any() else "empty"
        counts[kind] += 1
        square = image[q * side : (q + 1) * side, k * side : (k + 1) * side]
        assert (square == PALETTE[kind]).all(), (q, k)
    assert min(counts.values()) > 0
    told = mask_text(found)
    for kind, what in (("full", "read whole"), ("partial", "read in part"), ("empty", "left out")):
        assert f"{what} ({counts[kind]})" in told
    assert "the last 1 of them text" in told


def test_means_that_stand_for_blocks_have_a_shade() -> None:
    layout = TokenOrder("raster").layout(GRID)
    mask = torch.rand(1, layout.blocks, layout.blocks) < 0.5
    indices = from_block_mask(mask, torch.zeros(1), layout.start, layout.length, layout.start, layout.length)
    image = np.array(mask_image(Choice("made", layout, indices, compensate=True)))
    side = image.shape[0] // layout.blocks
    wanted = np.where(mask[0].numpy(), PALETTE["full"], PALETTE["stood for"])
    assert (image[::side, ::side] == wanted).all()


def test_recall_step_by_step() -> None:
    report = made_report(2)
    run = report["sparse"][1]
    run["measured"] = monitored(random.randint(2, 20), 3, 4, random.Random())
    validate(report)
    means = step_means(run)
    calls = [call for layer in run["measured"]["layers"] for call in layer["calls"]]
    assert [one.step for one in means] == sorted({call["step"] for call in calls})
    for one in means:
        recalls = [value for call in calls if call["step"] == one.step for value in call["recall"]]
        errors = [value for call in calls if call["step"] == one.step for value in call["error"]]
        assert one.recall == pytest.approx(sum(recalls) / len(recalls))
        assert one.lowest_recall == min(recalls)
        assert one.error == pytest.approx(sum(errors) / len(errors))
    page = Page(recall_chart(report, "plan-1"))
    points = [a["aria-label"] for a in page.of("g") if a.get("tabindex") == "0"]
    assert points == [
        *(f"step {one.step}: mean recall {one.recall:.3f}" for one in means),
        *(f"step {one.step}: lowest recall of a head {one.lowest_recall:.3f}" for one in means),
        *(f"step {one.step}: mean output error {one.error:.3f}" for one in means),
    ]
    circles = [float(a["cy"]) for a in page.of("circle")][: len(means)]
    by_recall = [y for _, y in sorted(zip([one.recall for one in means], circles, strict=True))]
    assert by_recall == sorted(circles, reverse=True), "more recall is higher up"
    assert "neither ranks plans" in page.text


def test_without_monitoring_a_sentence_tells_how() -> None:
    report = made_report(1)
    assert "--monitor" in recall_chart(report, "plan-0")
    report["sparse"][0]["measured"] = None
    assert "--monitor" in recall_chart(report, "plan-0")
    with pytest.raises(ValueError, match="no plan 'plan-9'; it has plan-0"):
        recall_chart(report, "plan-9")


def test_a_report_as_objects() -> None:
    report = made_report(2)
    assert plan_of(report, "plan-1").to_dict()["rules"] == run_of(report, "plan-1")["plan"]["rules"]
    assert grid_of(report).tokens == report["grid"]["tokens"]
    assert job_of(report).prompt == report["request"]["prompt"]
    assert job_of(report).steps == report["request"]["steps"]
    assert options_of(report).backend == "auto"
    unknown = copy.deepcopy(report) | {"grid": None}
    with pytest.raises(ValueError, match="grid of this comparison is not known"):
        grid_of(unknown)
