"""The report of a search: its schema, its table, its Markdown, its one line."""

from __future__ import annotations

import random
import re
from collections.abc import Callable

import pytest

from dit_sparse.search.planner.points import front, gate_line, gate_text
from dit_sparse.search.planner.report import HEADINGS, table_rows, to_html, to_json, to_markdown, validate, verdict_line
from tests.search.made_reports import EVIL, Report, capped, made, pictures


@pytest.fixture
def report() -> Report:
    return made(random.randrange(2**32))


def test_markdown_escapes(report: Report) -> None:
    report |= {"why": EVIL, "notes": [EVIL], "created": EVIL}
    report["request"] |= {"model": EVIL, "backend": EVIL, "specs": [EVIL]}
    report["request"]["gate"][EVIL] = 3.0
    report["request"]["held_out_prompts"] = [EVIL for _ in report["request"]["held_out_prompts"]]
    for point in report["points"]:
        point["name"] = EVIL
    text = to_markdown(report).partition("## Environment")[0]
    assert r"\<script\>alert(" in text
    assert not re.search(r"(?<!\\)[<>`]", text)
    rows = [line for line in text.splitlines() if line.startswith("| ")][: len(report["points"]) + 3]
    assert all(len(re.findall(r"(?<!\\)\|", row)) == len(HEADINGS) + 1 for row in rows)


def test_front_is_that_of_the_definition() -> None:
    for _ in range(50):
        places = [(random.randint(0, 6) / 2, random.choice([random.randint(0, 6), float("inf")])) for _ in range(25)]

        def dominated(i: int, places: list[tuple[float, float]] = places) -> bool:
            return any(x >= places[i][0] and y >= places[i][1] and (x, y) != places[i] for x, y in places)

        found = front(places)
        assert sorted(found) == [i for i in range(len(places)) if not dominated(i)]
        assert [places[i][0] for i in found] == sorted(places[i][0] for i in found)


def test_lpips_is_shown_where_it_was_measured(report: Report) -> None:
    point = report["points"][report["chosen"]]
    point["measured"]["lpips"] = {"mean": 0.1234567, "low": 0.1, "high": 0.2, "worst": 0.3456789}
    chosen = next(row for row in table_rows(report) if row[0].endswith("(chosen)"))
    assert chosen[HEADINGS.index("LPIPS")] == "0.123"
    assert "| LPIPS | 0.1235 | 0.1000 to 0.2000 | 0.3457 |" in to_markdown(report)
    assert "| another seed | 14.2 | 0.500 | 0.625 |" in to_markdown(report)
    assert "| another dense kernel | 45.5 | – | – |" in to_markdown(report), "a report of an older version has no key"
    assert all(number in to_html(report, pictures()) for number in ("0.1235", "0.3457", "0.625"))
    point["measured"]["lpips"] = None
    assert "\n| LPIPS |" not in to_markdown(report)
    assert next(r for r in table_rows(report) if r[0].endswith("(chosen)"))[HEADINGS.index("LPIPS")] == "–"


def test_table(report: Report) -> None:
    rows = table_rows(report)
    assert {len(row) for row in rows} == {len(HEADINGS)}
    speeds = [report["dense"]["attention_seconds"] / p["measured"]["attention_seconds"] for p in report["points"]]
    order = sorted(range(len(speeds)), key=lambda i: -speeds[i])
    assert [row[0].removesuffix(" (chosen)") for row in rows] == [report["points"][i]["name"] for i in order]
    for row, i in zip(rows, order, strict=True):
        point = report["points"][i]
        found = point["measured"]
        assert row[0].endswith(" (chosen)") == (i == report["chosen"])
        assert row[2] == f"{speeds[i]:.2f}×"
        assert row[3] == f"{point['predicted_speedup']:.2f}×"
        assert row[4] == f"{80 / found['seconds']:.2f}×"
        assert row[5:9] == (f"{point['density']:.3f}", f"{point['run_density']:.3f}",
                            f"{found['psnr_db']['mean']:.1f}", f"{found['psnr_db']['worst']:.1f}")  # fmt: skip
        assert row[-1] == ("passes" if found["passes"] else "fails")


