"""The price table: exact where it was measured, sensible between, refused where it knows nothing."""

from __future__ import annotations

import functools
import itertools
import json
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dit_sparse.grid import Grid
from dit_sparse.patterns import (
    AutoFrames,
    Cached,
    Dense,
    Frames,
    Neighborhood,
    Pattern,
    Radial,
    StaticPattern,
    Stripes,
    TopBlocks,
    pattern_from_text,
)
from dit_sparse.pipelines.generate import Job
from dit_sparse.search.planner.candidates import suggested
from dit_sparse.search.planner.find import _predicted
from dit_sparse.search.planner.price_table import (
    Measured,
    PriceTable,
    Row,
    area_of,
    extent_of,
    family_of,
    read_table,
)
from dit_sparse.search.planner.prices import CallShape
from dit_sparse.search.planner.request import Search
from dit_sparse.search.planner.run import command_of

GRIDS = (Grid(5, 12, 12), Grid(9, 16, 16, suffix=40), Grid(9, 24, 24))
PATTERNS: tuple[Pattern, ...] = tuple(
    pattern
    for share in (0.2, 0.4, 0.8)
    for inner in (TopBlocks(share, compensate=True), TopBlocks(share))
    for pattern in (inner, Cached(inner, 3))
) + tuple(Stripes("diagonal", share) for share in (0.1, 0.2, 0.5))


def shape_of(grid: Grid, batch: int = 1, heads: int = 4, head_dim: int = 32) -> CallShape:
    return CallShape(grid, batch, heads, head_dim, "bfloat16")


@functools.cache
def extent(pattern: Pattern, grid: Grid) -> tuple[float, float]:
    return extent_of(pattern, grid)


class Formula:
    """Be a GPU whose times follow a formula with random numbers: a base and a cost of the visited area, per family."""

    def __init__(self) -> None:
        self.rng = np.random.default_rng()
        self.numbers: dict[str, tuple[float, float, float]] = {}

    def cost(self, pattern: Pattern, grid: Grid) -> tuple[float, float]:
        """Return the launch and the head's part: in proportion to pairs ^ .95, so a straight line in logarithms."""
        low, high = (0.5, 2.0)
        launch, base, slope = self.numbers.setdefault(family_of(pattern), tuple(self.rng.uniform(low, high, 3)))
        density, raggedness = extent(pattern, grid)
        pairs = 1e-7 * float(grid.tokens) ** 1.9
        return 0.01 * launch, pairs * (0.1 * base + slope * density * raggedness**2)

    def table(self, patterns: tuple[Pattern, ...] = PATTERNS, dtype: str = "bfloat16") -> PriceTable:
        shapes = []
        for grid in GRIDS:
            rows = [Row(str(p), *extent(p, grid), *self.cost(p, grid)) for p in (Dense(), *patterns)]
            shape = replace(shape_of(grid), dtype=dtype)
            shapes.append(Measured(str(grid.tokens), shape, 1e-6 * grid.tokens * 4, tuple(rows)))
        return PriceTable("NVIDIA Formula", "2.11.0", "3.6.0", "2026-01-01", tuple(shapes), "shipped table")


def written(table: PriceTable, path: Path) -> Path:
    path.write_text(table.to_json())
    return path


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_exact_where_it_was_measured(pattern: Pattern) -> None:
    gpu = Formula()
    table = gpu.table()
    for grid in GRIDS:
        price = table.predict(pattern, shape_of(grid))
        assert (price.launch, price.head) == pytest.approx(gpu.cost(pattern, grid))


def test_between_densities_and_sizes_it_follows_the_formula() -> None:
    gpu = Formula()
    table = gpu.table()
    for grid in (Grid(7, 15, 14), Grid(9, 20, 20), Grid(9, 16, 18, suffix=33)):
        for share in (random.uniform(0.05, 1.0) for _ in range(5)):
            for pattern in (Dense(), TopBlocks(share), Stripes("diagonal", share), Cached(TopBlocks(share), 3)):
                price, (launch, head) = table.predict(pattern, shape_of(grid)), gpu.cost(pattern, grid)
                assert price.head == pytest.approx(head)  # the formula is straight in area and in log tokens
                assert price.launch == pytest.approx(launch)


