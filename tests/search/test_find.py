"""The whole search on a small pipeline: a plan that runs, a gate that decides, work that survives."""

from __future__ import annotations

import errno
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner, Result

import dit_sparse as ds
from dit_sparse.cli import build_app
from dit_sparse.pipelines.generate import Job, generate, generate_batch, load_pipeline
from dit_sparse.search.planner import store as store_module
from dit_sparse.search.planner.candidates import candidates
from dit_sparse.search.planner.find import WORK
from dit_sparse.search.planner.prices import CallShape, Price, Prices
from dit_sparse.search.planner.problem import evaluate, uniform
from dit_sparse.search.planner.run import Found, find_plan
from dit_sparse.search.planner.solve import fastest
from dit_sparse.search.staging import write_text
from tests.compare.tiny import save_tiny_wan

SIZE = {"steps": 4, "frames": 9, "height": 96, "width": 96}  # 5 x 12 x 12 tokens: six blocks, the last one short
CHOICE = {"specs": ["topblocks", "stripes:kind=diagonal"], "densities": [0.3, 0.6], "step_edges": (0.0, 0.5, 1.0)}
PROMPTS = {"prompts": ["a red ball"], "held_out": ["a blue ball", "red"]}
LENIENT, IMPOSSIBLE = "psnr_db>=5", "psnr_db>=99"
WORDS = [
    "--steps", "4", "--frames", "9", "--height", "96", "--width", "96", "--candidate", "topblocks",
    "--candidate", "stripes:kind=diagonal", "--density", "0.3", "--density", "0.6", "--device", "cpu",
    "--no-sensitivity", "--quiet",
]  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_wan(tmp_path_factory.mktemp("model"))


@pytest.fixture
def pipe(model: Path) -> Any:
    found = load_pipeline(str(model), "cpu", "float32")
    found.set_progress_bar_config(disable=True)
    return found


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("# two of them\na red ball\n\n")
    return path


def plant_prices(out: Path, densities: Any = CHOICE["densities"]) -> None:
    """Put down prices by density: on a CPU nothing beats dense at this size."""
    grid = ds.Grid(5, 12, 12)
    found = candidates(grid, CHOICE["specs"], densities)
    shares = np.linspace(0.2, 0.6, len(found))
    prices = {str(pattern): Price(0.05, float(share)) for pattern, share in zip(found, shares, strict=True)}
    shape = CallShape(grid, 1, 2, 32, "float32")
    made_up = Prices(shape, "made up", {**prices, "dense": Price(0.05, 1.0)}, 0.01)
    write_text(out / WORK / "prices.json", json.dumps(made_up.to_dict()))


def search(pipe: Any, out: Path, **options: Any) -> Found:
    if not (out / WORK / "prices.json").exists():
        plant_prices(out, options.get("densities", CHOICE["densities"]))
    return find_plan(pipe, out, **{**SIZE, **CHOICE, **PROMPTS, "gate": LENIENT, **options})


def command(model: Path, out: Path, prompts: Path, *words: str) -> list[str]:
    """Return the words of a search; those of WORDS can be given again."""
    if not (out / WORK / "prices.json").exists():
        plant_prices(out)
    return [
        "search", "--model", str(model), "--out", str(out), "--prompts", str(prompts), "--held-out", str(prompts),
        *WORDS, *words,
    ]  # fmt: skip


def dit_sparse(*words: str) -> Result:
    return CliRunner().invoke(build_app(), list(words))


