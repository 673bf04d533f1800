"""The kernel benchmark's frame: what hangs or dies costs its own figures only, and the table is what it says."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from dit_sparse.cli import build_app
from dit_sparse.search import kernel_bench
from dit_sparse.search.kernel_bench import Request, run_gates, run_units, units_of
from dit_sparse.search.kernel_job import GATE_SHARES, Spec
from dit_sparse.search.kernel_sections import SECTIONS
from dit_sparse.search.kernel_shapes import SHAPES

# Stands for the real process: does as the names of its units say.
WORKER = """
import json, sys, time
spec = json.loads(sys.argv[1])
excluded = [tuple(one) for one in spec["excluded"]]
lines = open(spec["lines"], "a")
def tell(unit, kind, **more):
    lines.write(json.dumps({"section": spec["section"], "unit": unit, "kind": kind, **more}) + "\\n")
    lines.flush()
for unit in spec["units"]:
    if unit == "dies at once":
        sys.exit("no such thing")
    tell(unit, "begin")
    for name in ("one", "two"):
        if (unit, name) not in excluded:
            tell(unit, "contender", contender=name)
            if unit == f"hangs in {name}":
                time.sleep(60)
            if unit == f"dies in {name}":
                sys.exit(3)
            tell(unit, "gate", passed=unit != "bad:bfloat16:1", case=name)
    if unit == "dies whoever is excluded":
        tell(unit, "contender", contender="replayed")
        sys.exit(3)
    tell(unit, "contender", contender="all: one, two")
    if unit == "hangs while timed":
        time.sleep(60)
    tell(unit, "row", contender="one")
    tell(unit, "end")
