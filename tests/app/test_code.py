"""The Python that the page offers: it is compiled, and run on the tiny model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers.utils
import numpy as np
import pytest

from dit_sparse.app.code import code_of_run, plan_text, setting_code
from dit_sparse.options import Options
from dit_sparse.patterns import Radial
from dit_sparse.pipelines.generate import Job
from dit_sparse.plan import Plan
from dit_sparse.search.compare import Comparison, measure_plans
from dit_sparse.search.request import Request
from tests.compare.tiny import save_tiny_wan

JOB = Job('a "red" ball\'s \\ path\n{x} ☃', seed=3, steps=3, frames=9, height=64, width=96, guidance=3.5)
PLANS = {"mine.json": Plan.of(Radial(kind="block"), "mine")}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    model = save_tiny_wan(tmp_path_factory.mktemp("model") / "tiny-wan")
    job = replace(JOB, negative_prompt="blue", text_tokens=64)
    options = Options(min_tokens=0, dense_layers="0", backend="reference")
    specs = ("topblocks:keep=0.3", "mine.json")
    return measure_plans(Request(job, specs, Path("out"), str(model), "cpu", options=options), plans=PLANS)


def run(code: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Run the text as a script; what it would write as a video is caught."""
    written: list[np.ndarray] = []
    monkeypatch.setattr(diffusers.utils, "export_to_video", lambda frames, path, fps: written.append(frames))
    names: dict[str, Any] = {}
    exec(compile(code, "copied.py", "exec"), names)
    return {**names, "written": written}


@pytest.mark.parametrize("name", ["dense", "topblocks-keep-0.3", "mine"])
def test_the_code_makes_the_same_clip(
    name: str, found: Comparison, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if name == "mine":
        (tmp_path / "mine.json").write_text(plan_text(found.report, name))
    names = run(code_of_run(found.report, name), monkeypatch)
    (frames,) = names["written"]
    assert np.array_equal(frames, found.runs[name].clip.frames)
    if name == "dense":
        assert "ds" not in names
    else:
        assert names["ds"].summary(names["pipe"]).sparse_calls == found.report["sparse"][0]["sparse_calls"] == 6


def test_only_what_is_not_the_default_is_said(found: Comparison) -> None:
    code = code_of_run(found.report, "mine")
    assert "ds.enable(pipe, 'mine.json', backend='reference', min_tokens=0, dense_layers='0')" in code
    assert "# 'mine.json': " in code
    assert "dense_steps" not in code
    assert "ds.enable(pipe, 'balanced')" in setting_code("bundled", "cpu", "float32", JOB, "balanced")
    assert "height" not in setting_code("bundled", "cpu", "float32", replace(JOB, height=None), "balanced")


def test_unknown_runs(found: Comparison) -> None:
    with pytest.raises(KeyError):
        code_of_run(found.report, "other")
    with pytest.raises(KeyError):
        plan_text(found.report, "dense")


def test_the_bundled_model(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    job = Job("a red circle", steps=2, frames=9, height=16, width=16, text_tokens=64)
    names = run(setting_code("bundled", "cpu", "float32", job, "fast", {"min_tokens": 0}), monkeypatch)
    assert names["written"][0].shape == (9, 16, 16, 3)
    assert "sparse" in capsys.readouterr().out


def test_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    code = setting_code("user/model", "cuda", "bfloat16", replace(JOB, frames=None), "radial")
    compile(code, "copied.py", "exec")
    assert "images[0]" in code
    assert "export_to_video" not in code


@pytest.mark.parametrize(
    "evil", ['x"); import os; os.system("true")  #', "'''", '"""', "\\", "a\nb", "a\u2028b", "x\nimport os #.json"]
)
def test_texts_stay_texts(evil: str) -> None:
    """Whatever a visitor writes is one literal in the code."""
    import ast

    tree = ast.parse(setting_code(evil, "cpu", "float32", replace(JOB, prompt=evil), evil))
    literals = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    assert literals.count(evil) == 3
    assert {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names} == {
        "torch",
        "dit_sparse",
    }
