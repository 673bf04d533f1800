"""The whole search on a small pipeline: a plan that runs, a gate that decides, work that survives."""

from __future__ import annotations

import errno
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner, Result

import dit_sparse as ds
from dit_sparse.cli import build_app
from dit_sparse.patterns import pattern_from_text
from dit_sparse.pipelines.generate import Job, generate, generate_batch, load_pipeline
from dit_sparse.search.planner import renders
from dit_sparse.search.planner import store as store_module
from dit_sparse.search.planner.candidates import candidates
from dit_sparse.search.planner.clock import Clock
from dit_sparse.search.planner.find import MIXED, PRICES, WORK
from dit_sparse.search.planner.price_table import Measured, PriceTable, Row, extent_of
from dit_sparse.search.planner.prices import CallShape, Price, place_of
from dit_sparse.search.planner.problem import evaluate, uniform
from dit_sparse.search.planner.run import Found, find_plan
from dit_sparse.search.planner.solve import fastest
from dit_sparse.search.planner.store import Store, _crc_of
from dit_sparse.search.planner.uniform import kind_of
from dit_sparse.search.staging import write_text
from tests.compare.made_lpips import install_whole, random_weights
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


def plant_prices(out: Path, densities: Any = CHOICE["densities"], dense: float = 1.0, batch: int = 1) -> None:
    """Put down prices by density: on a CPU nothing beats dense at this size."""
    grid = ds.Grid(5, 12, 12)
    found = candidates(grid, CHOICE["specs"], densities)
    shares = np.linspace(0.2, 0.6, len(found))
    prices = {str(p): asdict(Price(0.05, float(share) * batch)) for p, share in zip(found, shares, strict=True)}
    prices |= {"dense": asdict(Price(0.05, dense * batch)), MIXED: asdict(Price(0.01, 0.0))}
    shape = CallShape(grid, batch, 2, 32, "float32", 2)
    value = {"head": {"shape": asdict(shape), "where": place_of("cpu"), "busy": False}, "prices": prices}
    write_text(out / WORK / f"{PRICES}.json", json.dumps({"crc": _crc_of(value), "value": value}))


def search(pipe: Any, out: Path, **options: Any) -> Found:
    if not (out / WORK / "prices.json").exists():
        plant_prices(out, options.get("densities", CHOICE["densities"]), batch=options.get("batch", 1))
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


