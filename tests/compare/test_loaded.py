"""A comparison on a pipeline that somebody else holds: stopped anywhere, it is left as it was; the yardstick."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dit_sparse.options import Options
from dit_sparse.patterns import Radial
from dit_sparse.pipelines.enable import disable, enable
from dit_sparse.pipelines.generate import generate, load_pipeline
from dit_sparse.pipelines.hooks import find_hook
from dit_sparse.pipelines.targets import find_targets
from dit_sparse.plan import Plan
from dit_sparse.search.compare import compare, measure_plans
from dit_sparse.search.metrics import measure
from dit_sparse.search.report import to_markdown, validate
from dit_sparse.search.request import Request
from tests.compare.test_compare import JOB, request

PLAN = "topblocks:keep=0.3"


@pytest.fixture(scope="module")
def loaded(tiny_wan: Path) -> Any:
    pipe = load_pipeline(str(tiny_wan), "cpu", "float32")
    pipe.set_progress_bar_config(disable=True, desc="its owner's")
    return pipe


@pytest.fixture
def pipe(loaded: Any) -> Iterator[Any]:
    """Give the pipeline; afterwards it must have the very same processors and no hook of ours."""
    before = {name: id(part) for target in find_targets(loaded) for name, part in target.processors().items()}
    yield loaded
    after = {name: id(part) for target in find_targets(loaded) for name, part in target.processors().items()}
    assert after == before
    assert find_hook(loaded.transformer) is None
    assert not loaded.transformer._forward_pre_hooks
    assert "_dit_sparse" not in vars(loaded)


def test_a_loaded_pipeline_gives_the_same(pipe: Any, tiny_wan: Path, tmp_path: Path) -> None:
    seen: list[str] = []
    here, _ = compare(request(tiny_wan, tmp_path, PLAN), lambda what, *_: seen.append(what), pipe=pipe)
    there, _ = compare(request(tiny_wan, tmp_path, PLAN))
    assert "loading the model" not in seen
    assert pipe._progress_bar_config == {"disable": True, "desc": "its owner's"}
    assert here["sparse"][0]["metrics"] == there["sparse"][0]["metrics"]
    assert here["request"] == there["request"]
    assert here["command"] == there["command"]


def test_pipelines_that_do_not_fit_the_request(pipe: Any, tiny_wan: Path, tmp_path: Path) -> None:
    asked = request(tiny_wan, tmp_path, PLAN)
    with pytest.raises(ValueError, match="transformer is in float32, and dtype is bfloat16"):
        measure_plans(replace(asked, dtype="bfloat16"), pipe=pipe)
    with pytest.raises(ValueError, match="pipeline is on cpu, and device is meta"):
        measure_plans(replace(asked, device="meta"), pipe=pipe)
    enable(pipe, "radial", min_tokens=0)
    try:
        with pytest.raises(ValueError, match="enabled on this pipeline"):
            measure_plans(asked, pipe=pipe)
    finally:
        disable(pipe)


def test_known_plans_are_not_read_again(
    pipe: Any, tiny_wan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(spec: object) -> Plan:
        raise AssertionError(f"{spec} was read")

    monkeypatch.setattr("dit_sparse.search.request.parse_spec", refuse)
    known = {"mine.json": Plan.of(Radial(kind="block"))}
    found = measure_plans(request(tiny_wan, tmp_path, "mine.json"), pipe=pipe, plans=known)
    (run,) = found.report["sparse"]
    assert (run["name"], run["spec"]) == ("mine", "mine.json")
    assert run["plan"] == known["mine.json"].to_dict()
    assert run["sparse_calls"] == 16


class EnoughError(Exception):
    pass


STAGES = ("dense: warm-up", "dense", "dense: timing attention", "topblocks-keep-0.3")
LATER = ("topblocks-keep-0.3: timing attention", "topblocks-keep-0.3: monitoring", "another seed", "measuring")


@pytest.mark.parametrize("stage", STAGES + LATER)
def test_stopped_anywhere_it_is_clean(stage: str, pipe: Any, tiny_wan: Path, tmp_path: Path) -> None:
    """Whatever progress raises comes out, nothing is written, and the next clip is dense bit for bit."""
    wanted = generate(pipe, JOB).frames
    asked = replace(request(tiny_wan, tmp_path, PLAN), yardstick=True, options=Options(min_tokens=0, monitor=True))
    last = stage == "measuring"

    for error, raised in ((EnoughError("enough"), EnoughError), (KeyboardInterrupt(), KeyboardInterrupt),
                          (ValueError("odd"), RuntimeError)):  # fmt: skip

        def stop(what: str, done: int, total: int, error: BaseException = error) -> None:
            if what == stage and (done == 1 or last):
                raise error

        with pytest.raises(raised):
            compare(asked, stop, pipe=pipe)
        assert not any(tmp_path.iterdir())
        assert np.array_equal(generate(pipe, JOB).frames, wanted)


def test_yardstick(pipe: Any, tiny_wan: Path, tmp_path: Path) -> None:
    """The other seed's clip is measured as anyone can do it by hand; a report without it stays valid."""
    asked = replace(request(tiny_wan, tmp_path, PLAN), yardstick=True)
    report, _ = compare(asked, pipe=pipe)
    clips = [generate(pipe, replace(JOB, seed=seed)).frames for seed in (JOB.seed, JOB.seed ^ 1)]
    assert report["yardsticks"] == {"another seed": asdict(measure(*clips))}
    assert report["yardsticks"]["another seed"]["psnr_db"] < 60
    assert "--yardstick" in report["command"]
    text = to_markdown(report)
    assert f"| another seed | {report['yardsticks']['another seed']['psnr_db']:.1f} |" in text

    old = copy.deepcopy(report)
    del old["yardsticks"]
    validate(old)
    assert "another seed" not in to_markdown(old)
    old["yardsticks"] = {"another seed": {"psnr_db": 20.0}}
    with pytest.raises(ValueError, match="yardsticks/another seed"):
        validate(json.loads(json.dumps(old)))


def test_no_yardstick_unless_asked_for(tiny_wan: Path, tmp_path: Path) -> None:
    asked = Request(JOB, (PLAN,), tmp_path, str(tiny_wan), "cpu")
    seen: list[str] = []
    report, _ = compare(asked, lambda what, *_: seen.append(what))
    assert "yardsticks" not in report
    assert "another seed" not in seen
