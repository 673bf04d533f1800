"""What the kernel benchmark makes of its rows: goals, tables, picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dit_sparse.search.kernel_findings import OWN
from dit_sparse.search.kernel_picture import COLOURS, draw_realised
from dit_sparse.search.kernel_report import (
    FINDING_HEADINGS,
    ROW_HEADINGS,
    failure_lines,
    finding_cells,
    row_cells,
    sound,
    to_json,
)

GATE = {"kind": "gate", "section": "gate", "unit": "", "backend": "hopper", "dtype": "bfloat16", "case": "full"}


def row(section: str, unit: str, contender: str, ms: float, **numbers: float) -> dict[str, Any]:
    return {
        "kind": "row", "section": section, "unit": unit, "contender": contender, "ms": ms, "ms_low": 0.9 * ms,
        "ms_high": 1.1 * ms, "rounds": 5, "repeats": 2, "sm_mhz": 1755.0, "watts": 600.0, "celsius": 50.0,
        "error": 1e-4, "allowed": 1e-3, "numbers": numbers,
    }  # fmt: skip


def found(events: list[dict[str, Any]], what: str, contender: str = "hopper") -> list[dict[str, Any]]:
    return [one for one in to_json(events)["findings"] if one["what"] == what and one["contender"] == contender]


def test_speed_is_compared_with_fa4_in_every_cell() -> None:
    wide, narrow = {"pairs": 1e9, "density": 0.25, "head_dim": 128.0}, {"pairs": 1e9, "density": 1.0, "head_dim": 64.0}
    events = [
        row("full", "a@0.25", "hopper", 2.0, **wide), row("full", "a@0.25", "fa4", 2.2, **wide),
        row("full", "b@0.25", "hopper", 2.0, **wide), row("full", "b@0.25", "fa4", 1.98, **wide),
        row("dense", "a@1.0", "hopper", 10.0, **wide), row("dense", "a@1.0", "fa4 dense", 9.8, **wide),
        row("dense", "c@1.0", "hopper", 10.0, **narrow), row("dense", "c@1.0", "fa4 dense", 9.8, **narrow),
        row("full", "d@0.25", "hopper", 10.0, **wide),  # nobody to compare with
    ]  # fmt: skip
    speeds = {one["unit"]: (round(one["measured"], 3), one["met"]) for one in found(events, "speed over fa4")}
    assert speeds == {"a@0.25": (1.1, True), "b@0.25": (0.99, False), "a@1.0": (0.98, True), "c@1.0": (0.98, False)}
    (mean,) = found(events, "speed over fa4, geometric mean")
    assert mean["measured"] == pytest.approx((1.1 * 0.99) ** 0.5)
    assert not mean["met"]


def test_realised_fraction_and_flops_count_kept_pairs_only() -> None:
    numbers = {"pairs": 2.5e9, "density": 0.25, "head_dim": 128.0}
    events = [row("full", "a@0.25", name, ms, **numbers) for name, ms in (("cudnn dense", 8.0), ("hopper", 2.5))]
    dense, sparse = to_json(events)["rows"]
    assert (dense["realised"], sparse["realised"]) == (1.0, 0.8)
    assert dense["tflops"] == pytest.approx(4 * 1e10 * 128 / 8e-3 / 1e12)
    assert sparse["tflops"] == pytest.approx(4 * 2.5e9 * 128 / 2.5e-3 / 1e12)
    (one,) = found(events, "realised fraction of cuDNN × density")
    assert (one["measured"], one["met"]) == (0.8, False)


def test_costs_of_masks_short_blocks_uneven_heads_and_means() -> None:
    some = {"density": 0.25, "head_dim": 128.0}
    events = [
        row("partial", "u", "hopper", 2.2, masked_share=0.8), row("partial", "u", "hopper whole", 2.0),
        row("ragged", "u", "hopper", 2.0, pairs=90.0, **some),
        row("ragged", "u", "hopper even", 2.0, pairs=100.0, **some),
        row("uneven", "u", "hopper", 2.0, pairs=95.0, **some),
        row("uneven", "u", "hopper even", 2.0, pairs=100.0, **some),
        row("compensation", "u", "hopper", 2.0, kept_blocks=20.0, pooled_blocks=2.0),
        row("compensation", "u", "hopper means", 2.28, kept_blocks=20.0, pooled_blocks=2.0),
    ]  # fmt: skip
    (masked,) = found(events, "masked block over full block")
    assert masked["measured"] == pytest.approx(1.125)  # .2 full blocks at 1, .8 masked ones make 1.1 in the mean
    (ragged,) = found(events, "time per pair over the even grid")
    assert ragged["measured"] == pytest.approx(1 / 0.9)
    assert not ragged["met"]
    (uneven,) = found(events, "throughput over even heads")
    assert uneven["measured"] == pytest.approx(0.95)
    assert uneven["met"]
    (means,) = found(events, "compensation's share on top")
    assert means["measured"] == pytest.approx(0.14)
    assert means["goal"] == pytest.approx(0.15)
    assert means["met"]


def test_selection_is_held_against_the_kernel_that_it_feeds() -> None:
    events = [
        row("selection", "wan_720p", "keep=0.25 choose", 2.0), row("selection", "wan_720p", "keep=0.25 hopper", 40.0),
        row("selection", "wan_720p", "keep=0.25 choose replayed", 1.4),
        row("selection", "wan_720p", "keep=0.25 pool", 1.0),
    ]  # fmt: skip
    (replayed,) = found(events, "selection, ms", "keep=0.25 choose replayed")
    assert (replayed["measured"], replayed["met"]) == (1.4, True)
    (share,) = found(events, "selection over its kernel", "keep=0.25 choose replayed / hopper")
    assert share["measured"] == pytest.approx(0.035)
    (eager,) = found(events, "selection over its kernel", "keep=0.25 choose / hopper")
    assert eager["met"] is None


def test_a_second_try_replaces_rows_and_tables_have_a_cell_for_each_heading() -> None:
    numbers = {"pairs": 1e9, "density": 0.1, "head_dim": 128.0}
    events = [
        row("full", "wan_480p@0.1", "triton", 9.0, **numbers), row("full", "wan_480p@0.1", "triton", 1.0, **numbers),
        row("full", "wan_480p@0.1", "flex", 1.5, **numbers), row("host", "wan_480p", "triton", 1.0, host_us=40.0),
    ]  # fmt: skip
    report = to_json(events)
    assert [one["ms"] for one in report["rows"]] == [1.0, 1.5, 1.0]
    assert {len(cells) for cells in row_cells(report)} == {len(ROW_HEADINGS)}
    cells = finding_cells(report)
    assert {len(one) for one in cells} == {len(FINDING_HEADINGS)}
    by_name = {one[0]: one for one in cells}
    assert by_name["TFLOP/s"][2:6] == ["≥ 480", "512.000", "wan_480p@0.1", "1/1"]
    assert by_name["speed over FlexAttention"][3] == "1.500"
    assert "host µs of a launch" not in by_name, "no goal, so it is in the JSON alone"


def test_a_run_is_sound_only_if_all_of_it_is() -> None:
    good, bad = {**GATE, "passed": True}, {**GATE, "passed": False, "error": "ValueError: off"}
    hung = {"kind": "failed", "section": "full", "unit": "a@0.1", "contender": "fa4", "reason": "it said nothing"}
    absent = {"kind": "refused", "section": "gate", "unit": "fa4", "contender": "fa4", "reason": "not installed"}
    assert sound(to_json([good, absent]))
    assert not sound(to_json([absent]))
    assert sound(to_json([row("full", "a@0.25", "fa4", 1.0, pairs=1e9, density=0.25, head_dim=128.0)]))
    assert not sound(to_json([good, bad]))
    assert not sound(to_json([good, hung]))
    case = {**GATE, "kind": "gate_refused", "reason": "head_dim 72"}
    lines = failure_lines(to_json([good, bad, hung, absent, absent, case]))
    assert lines == [
        "gate failed: hopper bfloat16 full: ValueError: off",
        "not run: gate fa4 fa4: not installed",
        "failed: full a@0.1 fa4: it said nothing",
    ]


def test_the_picture_has_a_bar_of_each_contender_in_its_height(tmp_path: Path) -> None:
    numbers = {"pairs": 1e9, "density": 0.5, "head_dim": 128.0}
    times = {"cudnn dense": 4.0, "hopper": 2.0, "triton": 4.0, "flex": 8.0}
    events = [row("full", "a@0.5", name, ms, **numbers) for name, ms in times.items()]
    path = tmp_path / "picture.png"
    assert draw_realised(to_json(events)["rows"], path)
    picture = Image.open(path).convert("RGB")
    pixels = [picture.getpixel((x, y)) for x in range(picture.width) for y in range(80, picture.height)]

    def painted(name: str) -> int:
        colour = tuple(int(COLOURS[name][at : at + 2], 16) for at in (1, 3, 5))
        return sum(pixel == colour for pixel in pixels)

    assert painted("hopper") == pytest.approx(painted("cudnn dense"), rel=0.02)
    assert painted("triton") == pytest.approx(painted("hopper") / 2, rel=0.02)
    assert painted("flex") == pytest.approx(painted("hopper") / 4, rel=0.04)
    assert painted("fa4") == 0
    assert not draw_realised([], tmp_path / "none.png")
    assert set(OWN) <= set(COLOURS)
