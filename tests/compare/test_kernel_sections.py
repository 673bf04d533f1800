"""Every section of the kernel benchmark, walked on the CPU with a small kernel in place of the GPU's, times made up."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from dit_sparse.grid import Grid
from dit_sparse.kernels import contenders, cpu, lists, timing
from dit_sparse.kernels.contenders import Contender, Inputs
from dit_sparse.search import kernel_job, kernel_launches, kernel_sections, kernel_selection, kernel_shapes
from dit_sparse.search.kernel_job import Entry, Job, Spec, line_writer
from dit_sparse.search.kernel_launches import label
from dit_sparse.search.kernel_sections import SECTIONS
from dit_sparse.search.kernel_shapes import GRIDS, SHAPES, Shape, blocks_of, even_inputs, pairs_of

Event = dict[str, Any]


def attend_lists(
    q: Tensor, k: Tensor, v: Tensor, indices: Any, given: Any, scale: float, lengths: Any, launch: Any, means: Any
) -> Any:
    return cpu.attention(q, k, v, indices, scale, lengths, means is not None)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the CPU backend count as one of our own, and shrink every shape."""
    pytest.importorskip("triton")  # the sections compact with its kernel, which is replaced here
    from dit_sparse.kernels import triton_lists

    torch.set_num_threads(1)
    module = SimpleNamespace(attend_lists=attend_lists, block_means=lambda *call: call)
    for place in (contenders, kernel_launches):
        monkeypatch.setattr(place, "own_module", lambda backend: module)
    for name in list(contenders.OWN):
        monkeypatch.delitem(contenders.OWN, name)
    monkeypatch.setitem(contenders.OWN, "cpu", "cpu")
    monkeypatch.setattr(triton_lists, "compact", lists.compact)
    monkeypatch.setattr(timing, "milliseconds", lambda call, repeats: (call(), 3.0)[1])
    for name in ("captured", "host_seconds"):
        fake = {
            "captured": lambda call: (SimpleNamespace(replay=lambda: None), call()),
            "host_seconds": lambda call: 1e-5,
        }
        monkeypatch.setattr(kernel_selection, name, fake[name])
    for name, shape in SHAPES.items():
        tokens = 640 + (32 if name == "ltx" else 0)
        monkeypatch.setitem(kernel_shapes.SHAPES, name, Shape(3, tokens, shape.head_dim, shape.densities))
    for name in GRIDS:
        monkeypatch.setitem(kernel_shapes.GRIDS, name, (Grid(5, 9, 14), 2))
    monkeypatch.setattr(kernel_sections, "EVEN_GRID", Grid(4, 8, 16))
    monkeypatch.setattr(kernel_launches, "HOPPER", kernel_launches.TRITON)


def walk(section: str, unit: str, excluded: tuple[tuple[str, str], ...] = ()) -> list[Event]:
    heard: list[Event] = []
    spec = Spec(section, (unit,), ("cpu",), 3, "", excluded, "cpu")
    with torch.no_grad():
        SECTIONS[section].run(unit, Job(spec, unit, heard.append, []))
    return heard


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    ("section", "unit", "expected"),
    [
        ("full", "wan_480p@0.25", {"cpu", "cpu call"}),
        ("dense", "ltx@1.0", {"cpu"}),  # a last block of fewer tokens
        ("partial", "wan_480p", {"cpu", "cpu whole"}),
        ("ragged", "wan_720p", {"cpu", "cpu even"}),
        ("uneven", "wan_720p@30", {"cpu", "cpu even"}),
        ("compensation", "wan_480p@0.25", {"cpu", "cpu means"}),
        ("host", "wan_480p", {"cpu", "cpu call", "cpu replayed", "cpu call replayed"}),
        ("launches", "cogvideox@0.25", {"cpu", *(f"cpu {label(one)}" for one in kernel_launches.TRITON[64])}),
    ],
)  # fmt: skip
def test_each_section_tells_a_row_for_all_who_can(section: str, unit: str, expected: set[str]) -> None:
    heard = walk(section, unit)
    assert [event for event in heard if event["kind"] == "error"] == []
    rows = {event["contender"]: event for event in heard if event["kind"] == "row"}
    assert set(rows) == expected
    assert all(row["error"] <= row["allowed"] for row in rows.values() if row["error"] is not None)
    refused = {event["contender"] for event in heard if event["kind"] == "refused"}
    if section in ("full", "dense", "host", "launches"):
        assert "cudnn dense" in refused, "there is no GPU, and it says so"