def test_a_gate_on_lpips_is_held_and_told(pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_whole(random_weights("float16"), tmp_path, monkeypatch)
    found = search(pipe, tmp_path / "out", gate="lpips<=9,worst_lpips<=9", sensitivity=False)
    assert found.verdict == "met"
    measured = found.report["points"][found.report["chosen"]]["measured"]
    clips = [clip["lpips"] for clip in measured["clips"]]
    assert min(clips) > 0
    assert measured["lpips"]["mean"] == pytest.approx(np.mean(clips))
    assert measured["lpips"]["worst"] == max(clips)
    assert found.report["yardsticks"]["another seed"]["lpips"] > max(clips)
    assert json.loads((tmp_path / "out" / "report.json").read_text())["request"]["gate"] == {
        "lpips": 9.0, "worst_lpips": 9.0,
    }  # fmt: skip


def test_where_nothing_beats_dense_the_plan_is_dense_and_says_so(pipe: Any, tmp_path: Path) -> None:
    plant_prices(tmp_path, dense=0.1)
    found = search(pipe, tmp_path, gate=IMPOSSIBLE, sensitivity=False)
    assert found.verdict == "met"
    assert found.plan.rules == ()
    assert "no candidate is faster than dense" in found.why


def test_prices_of_another_machine_are_measured_again(pipe: Any, tmp_path: Path) -> None:
    plant_prices(tmp_path)
    path = tmp_path / WORK / f"{PRICES}.json"
    planted = json.loads(path.read_text())["value"]
    planted["head"]["where"] = "another GPU"
    path.write_text(json.dumps({"crc": _crc_of(planted), "value": planted}))
    search(pipe, tmp_path, sensitivity=False)
    now = json.loads(path.read_text())["value"]
    assert now["head"]["where"] == place_of("cpu")
    assert set(now["prices"]) == set(planted["prices"])
    assert all(now["prices"][name] != planted["prices"][name] for name in now["prices"])


def test_dense_clips_are_dense_whatever_is_enabled(pipe: Any, tmp_path: Path) -> None:
    first = search(pipe, tmp_path / "a", sensitivity=False)
    ds.enable(pipe, "topblocks:keep=0.17", min_tokens=0)
    second = search(pipe, tmp_path / "b", sensitivity=False)
    assert ds.summary(pipe).plan == "topblocks:keep=0.17"
    assert second.plan == first.plan
    for a, b in zip(first.report["points"], second.report["points"], strict=True):
        assert (a["measured"] is None) == (b["measured"] is None)
        if a["measured"] is not None:
            assert a["measured"]["psnr_db"] == b["measured"]["psnr_db"]


def test_other_weights_are_another_search(pipe: Any, tmp_path: Path) -> None:
    search(pipe, tmp_path, sensitivity=False)
    with torch.no_grad():
        pipe.transformer.blocks[1].attn1.to_q.weight.mul_(1.5)
    with pytest.raises(ValueError, match="differs in transformers"):
        search(pipe, tmp_path, sensitivity=False)


@pytest.mark.parametrize("polls", [6, 11, 20])
def test_a_search_in_slices_comes_to_the_end(
    pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, polls: int
) -> None:
    """Whatever the limit cuts, the next call goes on behind it: it ends, and at what one go would have found."""
    left = [0]

    def up(clock: Clock) -> bool:
        left[0] -= 1
        return left[0] < 0

    with monkeypatch.context() as patched:
        patched.setattr(Clock, "up", lambda clock: False)
        at_once = search(pipe, tmp_path / "at once", gate=IMPOSSIBLE, most_trials=2, sensitivity=True)
    monkeypatch.setattr(Clock, "up", up)
    for _ in range(60):
        left[0] = polls
        found = search(pipe, tmp_path / "slices", gate=IMPOSSIBLE, most_trials=2, sensitivity=True)
        assert ds.Plan.load(tmp_path / "slices") == found.plan
        if found.verdict == "not met":
            break
        assert found.verdict == "unverified"
        assert "time was up" in found.why
    assert found.verdict == "not met"
    assert found.plan == at_once.plan
    assert found.report["map"] == at_once.report["map"]


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
    kinds = {kind_of(pattern_from_text(point["spec"])) for point in measured}
    assert kinds == {"topblocks", "stripes"}
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


def test_at_the_time_limit_the_best_plan_so_far_is_written(model: Path, tmp_path: Path, prompts: Path) -> None:
    result = dit_sparse(*command(model, tmp_path / "out", prompts, "--gate", LENIENT, "--minutes", "1e-9"))
    assert result.exit_code == 3, result.output
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["verdict"] == "unverified"
    assert "time was up" in report["why"]
    assert "unverified" in (tmp_path / "out" / "README.md").read_text()
    ds.Plan.load(tmp_path / "out")


def test_the_command_of_a_report_repeats_it(model: Path, tmp_path: Path, prompts: Path, monkeypatch: Any) -> None:
    words = command(model, tmp_path / "out", prompts, "--gate", LENIENT, "--guidance", "3", "--step-edges", "0,0.5,1")
    assert dit_sparse(*words).exit_code == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    again = shlex.split(report["command"])
    assert again.pop(0) == "dit-sparse"
    kept = times_of(tmp_path / "out" / WORK / "units")
    monkeypatch.chdir(tmp_path)
    result = dit_sparse(*again, "--device", "cpu", "--quiet")
    assert result.exit_code == 0, result.output
    assert times_of(tmp_path / "out" / WORK / "units") == kept
    assert json.loads((tmp_path / "out" / "report.json").read_text())["points"] == report["points"]


@pytest.fixture(scope="module")
def finished(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Found]:
    pipe = load_pipeline(str(model), "cpu", "float32")
    folder = tmp_path_factory.mktemp("finished")
    return folder, search(pipe, folder, sensitivity=False)


@pytest.mark.parametrize("name", ["search", "shape", "prices", "dense-attention", "clips", "renders", "yardsticks"])
def test_a_damaged_fact_is_made_again_or_told(
    pipe: Any, tmp_path: Path, finished: tuple[Path, Found], name: str
) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished[0], out)
    files = sorted(out.glob(f"{WORK}/{name}.json")) + sorted(out.glob(f"{WORK}/{name}/*.json"))
    assert files
    for text, told in (("", "is damaged"), ("[]", "is damaged"), ("{}", "differs in")):
        files[0].write_text(text)
        if name == "search":
            with pytest.raises(ValueError, match=told):
                search(pipe, out, sensitivity=False)
        else:
            assert (
                Store(out / WORK, json.loads((out / WORK / "search.json").read_text())).read(
                    str(files[0].relative_to(out / WORK))[: -len(".json")]
                )
                is None
            )
            assert files[0].with_name(files[0].name + ".damaged").read_text() == text
    if name != "search":
        files[0].write_text('{"crc": 1, "value": {}}')
        assert search(pipe, out, sensitivity=False).verdict == "met"


