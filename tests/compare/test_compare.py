"""The whole road on a tiny WanPipeline: the same seed, real files, a report that says what happened."""

from __future__ import annotations

import dataclasses
import json
import shlex
from pathlib import Path
from typing import Any
from unittest.mock import patch

import imageio.v3 as iio
import numpy as np
import pytest
from typer.testing import CliRunner

from dit_sparse.cli import build_app
from dit_sparse.options import Options
from dit_sparse.patterns import Dense, Radial, TopBlocks
from dit_sparse.pipelines.enable import sparse, summary
from dit_sparse.pipelines.generate import Job, generate, load_pipeline, run_steps
from dit_sparse.pipelines.geometry import expected_grid, inspect_model
from dit_sparse.pipelines.timing import time_attention
from dit_sparse.plan import Plan, Rule
from dit_sparse.search.compare import compare
from dit_sparse.search.report import load_report, to_markdown, validate
from dit_sparse.search.request import Request, check_request, reproduce_command
from dit_sparse.search.runs import changes_over_steps
from dit_sparse.spec import PRESETS
from tests.compare.made_lpips import install_whole, random_weights

JOB = Job("a red ball", seed=3, steps=4, frames=9, height=64, width=96)


def request(model: Path, out: Path, *plans: str, **options: Any) -> Request:
    return Request(JOB, plans or ("balanced",), out, str(model), "cpu", options=Options(min_tokens=0), **options)


def test_a_plan_says_whether_its_sparse_steps_differ() -> None:
    dense, early, late = Rule(Dense(), (0.0, 0.2)), Rule(Radial(), (0.0, 0.5)), Rule(TopBlocks(), (0.5, 1.0))
    assert changes_over_steps(Plan((early, late)))
    assert changes_over_steps(Plan((dataclasses.replace(dense, heads=(0,)), Rule(Radial()))))
    assert not changes_over_steps(Plan((dense, Rule(Radial()))))
    assert not any(changes_over_steps(plan) for plan in (Plan.dense(), *PRESETS.values()))


def test_attention_is_timed_over_all_steps_where_they_differ(tiny_wan: Path, tmp_path: Path) -> None:
    halves = Plan((Rule(TopBlocks(keep=0.3), (0.0, 0.5)), Rule(TopBlocks(keep=0.9), (0.5, 1.0))), "halves")
    halves.save(tmp_path / "halves")
    plans = (str(tmp_path / "halves"), "topblocks:keep=0.3")
    told = compare(request(tiny_wan, tmp_path / "out", *plans))[0]["timing"]["attention_steps"]
    assert told == {"dense": 1, "halves": JOB.steps, "topblocks-keep-0.3": 1}
    wanted = compare(request(tiny_wan, tmp_path / "out", *plans, attention_steps=2))[0]["timing"]["attention_steps"]
    assert set(wanted.values()) == {2}


def test_files_and_report(tiny_wan: Path, tmp_path: Path) -> None:
    seen: list[str] = []
    report, files = compare(
        request(tiny_wan, tmp_path / "new" / "out", "topblocks:keep=0.3", "dense"),
        lambda what, done, total: seen.append(what),
    )
    names = {file.name for file in files}
    assert names == {
        "dense.mp4",
        "sparse-topblocks-keep-0.3.mp4",
        "sparse-dense-again.mp4",
        "side_by_side.mp4",
        "stills.png",
        "report.json",
        "report.md",
    }
    assert names == {file.name for file in (tmp_path / "new" / "out").iterdir()}, "nothing else is left"
    assert iio.imread(tmp_path / "new/out/dense.mp4", plugin="FFMPEG").shape == (9, 256, 384, 3)
    assert load_report(tmp_path / "new" / "out") == json.loads(json.dumps(report))

    top, stock = report["sparse"]
    assert report["grid"] == {"frames": 5, "height": 8, "width": 12, "prefix": 0, "suffix": 0, "tokens": 480}
    assert top["sparse_calls"] == 2 * 2 * 4, "layers x branches x steps"
    assert 0 < top["computed_density"]["kept"] < 0.5
    assert top["computed_density"]["kept"] + top["computed_density"]["skipped"] == pytest.approx(1.0)
    assert top["metrics"]["psnr_db"] is not None
    assert not top["metrics"]["identical"]
    # the pattern Dense() runs no kernel of ours: the clip must be bit for bit the dense one, the reason named
    assert stock["metrics"] == {**stock["metrics"], "identical": True, "psnr_db": None, "flicker": 0.0}
    assert stock["density"] is None
    assert stock["dense_reasons"] == {"plan: dense": 16}
    assert top["attention_seconds"] > 0
    assert report["dense"]["attention_seconds"] > 0
    assert "dense: timing attention" in seen
    text = (tmp_path / "new/out/report.md").read_text()
    assert report["command"] in text
    assert "| topblocks-keep-0.3 |" in text