def test_gate_in_words(report: Report) -> None:
    capped(report)
    assert gate_text(report) == "worst SSIM at least 0.9, mean flicker at most 0.02, mean of_tomorrow bounded by 1"
    identical = [point["name"] for point in report["points"][::2]]
    for row in table_rows(report):
        assert (row[7:9] == ("identical", "identical")) == (row[0].removesuffix(" (chosen)") in identical)


def test_verdict_line() -> None:
    report = made(1)
    point = report["points"][report["chosen"]]
    report["request"]["held_out_prompts"][1] = 'a "red" ball that bounces and bounces over a very long road'
    point["predicted_speedup"] = 1.5
    point["measured"] |= {"attention_seconds": 25.0, "seconds": 64.0, "worst_prompt": 1, "passes": True}
    point["measured"]["psnr_db"] |= {"mean": 27.44, "worst": 22.06}
    quoted = '"a "red" ball that bounces and bounces …"'
    told = f"1.60x attention (1.25x end to end) at 27.4 dB, worst prompt 2 {quoted} 22.1 dB"
    assert verdict_line(report) == f"gate met: {told}"
    assert verdict_line({**report, "verdict": "not met", "why": "too\nslow"}) == f"gate not met: {told}; too slow"
    report["dense"] |= {"attention_seconds": None, "seconds": None}
    assert verdict_line(report).startswith("gate met: predicted 1.50x attention at 27.4 dB")
    point["measured"] |= {"identical": True, "psnr_db": None}
    assert verdict_line(report) == "gate met: predicted 1.50x attention, identical to dense"
    point["measured"] = None
    report |= {"verdict": "unverified", "why": "no time left"}
    assert verdict_line(report) == "gate unverified: predicted 1.50x attention, nothing rendered; no time left"
    assert verdict_line({**report, "chosen": None}) == "gate unverified: nothing chosen; no time left"


def test_markdown_holds_what_counts(report: Report) -> None:
    text = to_markdown(report)
    lines = text.splitlines()
    table = [line for line in lines if line.startswith("| ")][: len(report["points"]) + 3]
    assert [i for i, line in enumerate(table) if "*gate: " in line] == [gate_line(report)[0] + 2]
    for expected in (report["command"], "- a note", "14.2", "45.5", "## Mean density", "1. prompt 0", "32,760 tokens"):
        assert expected in text, expected


@pytest.mark.parametrize(
    ("break_it", "place"),
    [
        (lambda r: r.update(schema_version=2), "schema_version"),
        (lambda r: r.pop("why"), "the report: 'why'"),
        (lambda r: r.update(surprise=1), "surprise"),
        (lambda r: r["points"][2].update(density=1.2), "points/2/density"),
        (lambda r: r["yardsticks"].update(other={"psnr_db": 1.0, "ssim": None}), "other"),
        (lambda r: r["points"][0]["measured"].update(seconds=float("nan")), "points/0/measured/seconds"),
        (lambda r: r["dense"].update(seconds=float("inf")), "infinite or NaN.*dense/seconds"),
        (lambda r: r.update(chosen=9), "/chosen must be the number of one of 9 points, from 0, got 9"),
        (lambda r: r["points"][1]["measured"].update(worst_prompt=50), "/points/1/measured/worst_prompt must"),
        (lambda r: r["points"][1]["measured"]["clips"][1].update(prompt=50), "/points/1/measured/clips/1/prompt must"),
        (lambda r: r["map"][3].update(group=4), "/map/3/group must be the number of one of 4 step groups"),
        (lambda r: r["sensitivity"].update(by_group=[0.1] * 5), "/sensitivity/by_group"),
        (lambda r: r["request"].update(step_edges=[0.0, 0.6, 0.5, 1.0]), "step_edges: step edges must rise"),
    ],
)  # a wrong version, a missing, an unknown and an out-of-range field, numbers JSON lacks, dangling references
def test_refusals(break_it: Callable[[Report], object], place: str, report: Report) -> None:
    validate(report)
    break_it(report)
    for write in (validate, to_json, lambda r: to_html(r, pictures())):
        with pytest.raises(ValueError, match=f"report.*{place}"):
            write(report)
