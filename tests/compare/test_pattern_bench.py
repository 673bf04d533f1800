"""The benchmark of patterns: its table is what it says, and its check of results finds what is wrong."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from dit_sparse.cli import build_app
from dit_sparse.grid import Grid
from dit_sparse.patterns import PATTERNS, Pattern, pattern_from_text
from dit_sparse.search import pattern_bench
from dit_sparse.search.fitting import TARGETS, fit
from dit_sparse.search.row_check import check_rows
from tests.core.examples import EXAMPLES

CPU = torch.device("cpu")


@pytest.mark.parametrize("spec", pattern_bench.PATTERNS)
def test_the_table_is_fitted_and_can_be_typed_again(spec: str) -> None:
    found = fit(pattern_from_text(spec), Grid(9, 15, 20), 0.4, CPU)
    assert pattern_from_text(str(found)) == found
    if any(getattr(found, name, None) is not None for name in TARGETS):
        assert found == pattern_from_text(spec)
    if spec in ("neighborhood", "strided", "stripes:kind=diagonal", "topblocks"):
        assert found != pattern_from_text(spec), "the knob was set"


def test_the_table_leaves_no_pattern_out() -> None:
    measured = {pattern_from_text(spec).name for spec in pattern_bench.PATTERNS}
    assert measured == set(PATTERNS) - {"dense", "skip", "cached"}


@pytest.mark.parametrize("pattern", [one for many in EXAMPLES.values() for one in many], ids=str)
def test_rows_of_every_pattern_agree_with_float64(pattern: Pattern) -> None:
    for grid in (Grid(5, 9, 11, prefix=7), Grid(3, 12, 13, suffix=140)):
        error, allowed = check_rows(pattern, grid, 4, 32, CPU, torch.float32)
        assert error <= allowed


def test_a_row_fills_every_column_with_a_graph_or_without() -> None:
    row = pattern_bench.Row("shape", "topblocks", 0.25, 90.0, 1.7, 0.2, 0.1, 0.02, 2.0, 11.0, 1 << 20, 1e-3, 1e-2)
    waits = replace(row, graph_ms=None, lists_ms=None)
    shown, empty = (
        dict(zip(pattern_bench.HEADINGS, cells, strict=True)) for cells in pattern_bench.cells([row, waits])
    )
    assert (shown["choose ms"], shown["graph ms"], shown["lists ms"], shown["choose/attend"]) == (
        "0.200", "0.100", "0.020", "10.0%",
    )  # fmt: skip
    assert (empty["graph ms"], empty["lists ms"]) == ("-", "-")


def test_without_a_gpu_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = CliRunner().invoke(build_app(), ["bench", "patterns", "--out", str(tmp_path / "rows.json")])
    assert result.exit_code == 1, result.output
    assert "GPU" in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "named"),
    [(("-s", "wan9"), "'wan9'"), (("-p", "topblocs"), "'topblocs'")],
)
def test_what_is_unknown_is_a_usage_error(words: tuple[str, ...], named: str) -> None:
    result = CliRunner().invoke(build_app(), ["bench", "patterns", *words])
    assert result.exit_code == 2, result.output
    assert named in result.stderr