def test_reports_with_and_without_lpips(tiny_wan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "packages").mkdir()
    install_whole(random_weights("float16"), tmp_path / "packages", monkeypatch)
    report, _ = compare(request(tiny_wan, tmp_path / "out", "topblocks:keep=0.3"))
    found = report["sparse"][0]["metrics"]
    assert found["lpips"] > 0
    row = f"| {found['lpips']:.4f} | {found['flicker']:.4f} |"
    assert row in (tmp_path / "out" / "report.md").read_text()
    del found["lpips"]  # as older versions wrote it
    validate(report)
    assert f"| – | {found['flicker']:.4f} |" in to_markdown(report)


def test_one_plan_is_called_sparse_and_repeats(tiny_wan: Path, tmp_path: Path) -> None:
    """A second run into the same folder replaces our files, keeps others', and gives the same clip."""
    (tmp_path / "mine.txt").write_text("keep me")
    first, files = compare(request(tiny_wan, tmp_path, "topblocks:keep=0.3"))
    assert {"dense.mp4", "sparse.mp4", "side_by_side.mp4"} <= {file.name for file in files}
    before = (tmp_path / "sparse.mp4").read_bytes()
    second, _ = compare(request(tiny_wan, tmp_path, "topblocks:keep=0.3"))
    assert first["sparse"][0]["metrics"] == second["sparse"][0]["metrics"]
    assert (tmp_path / "sparse.mp4").read_bytes() == before
    assert (tmp_path / "mine.txt").read_text() == "keep me"


def test_monitoring_is_a_run_of_its_own(tiny_wan: Path, tmp_path: Path) -> None:
    asked = request(tiny_wan, tmp_path, "topblocks:keep=0.3", "dense")
    plain, _ = compare(asked)
    report, _ = compare(dataclasses.replace(asked, options=Options(min_tokens=0, monitor=True)))
    assert "--monitor" in report["command"]
    assert "measured" not in plain["sparse"][0]
    top, stock = report["sparse"]
    assert stock["measured"] is None, "nothing ran sparse"
    assert top["sparse_calls"] == 2 * 2 * 4, "the monitored run is not counted"
    assert top["metrics"] == plain["sparse"][0]["metrics"], "monitoring changes nothing"
    measured = top["measured"]
    calls = [call for layer in measured["layers"] for call in layer["calls"]]
    assert len(calls) == 2 * 2 * 4
    recalls = [recall for call in calls for recall in call["recall"]]
    assert 0.2 < measured["lowest_recall"] <= measured["recall"] < 1
    assert measured["recall"] == pytest.approx(sum(recalls) / len(recalls), abs=1e-3)
    assert "Measured in each sparse call" in (tmp_path / "report.md").read_text()
    assert load_report(tmp_path)["sparse"][0]["measured"] == json.loads(json.dumps(measured))