def test_a_cut_clip_is_made_again(pipe: Any, tmp_path: Path, finished: tuple[Path, Found]) -> None:
    out, first = tmp_path / "out", finished[1]
    shutil.copytree(finished[0], out)
    clip = next((out / WORK / "clips").glob("*.npy"))
    clip.write_bytes(clip.read_bytes()[:-9])
    for render in (out / WORK / "renders").iterdir():
        render.unlink()
    again = search(pipe, out, sensitivity=False)
    assert clip.with_name(clip.name + ".damaged").exists()
    psnr = [[p["measured"] and p["measured"]["psnr_db"] for p in one.report["points"]] for one in (first, again)]
    assert psnr[0] == psnr[1]


def test_prices_of_another_gpu_come_from_a_table(pipe: Any, tmp_path: Path, finished: tuple[Path, Found]) -> None:
    """The units and clips of the finished search serve again; the prices are those of the table, and told as such."""
    shutil.copytree(finished[0], tmp_path / "out")
    (tmp_path / "out" / WORK / "prices.json").write_text("")  # nobody may read them
    grid = ds.Grid(5, 12, 12)
    patterns = candidates(grid, CHOICE["specs"], CHOICE["densities"])
    shares = np.linspace(0.2, 0.6, len(patterns))
    rows = [
        Row(str(p), *extent_of(p, grid), 0.05, 1.0 if str(p) == "dense" else float(share))
        for p, share in zip(patterns, shares, strict=True)
    ]
    shape = CallShape(grid, 1, 2, 32, "bfloat16", 2)
    table = PriceTable("NVIDIA Made-up", "1", "2", "today", (Measured("tiny", shape, 0.01, tuple(rows)),), "")
    (tmp_path / "table.json").write_text(table.to_json())
    words = {"prices": str(tmp_path / "table.json"), "sensitivity": False}
    found = find_plan(pipe, tmp_path / "out", **{**SIZE, **CHOICE, **PROMPTS, "gate": LENIENT}, **words)
    where = "NVIDIA Made-up (price table table.json)"
    assert found.report["prices"] == {"where": where, "shipped": True}
    assert found.plan.provenance["prices"] == where
    assert found.plan.rules == finished[1].plan.rules  # the same prices, planted there
    assert f"--prices {tmp_path / 'table.json'}" in found.report["command"]
    assert any(where in note for note in found.report["notes"])
    for name in ("report.html", "report.md"):
        text = (tmp_path / "out" / name).read_text().replace("\\", "")
        assert f"predicted times are those of {where} in bfloat16" in text
    with pytest.raises(ValueError, match="no price of 'frames'"):
        find_plan(pipe, tmp_path / "new", **{**SIZE, **PROMPTS, "specs": ["frames:kind=spatial"]}, **words)
    assert not (tmp_path / "new" / WORK).exists()  # refused before any work


def test_what_killed_writers_left_is_swept(pipe: Any, tmp_path: Path) -> None:
    left = tmp_path / WORK / "units" / ".dit-sparse-abc"
    left.mkdir(parents=True)
    (left / "half.safetensors").write_bytes(b"123")
    search(pipe, tmp_path, sensitivity=False)
    assert not left.exists()


@pytest.mark.parametrize("when", ["units/*.safetensors", "renders/*.json"], ids=["scoring", "rendering"])
def test_a_search_survives_kill(model: Path, tmp_path: Path, prompts: Path, when: str) -> None:
    out = tmp_path / "out"
    words = command(model, out, prompts, "--gate", IMPOSSIBLE, "--trials", "2")
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}  # prices are those of a number of threads
    main = [sys.executable, "-c", "from dit_sparse.cli import main; main()"]
    process = subprocess.Popen([*main, *words], env={**os.environ, **threads})
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


def test_attention_is_not_timed_cold(
    pipe: Any, tmp_path: Path, finished: tuple[Path, Found], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clips may be on disk from before, and what they were rendered with be new to this process."""
    shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
    lost = list((tmp_path / WORK).rglob("*-attention.json"))
    for path in lost:
        path.unlink()
    ran: list[tuple[str, int]] = []
    run, timed = renders.run_steps, renders.time_attention
    monkeypatch.setattr(renders, "run_steps", lambda *args: ran.append(("run", run(*args))))
    monkeypatch.setattr(renders, "time_attention", lambda *args: ran.append(("timed", 0)) or timed(*args))
    again = search(pipe, tmp_path, sensitivity=False)
    assert ran == [("run", SIZE["steps"]), ("timed", 0)] * len(lost)
    assert len(lost) >= 2
    assert again.plan == finished[1].plan


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
        (["--prices", "nowhere.json"], "give measured, shipped or a file"),
        (["--step-edges", "0,x,1"], "step edges"),
        (["--step-edges", "0,0.5"], "rise from 0 to 1"),
        (["--candidate", "cached:pattern=topblocks,residual=true"], "cannot be scored"),
        (["--gate", "worst_flicker<=0.1", "--frames", "1"], "at least 2 frames"),
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
