"""Jobs on the tiny model as a page sees them: events in order, stopping, failing, waiting, and what is left behind."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import imageio.v3 as iio
import numpy as np
import pytest

from dit_sparse.app import studio as studio_module
from dit_sparse.app.events import (
    LAST,
    Beat,
    Done,
    Event,
    Failed,
    Finished,
    Preview,
    Stage,
    Step,
    Stopped,
    Waiting,
)
from dit_sparse.app.limits import Ask, Limits
from dit_sparse.app.studio import Studio
from dit_sparse.options import Options
from dit_sparse.patterns import Radial, TopBlocks
from dit_sparse.pipelines.generate import Job, generate, load_pipeline
from dit_sparse.pipelines.hooks import find_hook
from dit_sparse.plan import ModelBinding, Plan
from dit_sparse.search.report import load_report
from tests.compare.tiny import save_tiny_wan

ASK = Ask("a red ball", "topblocks:keep=0.3", seed=3, steps=4, frames=9, height=64, width=96)
NAME = "topblocks-keep-0.3"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_wan(tmp_path_factory.mktemp("model") / "tiny-wan")


@pytest.fixture
def studio(model: Path) -> Iterator[Studio]:
    studio = Studio(str(model), "cpu", options=Options(min_tokens=0), limits=Limits(waiting=1))
    yield studio
    studio.close()
    assert not studio.results.folder.exists()


def events_of(job: Iterator[Event], each: Callable[[Event], None] = lambda event: None) -> list[Event]:
    """Take all events of a job but the beats; beats and events must keep coming."""
    found, before = [], time.monotonic()
    for event in job:
        assert time.monotonic() - before < 5.0, "half a second is meant; this machine may be busy"
        if not isinstance(event, Beat):
            found.append(event)
        each(event)
        before = time.monotonic()
    assert [isinstance(event, LAST) for event in found] == [False] * (len(found) - 1) + [True]
    return found


def clean(studio: Studio) -> bool:
    """Say whether the pipeline is dense and bears no hook."""
    return find_hook(studio._pipe.transformer) is None and not studio._pipe.transformer._forward_pre_hooks


def test_events_in_order(studio: Studio, model: Path) -> None:
    found = events_of(studio.run(replace(ASK, yardstick=True, monitor=True), threading.Event()))
    stages = [event for event in found if isinstance(event, Stage)]
    assert stages == [
        Stage("", "loading the model"),
        Stage("dense", "warm-up"),
        Stage("dense", "generating"),
        Stage("dense", "timing attention"),
        Stage(NAME, "generating"),
        Stage(NAME, "timing attention"),
        Stage(NAME, "monitoring"),
        Stage("another seed", "generating"),
        Stage("", "measuring"),
        Stage("", "writing"),
    ]
    for run in ("dense", NAME):
        at = found.index(Stage(run, "generating"))
        until = found.index(Stage(run, "timing attention"))
        steps = [event for event in found[at + 1 : until] if isinstance(event, Step)]
        assert steps == [Step(run, "generating", done, 4) for done in (1, 2, 3, 4)]
        pictures = [event for event in found[at + 1 : until] if isinstance(event, Preview)]
        assert [picture.run for picture in pictures] == [run, run]
        assert {picture.frame.shape for picture in pictures} == {(64, 96, 3)}

    (end,) = (event for event in found if isinstance(event, Finished))
    report = load_report(end.folder)
    assert report == end.report
    assert end.folder.parent == studio.results.folder
    assert {"dense.mp4", "sparse.mp4", "report.md"} <= {file.name for file in end.folder.iterdir()}
    assert iio.imread(end.folder / "sparse.mp4", plugin="FFMPEG").shape == (9, 256, 384, 3)
    assert report["sparse"][0]["sparse_calls"] == 16
    assert report["sparse"][0]["measured"]["recall"] > 0
    assert set(report["yardsticks"]) == {"another seed"}
    for file in ("report.json", "report.md"):  # a visitor may see the model's name, and no path of this machine
        text = (end.folder / file).read_text()
        assert str(studio.results.folder) not in text
        assert str(model.parent) not in text
    assert report["request"]["model"] == "./tiny-wan"
    assert clean(studio)


def test_two_jobs_and_the_clip_is_the_pipelines_own(studio: Studio, model: Path) -> None:
    """The second job loads nothing; its raw frames are those of a pipeline that never saw the app."""
    first = events_of(studio.run(ASK, threading.Event()))[-1]
    found = events_of(studio.run(replace(ASK, seed=4), threading.Event()))
    assert Stage("", "loading the model") not in found
    assert isinstance(first, Finished)
    assert isinstance(found[-1], Finished)
    assert first.folder != found[-1].folder
    again = events_of(studio.run(ASK, threading.Event()))[-1]
    assert isinstance(again, Finished)
    assert again.report["sparse"][0]["metrics"] == first.report["sparse"][0]["metrics"]
    stock = load_pipeline(str(model), "cpu", "float32")
    job = Job("a red ball", seed=3, steps=4, frames=9, height=64, width=96)
    assert np.array_equal(generate(stock, job).frames, generate(studio._pipe, job).frames)


@pytest.mark.parametrize("run", ["dense", NAME])
@pytest.mark.parametrize("way", ["stop", "close"])
def test_stopping(run: str, way: str, studio: Studio) -> None:
    """Stopped in the second step of a run: it ends there, nothing is left, and the next job runs."""
    stop = threading.Event()
    job = studio.run(ASK, stop)
    seen = []
    for event in job:
        seen.append(event)
        if event == Step(run, "generating", 1, 4):
            if way == "close":
                job.close()  # type: ignore[attr-defined]
                break
            stop.set()
    if way == "stop":
        assert seen[-1] == Stopped()
    late = [event for event in seen if isinstance(event, Step) and event.run == run and event.done > 2]
    assert not late, "at most the step that ran was finished"
    found = events_of(studio.run(ASK, threading.Event()))  # waits for the other's end
    assert isinstance(found[-1], Finished)
    assert found[-1].report["sparse"][0]["sparse_calls"] == 16
    assert clean(studio)
    assert list(studio.results.folder.iterdir()) == [found[-1].folder]


def test_stopped_before_it_begins(studio: Studio) -> None:
    stop = threading.Event()
    stop.set()
    assert events_of(studio.run(ASK, stop)) == [Stopped()]


def test_sweep(studio: Studio) -> None:
    """Texts and uploaded plans together; two uploaded plans of one name, and one that is named like a preset."""
    mine = [Plan.of(TopBlocks(keep=0.5), "balanced"), Plan.of(Radial(kind="block"), "balanced")]
    plans = ["radial:kind=block", *mine, "balanced"]
    found = events_of(studio.sweep(ASK, plans, threading.Event()))
    end = found[-1]
    assert isinstance(end, Finished), end
    runs = end.report["sparse"]
    assert [run["spec"] for run in runs] == ["radial:kind=block", "balanced.json", "balanced-again.json", "balanced"]
    assert len({run["name"] for run in runs}) == 4
    assert [run["plan"] for run in runs[1:3]] == [plan.to_dict() for plan in mine]
    assert runs[0]["metrics"] == runs[2]["metrics"], "one pattern, given in two ways"
    assert {event.run for event in found if isinstance(event, Preview)} == {"dense", *(run["name"] for run in runs)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": ""}, "prompt is empty"),
        ({"steps": 99}, "steps must lie between 1 and 24"),
        ({"width": 40}, "width must be a multiple of 16"),
        ({"frames": 49, "height": 256}, "height must lie"),
        ({"plan": "../x"}, "unknown plan"),
        ({"plan": "user/repo"}, "unknown plan"),
        ({"plan": "neighborhood:window=0.3,layers=1"}, "layers"),
        ({"plan": Plan.of(TopBlocks(keep=0.2)).for_depth(2)}, None),
        ({"plan": replace(Plan.of(TopBlocks(keep=0.2)), model=ModelBinding("X", 1, 1))}, "was made for X"),
    ],
)
def test_what_a_visitor_can_mend(
    change: dict[str, Any], message: str | None, studio: Studio, caplog: pytest.LogCaptureFixture
) -> None:
    end = events_of(studio.run(replace(ASK, **change), threading.Event()))[-1]
    if message is None:
        assert isinstance(end, Finished)
        return
    assert isinstance(end, Failed)
    assert message in end.message
    assert end.log_id is None
    assert "Traceback" not in caplog.text


def test_too_many_and_too_few_plans(studio: Studio) -> None:
    for plans in ([], ["radial"] * 5):
        end = events_of(studio.sweep(ASK, plans, threading.Event()))[-1]
        assert isinstance(end, Failed)
        assert "between 1 and 4 plans" in end.message


@pytest.mark.parametrize("error", [RuntimeError("at /secret"), ValueError("at /secret"), OSError(28, "at /secret")])
def test_a_failing_job(
    error: Exception, studio: Studio, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The visitor gets an id and no path; the log has the traceback; the next job runs."""

    def full(*args: object) -> None:
        raise error

    with monkeypatch.context() as patch, caplog.at_level(logging.ERROR, "dit_sparse"):
        patch.setattr("dit_sparse.search.compare.side_by_side", full)
        end = events_of(studio.run(ASK, threading.Event()))[-1]
    assert isinstance(end, Failed)
    assert end.log_id
    assert end.log_id in end.message
    assert "secret" not in end.message
    assert end.log_id in caplog.text
    assert "Traceback" in caplog.text
    assert "at /secret" in caplog.text
    assert not any(studio.results.folder.iterdir())
    assert isinstance(events_of(studio.run(ASK, threading.Event()))[-1], Finished)