def test_failure_on_the_way_writes_nothing(tiny_wan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that fills while videos are written leaves the folder as it was."""

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dit_sparse.search.compare.side_by_side", full)
    (tmp_path / "dense.mp4").write_text("older result")
    with pytest.raises(OSError, match="No space"):
        compare(request(tiny_wan, tmp_path))
    assert [file.name for file in tmp_path.iterdir()] == ["dense.mp4"]
    assert (tmp_path / "dense.mp4").read_text() == "older result"


def test_seed_and_stop(tiny_wan: Path) -> None:
    pipe = load_pipeline(str(tiny_wan), "cpu", "float32")
    pipe.set_progress_bar_config(disable=True)
    clip = generate(pipe, JOB)
    assert clip.frames.shape == (9, 64, 96, 3)
    assert run_steps(pipe, JOB, lambda: True) == 1, "stops after one step"
    assert np.array_equal(clip.frames, generate(pipe, JOB).frames), "a stopped run leaves nothing behind"
    other = generate(pipe, dataclasses.replace(JOB, seed=4))
    assert not np.array_equal(clip.frames, other.frames)


def test_attention_time(tiny_wan: Path) -> None:
    """Calls are told apart: the plan keeps the first of 8 steps dense, and its pass ends after 2 sparse steps."""
    plan = Plan((Rule(Dense(), steps=(0.0, 0.12)), Rule(TopBlocks(keep=0.2))))
    pipe = load_pipeline(str(tiny_wan), "cpu", "float32")
    pipe.set_progress_bar_config(disable=True)
    job = dataclasses.replace(JOB, steps=8)
    with sparse(pipe, plan, min_tokens=0):
        taken = time_attention(pipe, job, 2)
        record = summary(pipe)
    assert (taken.steps, taken.calls) == (3, 3 * 4)
    assert (record.sparse_calls, record.dense_calls) == (2 * 4, 4)
    assert taken.sparse_call_seconds is not None
    assert taken.dense_call_seconds is not None
    total = taken.of_run(28, 4)
    assert total == pytest.approx(28 * taken.sparse_call_seconds + 4 * taken.dense_call_seconds)
    with sparse(pipe, Plan.dense()):
        assert time_attention(pipe, job, 2).steps == 2
    with pytest.raises(ValueError, match="enabled"):
        time_attention(pipe, job, 2)


def test_expected_grid_is_the_one_that_runs(tiny_wan: Path) -> None:
    pipe = load_pipeline(str(tiny_wan), "cpu", "float32")
    pipe.set_progress_bar_config(disable=True)
    grid = expected_grid(pipe.transformer, pipe.vae.config, 9, 64, 96)
    with sparse(pipe, Plan.dense()):
        run_steps(pipe, JOB, lambda: True)
        assert summary(pipe).grid == str(grid)
    found = inspect_model(str(tiny_wan), 9, 64, 96)
    assert found["grid"]["tokens"] == grid.tokens
    (shape,) = found["transformers"]
    assert (shape["layers"], shape["heads"], shape["head_dim"]) == (2, 2, 32)
    assert shape["parameters"] == sum(p.numel() for p in pipe.transformer.parameters())


def test_names_are_unique_and_safe(tmp_path: Path) -> None:
    path = Plan.dense().save(tmp_path / "My Plan!")
    wanted = Request(JOB, ("radial", "radial", str(path.parent), "dense"), tmp_path)
    assert list(check_request(wanted)) == ["radial", "radial-again", "my-plan", "dense-again"]


def test_command_repeats_the_request(tmp_path: Path) -> None:
    wanted = Request(
        dataclasses.replace(JOB, prompt='it\'s a "red" ball', guidance=3.5),
        ("radial", "topblocks:keep=0.2"),
        tmp_path,
        device="cpu",
        dtype="float32",
        options=Options(2, "0, 1", 0, "cpu"),
    )
    received: list[Request] = []

    def catch(request: Request, progress: object) -> None:
        received.append(request)
        raise RuntimeError("far enough")

    with patch("dit_sparse.search.compare.compare", catch):
        CliRunner().invoke(build_app(), shlex.split(reproduce_command(wanted))[1:])
    assert received == [wanted]


def test_unknown_words_are_named(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Words outside the bundled model's vocabulary: a warning at once, and the known ones beside it."""
    from dit_sparse.pipelines import bundled
    from dit_sparse.search.compare import vocabulary_notes

    known = {"colours": ["red", "blue"], "grammar": ["a", "on"]}
    monkeypatch.setattr(bundled, "known_words", lambda: known)
    assert vocabulary_notes("a red") == []
    (note,) = vocabulary_notes("a red zeppelin on a blue giraffe")
    assert "'zeppelin', 'giraffe'" in note
    assert "colours: red blue" in note
    assert note in caplog.text


@pytest.mark.gpu
def test_attention_time_on_cuda(tiny_wan: Path) -> None:
    """Events, not the clock: the attention of a run takes part of its seconds, never more."""
    pipe = load_pipeline(str(tiny_wan), "cuda", "bfloat16")
    pipe.set_progress_bar_config(disable=True)
    with sparse(pipe, "topblocks:keep=0.3", min_tokens=0):
        time_attention(pipe, JOB, 1)
        taken = time_attention(pipe, JOB, None)
        clip = generate(pipe, JOB)
        record = summary(pipe)
    assert taken.steps == JOB.steps
    assert 0 < taken.of_run(record.sparse_calls, record.dense_calls) < clip.seconds
    assert clip.peak_memory_bytes > 0