@pytest.mark.usefixtures("small")
def test_selection_tells_of_every_selector_and_of_replays() -> None:
    heard = walk("selection", "wan_480p")
    assert [event for event in heard if event["kind"] == "error"] == []
    rows = [event for event in heard if event["kind"] == "row"]
    parts = ("choose", "pool", "compact", "choose replayed", "cpu")
    assert [row["contender"] for row in rows] == [
        f"{one} {part}" for one in kernel_selection.SELECTORS for part in parts
    ]
    assert all(row["numbers"]["replay_agrees"] == 1.0 for row in rows)


@pytest.mark.usefixtures("small")
def test_uneven_heads_and_even_ones_visit_as_many_blocks() -> None:
    rows = [event for event in walk("uneven", "wan_480p@10") if event["kind"] == "row"]
    assert rows[0]["numbers"]["pairs"] == rows[1]["numbers"]["pairs"]


@pytest.mark.usefixtures("small")
def test_who_hung_before_and_who_is_wrong_has_no_figure() -> None:
    heard = walk("full", "wan_480p@0.25", (("wan_480p@0.25", "cpu call"),))
    assert {event["contender"] for event in heard if event["kind"] == "row"} == {"cpu"}
    told: list[Event] = []
    inputs = even_inputs(SHAPES["wan_480p"], [2] * 3, "cpu")
    wrong = Contender("wrong", lambda inputs: None, lambda inputs: lambda: torch.zeros_like(inputs.q))
    spec = Spec("full", ("u",), (), 1, "", (), "cpu")
    Job(spec, "u", told.append, []).measure([Entry(wrong, inputs)], {})
    (error,) = [event for event in told if event["kind"] == "error"]
    assert "rows differ from FP64" in error["error"]
    assert not [event for event in told if event["kind"] == "row"]


@pytest.mark.usefixtures("small")
def test_pairs_and_masked_blocks_are_counted() -> None:
    inputs = even_inputs(SHAPES["ltx"], [2, 3, 6], "cpu")  # 5 blocks of 128 and one of 32
    kept = inputs.indices.token_mask(0).sum() + inputs.indices.token_mask(1).sum() + inputs.indices.token_mask(2).sum()
    assert pairs_of(inputs) == float(kept)
    visited, masked = blocks_of(inputs)
    assert visited == 6 * (2 + 3 + 6)
    assert masked == float(inputs.indices.block_mask()[..., -1].sum())


def test_a_gate_tells_refusals_and_failures(monkeypatch: pytest.MonkeyPatch) -> None:
    from dit_sparse.kernels.backends import BACKENDS

    torch.set_num_threads(1)
    heard: list[Event] = []
    spec = Spec("gate", ("cpu:float32:0",), (), 0, "", (), "cpu")
    for share in range(kernel_job.GATE_SHARES):
        kernel_job.gate(f"cpu:float32:{share}", Job(spec, "cpu:float32", heard.append, []))
    cases = [event for event in heard if event["kind"] == "gate"]
    assert len(cases) == len(kernel_job.CASES)
    assert all(event["passed"] for event in cases)
    json.dumps(cases)
    heard.clear()
    kernel_job.gate("fa4:bfloat16:0", Job(spec, "fa4:bfloat16", heard.append, []))
    assert {event["kind"] for event in heard} == {"contender", "gate_refused"}
    heard.clear()

    def broken(*call: Any) -> Any:
        raise RuntimeError("no kernel")

    monkeypatch.setitem(BACKENDS, "cpu", BACKENDS["reference"].__class__("cpu", BACKENDS["cpu"].refusal, broken, True))
    kernel_job.gate("cpu:float32:0", Job(spec, "cpu:float32", heard.append, []))
    assert not any(event["passed"] for event in heard if event["kind"] == "gate")


def test_lines_are_whole_and_say_where_they_belong(tmp_path: Path) -> None:
    path = str(tmp_path / "lines.jsonl")
    first, second = line_writer(path, section="a", unit="b"), line_writer(path, section="c", unit="d")
    first({"kind": "begin"})
    second({"kind": "row", "ms": 1.5})
    found = [json.loads(line) for line in Path(path).read_text().splitlines()]
    assert found == [
        {"section": "a", "unit": "b", "kind": "begin"}, {"section": "c", "unit": "d", "kind": "row", "ms": 1.5},
    ]  # fmt: skip


def test_the_head_densities_are_those_of_a_layer() -> None:
    found = json.loads(kernel_sections.HEAD_DENSITIES.read_text())
    for unit in SECTIONS["uneven"].units:
        heads = found["kept95"][unit.split("@")[1]]
        assert len(heads) == 40
        assert all(0.0 <= share <= 1.0 for share in heads)
        assert max(heads) > 3 * sum(heads) / 40 * 0.7, "uneven"
    assert "source" in found


def test_inputs_know_their_scale() -> None:
    inputs = even_inputs(Shape(1, 256, 64, ()), [1], "cpu")
    assert isinstance(inputs, Inputs)
    assert inputs.scale == 0.125