def test_between_two_rows_it_stays_between_them() -> None:
    rng = np.random.default_rng()
    table = Formula().table((TopBlocks(0.2), TopBlocks(0.8)))
    noisy = tuple(
        replace(one, rows=tuple(replace(row, launch_ms=rng.uniform(), head_ms=rng.uniform()) for row in one.rows))
        for one in table.shapes
    )
    table = replace(table, shapes=noisy)
    for one in noisy:
        low, high = one.rows[1:]
        for share in rng.uniform(low.density, high.density, 8):
            price = one.at("topblocks", share * low.raggedness**2)
            assert min(low.head_ms, high.head_ms) <= price.head <= max(low.head_ms, high.head_ms)
            assert min(low.launch_ms, high.launch_ms) <= price.launch <= max(low.launch_ms, high.launch_ms)
    tokens = Grid(9, 20, 20)
    ends = [one.rows[0].head_ms / one.shape.grid.tokens**2 for one in noisy[1:]]
    assert min(ends) <= table.predict(Dense(), shape_of(tokens)).head / tokens.tokens**2 <= max(ends)


def test_outside_the_measured_sizes_a_pair_costs_what_it_does_at_the_nearest() -> None:
    table = Formula().table()
    for grid, nearest in ((Grid(3, 8, 8), 0), (Grid(20, 32, 32), 2)):
        own = table.predict(Dense(), shape_of(grid)).head / grid.tokens**2
        assert own == pytest.approx(table.shapes[nearest].rows[0].head_ms / GRIDS[nearest].tokens ** 2)


def test_one_density_alone_is_taken_for_a_cost_of_the_area() -> None:
    table = Formula().table((TopBlocks(0.4),))
    head = table.shapes[2].rows[1].head_ms
    price = table.predict(TopBlocks(0.8), shape_of(GRIDS[2]))
    assert price.head == pytest.approx(head * area_of(TopBlocks(0.8), GRIDS[2]) / area_of(TopBlocks(0.4), GRIDS[2]))


def test_the_batch_multiplies_the_part_of_heads_and_heads_come_with_it() -> None:
    table = Formula().table()
    one, three = (table.predict(TopBlocks(0.3), shape_of(GRIDS[1], batch)) for batch in (1, 3))
    assert three.launch == pytest.approx(one.launch)
    assert three.head == pytest.approx(3 * one.head)
    many = table.predict(TopBlocks(0.3), shape_of(GRIDS[1], 1, heads=40))
    assert many.of(40) == pytest.approx(one.launch + 40 * one.head)
    prices = table.prices(PATTERNS, shape_of(GRIDS[1], 2, heads=7))
    assert prices.mixed == pytest.approx(1e-6 * GRIDS[1].tokens * 2 * 7)
    assert prices.predicted
    assert prices.where == "NVIDIA Formula (shipped table)"