def times_of(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_a_searched_plan_runs_and_the_pipeline_is_left_as_it_was(pipe: Any, tmp_path: Path) -> None:
    job = Job("a blue ball", 0, **SIZE)
    before, processors = generate(pipe, job).frames, dict(pipe.transformer.attn_processors)
    found = search(pipe, tmp_path)
    assert (generate(pipe, job).frames == before).all()
    assert all(now is processors[name] for name, now in pipe.transformer.attn_processors.items())
    assert found.verdict == "met"
    assert {path.name for path in found.files} == {"plan.json", "README.md", "report.html", "report.md", "report.json"}
    plan = ds.Plan.load(tmp_path)
    assert plan == found.plan
    assert plan.model is not None
    assert plan.provenance["grid"] == "5x12x12"
    ds.enable(pipe, tmp_path, min_tokens=0)
    again = generate(pipe, job).frames
    assert (again != before).any()
    assert ds.summary(pipe).sparse_calls > 0
    measured = found.report["points"][found.report["chosen"]]["measured"]
    mse = float(((again - before) ** 2).mean())
    assert -10 * math.log10(mse) == pytest.approx(measured["clips"][0]["psnr_db"], abs=0.01)


def test_where_nothing_beats_dense_the_plan_is_dense_and_says_so(pipe: Any, tmp_path: Path) -> None:
    found = find_plan(pipe, tmp_path, **{**SIZE, **CHOICE, **PROMPTS, "gate": IMPOSSIBLE, "sensitivity": False})
    prices = Prices.from_dict(json.loads((tmp_path / WORK / "prices.json").read_text()))
    dense = prices.by_pattern["dense"].of(2)
    if min(price.of(2) for price in prices.by_pattern.values()) == dense:
        assert found.plan.rules == ()
        assert "no candidate is faster than dense" in found.why


def test_no_uniform_pattern_is_cheaper_at_equal_modelled_error(
    pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcomes: list[Any] = []
    from dit_sparse.search.planner import run

    keep = run.search_plan
    monkeypatch.setattr(run, "search_plan", lambda *a: outcomes.append(keep(*a)) or outcomes[-1])
    search(pipe, tmp_path, sensitivity=True)
    problem = outcomes[0].problem
    for candidate in range(problem.loss.shape[-1]):
        ms, loss = evaluate(problem, uniform(problem, candidate))
        assert fastest(problem, loss).ms <= ms * (1 + 1e-9)


def test_clips_of_a_batch_are_those_of_single_runs(pipe: Any) -> None:
    jobs = [Job(prompt, seed, **SIZE) for prompt, seed in (("a red ball", 0), ("a blue ball", 5), ("red", 1))]
    singles = [generate(pipe, job).frames for job in jobs]
    batch = [clip.frames for clip in generate_batch(pipe, jobs)]
    for one, other in zip(singles, batch, strict=True):
        assert one.shape == other.shape
        np.testing.assert_allclose(one, other, atol=1e-4)
    assert np.abs(batch[0] - batch[1]).max() > 1e-3
    with pytest.raises(ValueError, match="prompt and seed only"):
        generate_batch(pipe, [jobs[0], Job("red", 0, **{**SIZE, "steps": 3})])


def test_uniform_patterns_are_rendered_beside_the_plan(pipe: Any, tmp_path: Path) -> None:
    found = search(pipe, tmp_path, sensitivity=False, against=True)
    uniform_points = [point for point in found.report["points"] if point["kind"] == "uniform"]
    measured = [point for point in uniform_points if point["measured"]]
    assert {point["spec"].partition(":")[0] for point in measured} == {"topblocks", "cached", "stripes"}
    for point in measured:
        assert len(point["measured"]["clips"]) == 2
        assert 5 < point["measured"]["psnr_db"]["mean"] < 100


def test_a_batch_comes_to_the_figures_of_single_clips(pipe: Any, tmp_path: Path) -> None:
    one = search(pipe, tmp_path / "one", sensitivity=False)
    two = search(pipe, tmp_path / "two", sensitivity=False, batch=2)
    assert one.plan == two.plan
    for a, b in zip(*(found.report["points"][0]["measured"]["clips"] for found in (one, two)), strict=True):
        assert a["psnr_db"] == pytest.approx(b["psnr_db"], abs=0.2)


def test_a_gate_that_cannot_be_met_is_told_and_the_nearest_plan_written(
    model: Path, tmp_path: Path, prompts: Path
) -> None:
    result = dit_sparse(*command(model, tmp_path / "out", prompts, "--gate", IMPOSSIBLE, "--trials", "2"))
    assert result.exit_code == 3, result.output
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["verdict"] == "not met"
    assert "psnr_db>=99" in report["why"]
    assert ds.Plan.load(tmp_path / "out").provenance["verdict"] == "not met"
    assert "not met" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("minutes", [1e-9, 0.02])
def test_at_the_time_limit_the_best_plan_so_far_is_written(
    model: Path, tmp_path: Path, prompts: Path, minutes: float
) -> None:
    result = dit_sparse(*command(model, tmp_path / "out", prompts, "--gate", LENIENT, "--minutes", str(minutes)))
    assert result.exit_code == 3, result.output
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["verdict"] == "unverified"
    assert "time was up" in report["why"]
    assert "unverified" in (tmp_path / "out" / "README.md").read_text()
    ds.Plan.load(tmp_path / "out")


@pytest.mark.parametrize("when", ["units/*.safetensors", "renders/*.json"], ids=["scoring", "rendering"])
def test_a_search_survives_kill(model: Path, tmp_path: Path, prompts: Path, when: str) -> None:
    out = tmp_path / "out"
    words = command(model, out, prompts, "--gate", IMPOSSIBLE, "--trials", "2")
    process = subprocess.Popen([sys.executable, "-c", "from dit_sparse.cli import main; main()", *words])
    begin = time.monotonic()
    while not list((out / WORK).glob(when)):
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() - begin < 120
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    kept = {path: at for path, at in times_of(out / WORK).items() if not path.parent.name.startswith(".")}
    assert not (out / "plan.json").exists()
    result = dit_sparse(*words)
    assert result.exit_code == 3, result.output
    now = times_of(out / WORK)
    assert {path: now.get(path) for path in kept} == kept
    assert ds.Plan.load(out).provenance["verdict"] == "not met"


def test_a_finished_search_is_repeated_from_disk(pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = search(pipe, tmp_path)
    monkeypatch.setattr(pipe.transformer, "forward", lambda *args, **kwargs: pytest.fail("something was generated"))
    again = search(pipe, tmp_path)
    assert again.plan == first.plan
    assert again.report["points"] == first.report["points"]


def test_a_full_disk_loses_nothing(pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    save = store_module.save_file

    def full(tensors: Any, path: Path, metadata: dict[str, str]) -> None:
        if len(written) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        written.append(path.name)
        save(tensors, path, metadata)

    monkeypatch.setattr(store_module, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        search(pipe, tmp_path)
    kept = times_of(tmp_path / WORK / "units")
    assert sorted(path.name for path in kept) == sorted(written)
    monkeypatch.setattr(store_module, "save_file", save)
    assert search(pipe, tmp_path).verdict == "met"
    assert {path: times_of(tmp_path / WORK / "units")[path] for path in kept} == kept


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gate", "pnsr_db>=20"], "did you mean 'psnr_db'"),
        (["--candidate", "topblokcs"], "topblocks"),
        (["--density", "2"], "densities must be shares"),
        (["--minutes", "0"], "minutes must be positive"),
        (["--trials", "0"], "at least 1"),
        (["--prompts", "nowhere.txt"], "does not exist"),
    ],
)
def test_what_is_mistyped_is_refused_before_any_work(
    model: Path, tmp_path: Path, prompts: Path, words: list[str], message: str
) -> None:
    result = dit_sparse(*command(model, tmp_path / "out", prompts, *words))
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert not (tmp_path / "out" / "plan.json").exists()


def test_a_plan_is_held_against_a_gate_at_another_size(model: Path, tmp_path: Path, prompts: Path) -> None:
    out, other = tmp_path / "out", ["--height", "64", "--validate", "topblocks:keep=0.5"]
    words = [word for word in command(model, out, prompts, *other) if word != "--no-sensitivity"]
    result = dit_sparse(*words, "--gate", LENIENT)
    assert result.exit_code == 0, result.output
    found = json.loads((out / "validation.json").read_text())
    assert found["grid"] == "5x8x12"
    assert found["measured"]["psnr_db"]["mean"] > 5
    assert dit_sparse(*words, "--gate", IMPOSSIBLE).exit_code == 3  # from the clips on disk
    result = dit_sparse(*words[:-1], str(tmp_path / "none.json"))
    assert result.exit_code == 2
    assert "no plan at" in result.stderr


def test_an_empty_prompts_file_is_refused(model: Path, tmp_path: Path, prompts: Path) -> None:
    prompts.write_text("# nothing yet\n\n")
    result = dit_sparse(*command(model, tmp_path / "out", prompts))
    assert result.exit_code == 2
    assert "holds no prompt" in result.stderr


def test_the_folder_of_another_search_is_left_alone(pipe: Any, tmp_path: Path) -> None:
    search(pipe, tmp_path)
    kept = times_of(tmp_path)
    with pytest.raises(ValueError, match="holds a search that differs in candidates"):
        search(pipe, tmp_path, densities=[0.5])
    assert times_of(tmp_path) == kept


def test_shipped_prompts_are_many_and_apart() -> None:
    from dit_sparse.pipelines.bundled import unknown_words
    from dit_sparse.search.planner.request import shipped_prompts

    for name in ("bundled", "somebody/some-model"):
        calibration, held_out = shipped_prompts(name)
        assert len(calibration) >= 8
        assert len(held_out) >= 16
        assert not set(calibration) & set(held_out)
    assert not any(unknown_words(prompt) for prompt in (*shipped_prompts("bundled")[0], *shipped_prompts("bundled")[1]))
