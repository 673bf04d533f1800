"""The benchmark of quality on a tiny pipeline: the same seed, measured recalls, everything read against dense."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from dit_sparse.cli import build_app
from dit_sparse.patterns import pattern_from_text
from dit_sparse.search import quality_bench
from tests.compare.made_lpips import install_whole, random_weights


def run(model: Path, *words: str) -> dict[str, object]:
    out = model.parent / "rows.json"
    asked = ["--prompt", "a red ball", "--steps", "3", "--frames", "9", "--height", "64", "--width", "96"]
    asked += ["--device", "cpu", "--model", str(model), "--out", str(out), *words]
    result = CliRunner().invoke(build_app(), ["bench", "quality", *asked])
    assert result.exit_code == 0, result.output + result.stderr
    return json.loads(out.read_text())  # type: ignore[no-any-return]


@pytest.fixture
def model(tiny_wan: Path, tmp_path: Path) -> Path:
    (tmp_path / "model").symlink_to(tiny_wan)
    return tmp_path / "model"


def test_rows_say_what_was_kept_and_lost(model: Path) -> None:
    found = run(model, "--budget", "0.3", "--budget", "1.0", "-p", "topblocks:order=raster", "-p", "radial")
    top, radial, everything, _ = found["rows"]  # type: ignore[misc]
    assert top["pattern"] == "topblocks:keep=0.3,order=raster"
    assert 0.2 < top["computed_density"] < 0.4
    assert top["lowest_recall"] <= top["recall"] < 1
    assert math.isfinite(top["psnr_db"][0])
    assert radial["pattern"] == "radial", "what has no knob runs as it is"
    assert everything["computed_density"] == 1.0
    assert everything["recall"] == pytest.approx(1.0, abs=1e-4)
    assert everything["psnr_db"][0] > 60 > top["psnr_db"][0] > found["yardstick"]["other_seed_psnr_db"][0]  # type: ignore[index]


def test_a_run_cut_off_keeps_its_rows(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, out, seen = quality_bench._row, model.parent / "rows.json", []

    def cut(*given: Any) -> quality_bench.Row:
        seen.append(json.loads(out.read_text()))
        if len(seen) == 3:
            raise RuntimeError("the machine is taken away")
        return real(*given)

    monkeypatch.setattr(quality_bench, "_row", cut)
    specs = ["-p", "topblocks:order=raster", "-p", "radial", "-p", "neighborhood"]
    with pytest.raises(AssertionError, match="taken away"):
        run(model, "--budget", "0.3", *specs)
    assert [len(found["rows"]) for found in seen] == [0, 1, 2]
    kept = json.loads(out.read_text())
    assert kept == seen[-1]
    assert not kept["finished"]
    assert set(model.parent.iterdir()) == {model, out}
    monkeypatch.setattr(quality_bench, "_row", real)
    whole = run(model, "--budget", "0.3", *specs)
    assert whole["finished"]
    assert len(whole["rows"]) == 3  # type: ignore[arg-type]
    assert whole["rows"][0]["psnr_db"] == kept["rows"][0]["psnr_db"]  # type: ignore[index]


def test_rows_tell_lpips_where_weights_are(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "packages").mkdir()
    install_whole(random_weights("float16"), tmp_path / "packages", monkeypatch)
    found = run(model, "--budget", "0.3", "-p", "topblocks")
    assert 0 < found["rows"][0]["lpips"] < found["yardstick"]["other_seed_lpips"]  # type: ignore[index]


def test_the_table_holds_patterns() -> None:
    assert all(pattern_from_text(spec) for spec in quality_bench.PATTERNS)
    assert len(set(quality_bench.PATTERNS)) == len(quality_bench.PATTERNS)