def test_extent_is_that_of_the_blocks_that_a_selection_visits() -> None:
    """Counted anew from the block lists that a kernel gets, for random q and k."""
    from dit_sparse.patterns import PatternState
    from dit_sparse.runner import exact_attention

    patterns: list[Pattern] = [
        TopBlocks(0.3), TopBlocks(0.3, order="tile", compensate=True), Cached(TopBlocks(0.5, order="hilbert"), 3),
        TopBlocks((0.2, 0.6)), Stripes("diagonal", 0.1), Frames("temporal", 0.2), Neighborhood(0.4), AutoFrames(0.2),
    ]  # fmt: skip
    for grid in (Grid(6, 16, 16, suffix=128), Grid(4, 16, 24, prefix=128), Grid(7, 20, 21, suffix=20)):
        q, k, v = (torch.randn(1, grid.tokens, 2, 16) for _ in range(3))
        for pattern in patterns:
            layout = pattern.token_order().layout(grid)
            args = [layout.to_kernel(x) for x in (q, k, v)]
            exact = exact_attention(args[1], args[2], layout, 0.25, None, "auto", {})
            state = PatternState(layout, 0.25, v=args[2], exact=exact)
            indices = pattern.select(args[0], args[1], grid, state).indices
            lengths = indices.kv_len.double()
            pairs = indices.q_len.double() @ indices.block_mask()[indices.head_of.long()].double().mean(0) @ lengths
            density, raggedness = extent_of(pattern, grid)
            # a head of AutoFrames takes either band, and random scores prefer short blocks or long ones
            ragged = grid.video_tokens % 128 and not isinstance(pattern, StaticPattern)
            slack = 0.1 if ragged or isinstance(pattern, AutoFrames) else 1e-9
            assert density == pytest.approx(float(pairs) / grid.tokens**2, abs=slack), pattern
            assert raggedness == pytest.approx(128 * layout.blocks / grid.tokens)


def test_families_leave_out_the_budget_alone() -> None:
    for text in suggested():
        pattern = pattern_from_text(text)
        if isinstance(pattern, StaticPattern):
            sizes = [pattern.knob_settings(Grid(9, 32, 32))[at] for at in (0, -1)]
        else:
            sizes = [pattern.with_density(GRIDS[2], share) for share in (0.4, 0.6)]
        assert sizes[0] != sizes[1]
        assert len({family_of(one) for one in sizes}) == 1
    apart = [
        TopBlocks(0.3), TopBlocks(0.3, order="tile"), TopBlocks(0.3, score="lse"), TopBlocks(0.3, compensate=True),
        Cached(TopBlocks(0.3), 3), Cached(TopBlocks(0.3), 4), Cached(TopBlocks(0.3, compensate=True), 3),
        Radial("block"), Radial("block", sink=False),
    ]  # fmt: skip
    assert len({family_of(one) for one in apart}) == len(apart)


def test_what_it_does_not_hold_is_named() -> None:
    table = Formula().table()
    with pytest.raises(ValueError, match=r"no price of 'topblocks:order=hilbert'.*at head_dim 32; choose candidates"):
        table.check([TopBlocks(order="hilbert")], 32)
    with pytest.raises(ValueError, match=r"holds head_dim 32, got 64"):
        table.check([], 64)
    with pytest.raises(ValueError, match="holds bfloat16, got dtype float32"):
        table.predict(Dense(), replace(shape_of(GRIDS[0]), dtype="float32"))
    assert table.predict(Dense(), replace(shape_of(GRIDS[0]), dtype="float16")) == table.predict(
        Dense(), shape_of(GRIDS[0])
    )
    with pytest.raises(ValueError, match=r"no price of 'topblocks:mass=0\.5'"):
        table.predict(TopBlocks(mass=0.5), shape_of(GRIDS[0]))
    with pytest.raises(ValueError, match="is not known beforehand"):
        extent_of(TopBlocks(recall=0.9), GRIDS[0])
    cut = replace(table, shapes=tuple(replace(one, mixed_ms=None) for one in table.shapes))
    with pytest.raises(ValueError, match="cut short"):
        cut.prices([], shape_of(GRIDS[0]))