def test_a_model_that_cannot_be_loaded(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    studio = Studio(str(tmp_path), "cpu")
    end = events_of(studio.run(ASK, threading.Event()))[-1]
    assert isinstance(end, Failed)
    assert str(tmp_path) not in end.message
    assert "model_index.json" in caplog.text
    studio.close()


def test_one_at_a_time(studio: Studio) -> None:
    """A second job waits and says so, a third finds the line full; none runs beside another."""
    entered, go, running = threading.Event(), threading.Event(), []

    def slow(pipe: Any, tell: Any) -> str:
        running.append("slow")
        entered.set()
        assert go.wait(30)
        running.append("end of slow")
        return "value"

    first = studio.borrow(slow, threading.Event())
    ends: list[Event] = []
    thread = threading.Thread(target=lambda: ends.extend(events_of(first)))
    thread.start()
    assert entered.wait(30)

    second = studio.borrow(lambda pipe, tell: running.append("quick"), threading.Event())
    assert next(second) == Waiting(1)
    assert studio.waiting == 1
    (full,) = events_of(studio.run(ASK, threading.Event()))
    assert isinstance(full, Failed)
    assert "1 jobs wait already" in full.message
    go.set()
    thread.join()
    assert ends[-1].value == "value"  # type: ignore[union-attr]
    assert isinstance(events_of(second)[-1], Done)
    assert running == ["slow", "end of slow", "quick"]
    assert studio.waiting == 0


def test_leaving_the_line(studio: Studio) -> None:
    entered, go, stop = threading.Event(), threading.Event(), threading.Event()
    first = studio.borrow(lambda pipe, tell: (entered.set(), go.wait(30)), threading.Event())
    next(first)
    assert entered.wait(30)
    waits, leaves = studio.run(ASK, stop), studio.run(ASK, threading.Event())
    assert next(leaves) == Waiting(1)
    leaves.close()  # type: ignore[attr-defined]
    assert next(waits) == Waiting(1)
    stop.set()
    assert events_of(waits)[-1] == Stopped()
    go.set()
    assert isinstance(events_of(first)[-1], Done)
    assert studio.waiting == 0


def test_closing_ends_the_job(model: Path) -> None:
    studio = Studio(str(model), "cpu", options=Options(min_tokens=0))
    job = studio.run(ASK, threading.Event())
    for event in job:
        if event == Step("dense", "generating", 1, 4):
            studio.close()
    assert event == Stopped()
    assert not studio.results.folder.exists()
    assert events_of(studio.run(ASK, threading.Event())) == [Stopped()]


def test_values_that_stand_for_none(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    assert studio.usual().steps == 50, "WanPipeline's own"
    end = events_of(studio.run(replace(ASK, steps=None), threading.Event()))[-1]
    assert isinstance(end, Failed)
    assert "steps must lie between 1 and 24 here, got 50" in end.message
    monkeypatch.setattr(studio_module, "load_pipeline", lambda *args: pytest.fail("loaded twice"))
    studio.usual()


def test_uploads_are_held_against_the_model(studio: Studio, tmp_path: Path) -> None:
    """Before the model is loaded and after: the same answer."""
    fits = replace(Plan.of(TopBlocks(keep=0.3)), model=ModelBinding("WanTransformer3DModel", 2, 2))
    path, other = fits.save(tmp_path / "a"), replace(fits, model=ModelBinding("WanTransformer3DModel", 3, 2))
    bad = other.save(tmp_path / "b")
    for _ in range(2):
        assert studio.read_plan(path, tmp_path) == fits
        with pytest.raises(ValueError, match="3 layers"):
            studio.read_plan(bad, tmp_path)
        studio.usual()
    assert isinstance(events_of(studio.run(replace(ASK, plan=fits), threading.Event()))[-1], Finished)


@pytest.mark.gpu
def test_on_cuda(model: Path) -> None:
    """A job in a worker thread, kernels compiled there; then one that is stopped, and one more."""
    studio = Studio(str(model), "cuda", options=Options(min_tokens=0))
    first = events_of(studio.run(ASK, threading.Event()))[-1]
    assert isinstance(first, Finished)
    assert first.report["sparse"][0]["sparse_calls"] == 16
    stop = threading.Event()
    stopped = events_of(studio.run(ASK, stop), lambda event: stop.set() if isinstance(event, Step) else None)
    assert stopped[-1] == Stopped()
    assert isinstance(events_of(studio.run(ASK, threading.Event()))[-1], Finished)
    assert clean(studio)
    studio.close()
