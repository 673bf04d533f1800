"""The bench of the price table, on a CPU: it writes, goes on, stops in time and checks what it times."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from dit_sparse.cli import build_app
from dit_sparse.grid import Grid
from dit_sparse.patterns import Dense, StaticPattern, pattern_from_text
from dit_sparse.search import price_bench
from dit_sparse.search.planner.candidates import candidates, suggested
from dit_sparse.search.planner.price_table import PriceTable, family_of, read_table
from dit_sparse.search.planner.prices import CallShape
from dit_sparse.search.price_bench import SHAPES, Wanted, bench_prices, shapes_of

TINY = {
    "a": Wanted(
        CallShape(Grid(5, 12, 12), 1, 2, 32, "bfloat16"),
        ("topblocks", "stripes:kind=diagonal", "autoframes"),
        (0.6,),
        (0.6,),
    ),
    "b": Wanted(CallShape(Grid(4, 8, 8), 1, 2, 32, "bfloat16"), ("topblocks",), (0.6,), (0.6,)),
}


def written(table: PriceTable, path: Path) -> None:
    path.write_text(table.to_json())


def test_the_bench_writes_a_table_and_goes_on_from_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, told = tmp_path / "prices.json", []
    wanted = {name: replace(one, rounds=1) for name, one in TINY.items()}
    table, missing = bench_prices(list(wanted), 5.0, out, told.append, "cpu", wanted)
    assert missing == []
    assert read_table(str(out)).shapes == table.shapes
    assert [line.split(":")[0] for line in told] == ["a", "b"]
    families = {row.family for row in table.shapes[0].rows}
    assert families == {
        "dense", "topblocks", "cached:refresh_steps=3,pattern=topblocks", "stripes:kind=diagonal", "autoframes",
        "cached:refresh_steps=3,pattern=autoframes",
    }  # fmt: skip
    cut = replace(table, shapes=(replace(table.shapes[0], rows=table.shapes[0].rows[:3]),))
    written(cut, out)
    again, missing = bench_prices(["a"], 5.0, out, told.append, "cpu", wanted)
    assert missing == []
    assert again.shapes[0].rows[:3] == table.shapes[0].rows[:3]
    assert [row.pattern for row in again.shapes[0].rows] == [row.pattern for row in table.shapes[0].rows]
    written(replace(table, machine="another"), out)
    with pytest.raises(ValueError, match="holds prices of machine another"):
        bench_prices(["a"], 5.0, out, told.append, "cpu", wanted)


def test_the_bench_stops_in_time_and_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, told, now = tmp_path / "prices.json", [], iter(range(1000))
    monkeypatch.setattr(price_bench.time, "monotonic", lambda: 60.0 * next(now))
    wanted = {name: replace(one, rounds=1) for name, one in TINY.items()}
    table, missing = bench_prices(list(wanted), 7.0, out, told.append, "cpu", wanted)
    measured = {f"{one.name}: {row.pattern}" for one in table.shapes for row in one.rows}
    everything = {f"{name}: {one}" for name in wanted for one in (Dense(), *wanted[name].patterns("cpu"))}
    gathering = {f"{name}: two groups in one call" for name in wanted}
    assert measured
    assert set(missing) == (everything | gathering) - measured
    assert read_table(str(out)).shapes == table.shapes
    assert told[-1].endswith("missing")


def test_a_wrong_result_stops_the_bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(price_bench, "check_rows", lambda *_: (math.nan, 1.0))
    with pytest.raises(RuntimeError, match="no price stands"):
        bench_prices(["b"], 5.0, tmp_path / "prices.json", print, "cpu", TINY)
    assert not (tmp_path / "prices.json").exists()


def test_the_bench_asks_for_a_device_that_is_here_and_knows_its_shapes(tmp_path: Path) -> None:
    def run(*words: str) -> Any:
        return CliRunner().invoke(build_app(), ["bench", "prices", "--out", str(tmp_path / "p.json"), *words])

    assert "shape must be one of bundled-17x16x16" in run("--shape", "wan-8k").stderr
    assert "shape must be one of bundled-17x16x16, got" in run("--shape", "wan-480p", "--device", "cpu").stderr
    if not torch.cuda.is_available():
        assert (run().exit_code, run().stderr) == (
            1,
            "dit-sparse: no GPU is here: give --device cpu to measure what calls cost on the CPU\n",
        )


def test_what_a_search_offers_by_itself_is_measured_for_both_sizes_of_heads() -> None:
    for head_dim in (64, 128):
        specs = {spec for one in SHAPES.values() if one.shape.head_dim == head_dim for spec in one.specs}
        assert set(suggested()) <= specs
    for text in SHAPES["wan-720p"].specs:
        pattern = pattern_from_text(text)
        assert not isinstance(pattern, StaticPattern) or text in suggested()


def test_what_a_search_offers_on_a_cpu_is_measured_there() -> None:
    ((_, wanted),) = shapes_of("cpu").items()
    measured = {family_of(one) for one in (Dense(), *wanted.patterns("cpu"))}
    assert {family_of(one) for one in candidates(wanted.shape.grid)} <= measured