def test_a_table_is_read_as_it_was_written(tmp_path: Path) -> None:
    table = Formula().table()
    again = read_table(str(written(table, tmp_path / "h200.json")))
    assert again == replace(table, source="price table h200.json")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda v: v.update(schema_version=2), "schema must be dit-sparse/prices 1, got dit-sparse/prices 2"),
        (lambda v: v.pop("machine"), "no 'machine'"),
        (lambda v: v["shapes"].clear(), "it needs shapes"),
        (lambda v: v["shapes"][0]["rows"].pop(0), "lacks dense"),
        (lambda v: v["shapes"][0]["rows"].append(v["shapes"][0]["rows"][1]), "two rows of one family"),
        (lambda v: v["shapes"][1]["rows"][2].update(head_ms=math.nan), "milliseconds >= 0"),
        (lambda v: v["shapes"][1]["rows"][2].update(density=1.5), "density in"),
        (lambda v: v["shapes"][1]["rows"][2].update(pattern="topblokcs"), "topblokcs"),
        (lambda v: v["shapes"][1]["rows"][2].pop("launch_ms"), "launch_ms"),
        (lambda v: v["shapes"][1]["shape"].update(dtype="float64"), "dtype float64"),
        (lambda v: v["shapes"][1]["shape"].update(dtype="float32"), "of dtypes that cost differently"),
        (lambda v: v["shapes"].append(v["shapes"][0]), "differ in head_dim or tokens"),
    ],
)
def test_a_damaged_table_is_refused(damage: Any, message: str, tmp_path: Path) -> None:
    values = json.loads(Formula().table().to_json())
    damage(values)
    path = tmp_path / "h200.json"
    path.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=message) as raised:
        read_table(str(path))
    assert str(path) in str(raised.value)
    assert "dit-sparse bench prices" in str(raised.value)


def test_a_cut_or_missing_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "h200.json"
    path.write_text(Formula().table().to_json()[:-100])
    with pytest.raises(ValueError, match=r"h200\.json cannot be read"):
        read_table(str(path))
    with pytest.raises(FileNotFoundError, match="give measured, shipped or a file"):
        read_table(str(tmp_path / "none.json"))
    monkeypatch.setattr("dit_sparse.search.planner.price_table.SHIPPED_TABLE", tmp_path / "none.json")
    with pytest.raises(FileNotFoundError, match="ships no price table"):
        read_table("shipped")


def test_the_command_of_a_search_names_its_prices(tmp_path: Path) -> None:
    job = Job("-", 0, 4, 9, 96, 96)
    for prices in ("shipped", "some where/h200.json"):
        words = command_of(Search(job, ("a",), ("b",), prices=prices), "somebody/model", tmp_path)
        assert f"--prices {prices!r}" in words or f"--prices {prices}" in words
    assert "--prices" not in command_of(Search(job, ("a",), ("b",)), "somebody/model", tmp_path)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_model_is_priced_in_the_dtype_of_the_table(dtype: str) -> None:
    class OneShape:
        def read(self, name: str) -> dict[str, Any]:
            grid = {"frames": 5, "height": 12, "width": 12, "prefix": 0, "suffix": 0}
            return {"grid": grid, "batch": 2, "heads": 4, "head_dim": 32, "dtype": "float16", "kv_heads": 4}

    table, search = Formula().table(dtype=dtype), Search(Job("-", 0, 4), ("a",), ("b",), batch=3)
    found = _predicted(table, OneShape(), [TopBlocks(0.3)], search, "cpu")  # type: ignore[arg-type]
    assert (found.shape.dtype, found.shape.batch) == (dtype, 6)
    asked = replace(shape_of(GRIDS[0], 6), dtype=dtype)
    assert found.by_pattern == table.prices([TopBlocks(0.3)], asked).by_pattern


def test_the_shipped_table_is_sound() -> None:
    table = read_table("shipped")
    assert {one.shape.head_dim for one in table.shapes} == {64, 128}
    table.check([one for text in suggested() for one in (pattern_from_text(text),)], 64)
    table.check([one for text in suggested() for one in (pattern_from_text(text),)], 128)
    for one in table.shapes:
        assert one.mixed_ms is not None
        for family in {row.family for row in one.rows}:
            rows = sorted((row for row in one.rows if row.family == family), key=lambda row: row.area)
            totals = [row.launch_ms + one.shape.heads * row.head_ms for row in rows]
            assert all(later >= 0.85 * before for before, later in itertools.pairwise(totals)), family