"""
COMMAND = (sys.executable, "-c", WORKER)
SILENCE = 3.0  # seconds; starting the process counts


def run(*units: str, seconds: float = 60.0, again: bool = True) -> list[dict[str, Any]]:
    heard: list[dict[str, Any]] = []
    spec = Spec("full", units, (), 1, "")
    run_units(spec, SILENCE, time.monotonic() + seconds, heard.append, COMMAND, again)
    return heard


def rows(events: list[dict[str, Any]]) -> list[str]:
    return [event["unit"] for event in events if event["kind"] == "row"]


def test_a_contender_that_hangs_is_left_out_and_all_else_is_measured() -> None:
    begin = time.monotonic()
    events = run("before", "hangs in two", "after")
    assert time.monotonic() - begin < 30, "it was not waited for"
    assert rows(events) == ["before", "hangs in two", "after"]
    (failed,) = [event for event in events if event["kind"] == "failed"]
    assert (failed["unit"], failed["contender"]) == ("hangs in two", "two")
    assert failed["reason"] == "it said nothing for 3 s"


def test_a_process_that_dies_costs_what_it_did_and_nothing_else() -> None:
    events = run("dies in one", "after")
    assert rows(events) == ["dies in one", "after"]
    (failed,) = [event for event in events if event["kind"] == "failed"]
    assert failed["reason"].startswith("exit code 3")
    events = run("dies at once", "after")
    assert [event["kind"] for event in events] == ["failed", "left_out"]
    assert "no such thing" in events[0]["reason"]
    assert events[1]["reason"] == "its process does not start"


def test_a_unit_that_hangs_while_all_are_timed_is_given_up() -> None:
    events = run("hangs while timed", "after")
    assert rows(events) == ["after"]


def test_a_unit_that_fails_twice_in_the_same_place_is_given_up() -> None:
    events = run("dies whoever is excluded", "after")
    assert [event["contender"] for event in events if event["kind"] == "failed"] == ["replayed", "replayed"]
    assert rows(events) == ["after"]


def test_what_has_no_time_left_is_named() -> None:
    events = run("one", "two", seconds=-1.0)
    assert [(event["kind"], event["unit"]) for event in events] == [("left_out", "one"), ("left_out", "two")]


def test_backends_of_ours_are_timed_only_if_their_gate_is_clean(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_bench, "GATED", ("good", "bad"))
    heard: list[dict[str, Any]] = []
    request = Request((), silence_seconds=SILENCE)
    usable = run_gates(("good", "bad", "peer"), request, time.monotonic() + 60, heard.append, COMMAND)
    assert usable == ["good", "peer"]
    shares = {f"{name}:bfloat16:{share}" for name in ("good", "bad") for share in range(GATE_SHARES)}
    assert {event["unit"] for event in heard if event["kind"] == "gate"} == shares


def test_spec_travels_as_text() -> None:
    spec = Spec("full", ("a@0.1", "b"), ("hopper",), 5, "/somewhere", (("a@0.1", "fa4"),), "cpu")
    assert Spec.parse(spec.to_json()) == spec


def test_every_section_of_the_issue_is_in_the_table() -> None:
    assert [name for name, section in SECTIONS.items() if section.usual] == [
        "full", "partial", "ragged", "uneven", "compensation", "selection", "host", "dense",
    ]  # fmt: skip
    cells = set(SECTIONS["full"].units)
    for shape in ("wan_480p", "wan_720p", "hunyuan"):
        assert {f"{shape}@{density}" for density in (0.25, 0.1, 0.05)} <= cells
    assert {"cogvideox@0.25", "ltx@0.25"} <= cells
    assert {f"{shape}@1.0" for shape in SHAPES} == set(SECTIONS["dense"].units)


def test_units_are_those_asked_for() -> None:
    everything = units_of(Request(()))
    assert "launches" not in everything
    assert "launches" in units_of(Request((), variants=True))
    some = units_of(Request(("full", "partial"), ("wan_480p",), (0.1, 0.05)))
    assert some == {"full": ("wan_480p@0.1", "wan_480p@0.05"), "partial": ("wan_480p",)}
    assert units_of(Request(("uneven",), (), (0.1,))) == {"uneven": SECTIONS["uneven"].units}, "layers, not densities"


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("-s", "fulls"), "'fulls'"),
        (("--shape", "wan9"), "'wan9'"),
        (("-b", "cuda"), "'cuda'"),
        (("-s", "full", "--density", "0.3"), "no section has a unit"),
    ],
)
def test_what_is_unknown_is_a_usage_error(words: tuple[str, ...], named: str) -> None:
    result = CliRunner().invoke(build_app(), ["bench", "kernels", *words])
    assert result.exit_code == 2, result.output
    assert named in result.stderr


def test_without_a_gpu_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = CliRunner().invoke(build_app(), ["bench", "kernels", "--out", str(tmp_path / "kernels.json")])
    assert result.exit_code == 1, result.output
    assert "GPU" in result.stderr
    assert not list(tmp_path.iterdir())


def test_the_command_writes_json_lines_and_a_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(request: Request, hear: Any) -> None:
        gate = {"backend": "hopper", "dtype": "bfloat16", "case": "full", "passed": True}
        hear({"kind": "gate", "section": "gate", "unit": "hopper:bfloat16", **gate})
        for name, ms in (("cudnn dense", 10.0), ("hopper", 2.0)):
            hear(
                {"kind": "row", "section": "full", "unit": "wan_480p@0.25", "contender": name, "ms": ms, "ms_low": ms,
                 "ms_high": ms, "rounds": request.rounds, "repeats": 1, "sm_mhz": None, "watts": None, "celsius": None,
                 "error": 0.0, "allowed": 1.0, "numbers": {"pairs": 3.2e9, "density": 0.25, "head_dim": 128.0}}
            )  # fmt: skip
        hear({"kind": "failed", "section": "host", "unit": "wan_480p", "contender": "fa4", "reason": "it hung"})

    monkeypatch.setattr(kernel_bench, "bench_kernels", measured)
    out = tmp_path / "new" / "kernels.json"
    result = CliRunner().invoke(build_app(), ["bench", "kernels", "--rounds", "3", "--out", str(out)])
    assert result.exit_code == 1, "something failed"
    assert "failed: host wan_480p fa4: it hung" in result.stderr
    assert sorted(path.name for path in out.parent.iterdir()) == ["kernels.json", "kernels.jsonl", "kernels.png"]
    lines = [json.loads(line) for line in out.with_suffix(".jsonl").read_text().splitlines()]
    assert [line["kind"] for line in lines] == ["gate", "row", "row", "failed"]
    report = json.loads(out.read_text())
    assert [row["realised"] for row in report["rows"]] == [1.0, 1.25]
    assert report["rows"][0]["rounds"] == 3
