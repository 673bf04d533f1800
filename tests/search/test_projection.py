"""The projection: figures worked out by hand from made-up shares, prices and forwards."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dit_sparse.grid import Grid
from dit_sparse.patterns import Dense, TopBlocks
from dit_sparse.search.planner import projection
from dit_sparse.search.planner.price_table import Measured, PriceTable, Row
from dit_sparse.search.planner.prices import CallShape, Price, Prices
from dit_sparse.search.planner.projection import (
    MODELS,
    Model,
    block_share,
    budgets_of,
    layer_ms,
    main,
    project,
    read_points,
    to_markdown,
)

GRID = Grid(10, 8, 16)  # 10 blocks of 128
SHAPE = CallShape(GRID, 1, 4, 128, "bfloat16")
MADE_UP = Model("made-up", "made-up-720p", "stock", SHAPE)
FORWARDS = [
    {"architecture": "made-up-720p", "plan": "stock", "seconds": 10.0},
    {"architecture": "made-up-720p", "plan": "without attention", "seconds": 4.0},
]
TWICE = [(0.001, 0.002), (0.5, 1.0)]  # each token costs two


def table_of(shape: CallShape = SHAPE, dense: float = 10.0, launch: float = 1.0, mixed: float = 0.5) -> PriceTable:
    """Make a table in which a head costs 2 ms and 16 ms times its area with TopBlocks, and `dense` ms without."""
    rows = [Row("dense", 1.0, 1.0, 0.0, dense)]
    rows += [Row(str(TopBlocks(area)), area, 1.0, launch, 2.0 + 16.0 * area) for area in (0.25, 0.5, 1.0)]
    return PriceTable("GPU", "1", "2", "today", (Measured("one", shape, mixed, tuple(rows)),), "made up")


def test_a_curve_is_straight_in_logarithms_and_never_under_the_tokens() -> None:
    points = [(0.01, 0.04), (0.04, 0.08), (0.25, 0.5)]
    assert block_share(0.02, points) == pytest.approx(0.04 * 2**0.5)
    assert [block_share(*one) for one in ((0.04, points), (0.01, points))] == pytest.approx([0.08, 0.04])
    assert block_share(0.005, points) == pytest.approx(0.02)  # of the ratio of the first point, 4
    assert block_share(0.3, points) == pytest.approx(0.6)  # of the last one, 2
    assert block_share(0.0, points) == 0.0
    assert block_share(0.9, points) == 1.0
    assert block_share(0.5, [(0.1, 0.05), (0.9, 0.2)]) == 0.5
    x = np.exp(np.random.default_rng().uniform(np.log(0.01), np.log(0.25), 50))
    slow = np.exp(np.interp(np.log(x), *np.log(points).T))
    assert [block_share(float(one), points) for one in x] == pytest.approx(slow.tolist())


def test_budgets_are_whole_blocks_and_at_least_one() -> None:
    assert budgets_of([[0.0, 0.05, 0.1, 0.11, 0.7]], TWICE, 10) == [[0.1, 0.1, 0.2, 0.3, 1.0]]


def test_a_layer_takes_the_cheapest_of_three_ways() -> None:
    prices = Prices(SHAPE, "GPU", {"dense": Price(0.0, 10.0)}, 0.5)
    prices.by_pattern.update({str(TopBlocks(s)): Price(1.0, 2.0 + 16.0 * s) for s in (0.1, 0.2, 0.4, 1.0)})  # type: ignore[attr-defined]
    assert layer_ms([0.1, 0.2], prices) == (pytest.approx(3.6 + 5.2 + 1.0), [0.1, 0.2])
    assert layer_ms([1.0, 1.0], prices) == (pytest.approx(20.0), [1.0, 1.0])
    assert layer_ms([0.1, 1.0], prices) == (pytest.approx(3.6 + 10.0 + 1.0 + 0.5), [0.1, 1.0])
    # the gain of the one head, 1.6, is less than a launch and the gathering
    assert layer_ms([0.4, 1.0], prices) == (pytest.approx(8.4 + 10.0 + 1.5), [0.4, 1.0])
    dear = Prices(SHAPE, "GPU", prices.by_pattern, 2.0)
    assert layer_ms([0.4, 1.0], dear) == (pytest.approx(20.0), [1.0, 1.0])


def test_a_model_worked_out_by_hand() -> None:
    """Two layers of four heads.

    Tokens .05, .1, .1, .4 and .05, .05, .05, .05 are blocks .1, .2, .2, .8 and four times .1, .2125 in the mean, which
    is .3 in whole blocks. The head with .8 costs 14.8 ms with them and 10 ms dense.
    """
    shares = [[0.05, 0.1, 0.1, 0.4], [0.05] * 4]
    found = project(MADE_UP, shares, TWICE, table_of(), FORWARDS)
    dense, own, largest, mean, covering = found["rows"]
    assert dense["attention_ms"] == pytest.approx(80.0)
    own_ms = (3.6 + 5.2 + 5.2 + 10.0 + 1.0 + 0.5) + (4 * 3.6 + 1.0)
    assert own["attention_ms"] == pytest.approx(own_ms)
    assert own["share"] == pytest.approx((0.1 + 0.2 + 0.2 + 1.0 + 0.4) / 8)
    assert own["broken"] == 0.0
    assert own["seconds"] == pytest.approx(4.0 + 6.0 * own_ms / 80.0)
    assert own["speedup"] == pytest.approx(10.0 / own["seconds"])
    assert found["mean_block_share"] == pytest.approx(0.2125)
    assert found["uniform_block_shares"] == pytest.approx(
        dict(zip([one["name"] for one in (largest, mean, covering)], (0.8, 0.3, 0.8), strict=True))
    )
    for one in (largest, covering):  # .8 for all is dearer than dense
        assert (one["attention_ms"], one["share"], one["broken"]) == (pytest.approx(80.0), 1.0, 0.0)
    assert mean["attention_ms"] == pytest.approx(2 * (4 * (2.0 + 16 * 0.3) + 1.0))
    assert mean["broken"] == pytest.approx(1 / 8)


def test_nineteen_of_twenty_heads_are_covered() -> None:
    shape = CallShape(GRID, 1, 20, 128, "bfloat16")
    shares = [[0.05] * 10 + [0.1] * 9 + [0.4]]
    model = Model("made-up", "made-up-720p", "stock", shape)
    found = project(model, shares, TWICE, table_of(shape), FORWARDS)
    row = found["rows"][-1]
    assert list(found["uniform_block_shares"].values())[-1] == 0.2
    assert row["broken"] == pytest.approx(1 / 20)
    assert row["attention_ms"] == pytest.approx(20 * 5.2 + 1.0)


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="shares of 4 heads"):
        project(MADE_UP, [[0.1] * 3], TWICE, table_of(), FORWARDS)
    with pytest.raises(ValueError, match="no forward of made-up-720p with the plan 'without attention'"):
        project(MADE_UP, [[0.1] * 4], TWICE, table_of(), FORWARDS[:1])
    path = tmp_path / "points.json"
    for points in ([], [[0.1, 0.2], [0.05, 0.3]], [[0.1, 0.2], [0.2, 0.1]], [[0.0, 0.1]], [[0.1]], 3):
        path.write_text(json.dumps({"points": points}))
        with pytest.raises(ValueError, match=r"points\.json must hold points"):
            read_points(path)
    with pytest.raises(FileNotFoundError, match="block_shares"):
        read_points(tmp_path / "none.json")
    path.write_text(json.dumps({"orders": {"raster": {"points": [[0.1, 0.9]]}, "strips": {"points": [[0.1, 0.2]]}}}))
    assert read_points(path) == [(0.1, 0.2)]


def test_the_command_projects_both_models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "points.json").write_text(json.dumps({"points": TWICE}))
    (tmp_path / "prices.json").write_text(table_of(MODELS[0].shape).to_json())
    root = Path(projection.__file__).resolve().parents[2]
    words = ["--ratio", tmp_path / "points.json", "--prices", tmp_path / "prices.json", "--out", tmp_path / "p.json"]
    words += ["--shares", root / "docs/measurements/released-attention.json"]
    words += ["--forwards", root / "docs/measurements/forwards-h200.json"]
    monkeypatch.setattr(sys, "argv", ["projection", *map(str, words)])
    main()
    found: dict[str, Any] = json.loads((tmp_path / "p.json").read_text())
    assert [(one["model"], one["layers"]) for one in found["models"]] == [
        ("wan2.1-t2v-14b", 40), ("hunyuanvideo-t2v", 60),
    ]  # fmt: skip
    assert found["models"][0]["dense_forward_seconds"] == pytest.approx(12.415, abs=1e-3)
    assert found["models"][1]["dense_forward_seconds"] == pytest.approx(23.142, abs=1e-3)  # without padded text
    for one in found["models"]:
        dense, own = one["rows"][:2]
        assert own["attention_ms"] < dense["attention_ms"]
        assert one["mean_token_share"] < one["mean_block_share"]
    text = (tmp_path / "p.md").read_text()
    assert text == to_markdown(found)
    assert text.startswith("# Projection, not a measurement")
    assert capsys.readouterr().out.strip() == text.strip()
    assert str(Dense()) in text
