"""The sweep's table, plot and page, against a slow front and a strict reader."""

from __future__ import annotations

import copy
import math
import random
import re
from pathlib import Path
from typing import Any

import pytest

from dit_sparse.app.sweep import (
    ACROSS,
    HEADINGS,
    headline,
    not_dominated,
    pareto,
    points_of,
    sweep_page,
    sweep_rows,
    write_sweep,
)
from dit_sparse.search.report import validate
from tests.app.made import STORED, made_report
from tests.search.made_reports import EVIL, Page

BY = sorted(ACROSS)


@pytest.fixture(params=[1, 3, 25])  # one plan, as usual, crowded
def report(request: pytest.FixtureRequest) -> dict[str, Any]:
    return made_report(request.param)


def slow_front(report: dict[str, Any], by: str) -> set[str]:
    """Return the names that no other run beats: at least as good in both and better in one."""
    places = {"dense": (report["dense"]["seconds"] if by == "seconds" else 1.0, math.inf)}
    for run in report["sparse"]:
        psnr = math.inf if run["metrics"]["identical"] else run["metrics"]["psnr_db"]
        places[run["name"]] = (run[ACROSS[by][0]], psnr)
    sign = -1 if by == "seconds" else 1

    def beats(one: tuple[float, float], other: tuple[float, float]) -> bool:
        a, b = sign * one[0] - sign * other[0], one[1] - other[1] if one[1] != other[1] else 0.0
        return a >= 0 and b >= 0 and (a > 0 or b > 0)

    return {name for name, place in places.items() if not any(beats(one, place) for one in places.values())}


@pytest.mark.parametrize("by", BY)
def test_front_and_table(report: dict[str, Any], by: str) -> None:
    if len(report["sparse"]) > 1:
        report["sparse"][1]["metrics"] |= {"psnr_db": None, "identical": True}
    best = slow_front(report, by)
    points, missing = points_of(report, by)
    assert missing == []
    assert {point.name for point in not_dominated(points, by)} == best
    rows = sweep_rows(report, by)
    assert all(len(row) == len(HEADINGS) for row in rows)
    assert {row[0] for row in rows if row[-1] == "yes"} == best
    assert {row[0] for row in rows} == {"dense", *(run["name"] for run in report["sparse"])}
    across = {point.name: point.across for point in points}
    order = [across[row[0]] for row in rows]
    assert order == sorted(order, reverse=by != "seconds"), "the fastest first"


@pytest.mark.parametrize("by", BY)
def test_plot(report: dict[str, Any], by: str) -> None:
    report["sparse"][0]["metrics"] |= {"psnr_db": None, "identical": True}
    page = Page(pareto(report, by))
    points, _ = points_of(report, by)
    marks = [a for a in page.of("g") if a.get("tabindex") == "0"]
    assert [mark["aria-label"].partition(":")[0] for mark in marks] == [point.name for point in points]
    circles = [(float(a["cx"]), float(a["cy"])) for a in page.of("circle")]
    assert len(circles) == len(points)
    wide = max(point.across for point in points) - min(point.across for point in points)
    for one, (x, y) in zip(points, circles, strict=True):
        for other, (u, v) in zip(points, circles, strict=True):
            # places are rounded to a tenth of a pixel: only what lies that near may share one
            assert one.across <= other.across or x > u or (x == u and one.across - other.across < wide / 1000)
            assert one.psnr_db <= other.psnr_db or y < v or (y == v and one.psnr_db - other.psnr_db < 0.1)
    best = slow_front(report, by)
    linked = page.of("polyline")[0]["points"].split()
    at = {point.name: f"{x},{y}" for point, (x, y) in zip(points, circles, strict=True)}
    assert {tuple(map(float, place.split(","))) for place in linked} == {
        tuple(map(float, at[name].split(","))) for name in best
    }
    filled = {point.name for point, a in zip(points, page.of("circle"), strict=True) if "fill: none" not in a["style"]}
    assert filled == best
    names = [text for tag, text in page.texts if tag == "text"]
    assert {"dense", "plan-0", "identical to dense"} <= set(names)
    for text in page.of("text"):
        assert -20 <= float(text["x"]) <= 480
        assert 0 <= float(text["y"]) <= 300
    assert page.of("title") == [{}] * (1 + len(points))
    assert len(page.of("desc")) == 1


def test_labels_of_a_few_plans_do_not_cover_each_other() -> None:
    from dit_sparse.app.axes import FONT, text_width

    for _ in range(20):
        report = made_report(5)
        svg = pareto(report)
        boxes = []
        for x, y, words in re.findall(r'<text x="([\d.-]+)" y="([\d.-]+)" text-anchor="start">(.*?)</text>', svg):
            boxes.append((float(x), float(y) - FONT, float(x) + text_width(words), float(y)))
        assert len(boxes) == 6
        for i, one in enumerate(boxes):
            for other in boxes[:i]:
                across = min(one[2], other[2]) - max(one[0], other[0])
                down = min(one[3], other[3]) - max(one[1], other[1])
                assert across <= 1 or down <= 1, (one, other)


def test_what_was_not_timed_is_named(report: dict[str, Any]) -> None:
    for run in report["sparse"]:
        run["attention_speedup"] = None
    svg = pareto(report)
    assert "not shown, not measured: plan-0" in svg
    assert points_of(report)[1] == [run["name"] for run in report["sparse"]]
    assert sweep_rows(report)[-1][-1] == "unknown"
    with pytest.raises(ValueError, match="by must be one of attention, whole, seconds, got 'memory'"):
        pareto(report, "memory")


def test_the_page_stands_alone(tmp_path: Path) -> None:
    report = made_report(4)
    plain = Page(sweep_page(report, STORED))
    evil = copy.deepcopy(report)
    evil["request"] |= {"prompt": EVIL, "model": EVIL}
    evil |= {"command": EVIL, "notes": [EVIL]}
    for run in evil["sparse"]:
        run |= {"spec": EVIL, "dense_reasons": {EVIL: 3}}
    validate(evil)
    assert not plain.of("script")
    html = sweep_page(evil, STORED)
    page = Page(html)
    assert {tag for tag, _ in page.tags} == {tag for tag, _ in plain.tags}
    assert not page.of("script")
    for tag, attributes in page.tags:
        assert tag not in ("link", "iframe", "object", "a", "video", "image"), tag
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if name in ("src", "href", "xlink:href", "srcset"):
                assert value.startswith("data:image/png;base64,")
    assert "@import" not in html
    assert not re.search(r"url\(", html)
    assert page.text.count(" ".join(EVIL.split())) > 5
    assert len(page.of("img")) == 1
    assert not Page(sweep_page(report, tmp_path)).of("img"), "no frames there"
    for run in report["sparse"]:
        assert run["name"] in plain.text
        assert run["spec"] in plain.text
    path = tmp_path / "new" / "sweep.html"
    write_sweep(report, STORED, path)
    assert path.read_text(encoding="utf-8") == sweep_page(report, STORED)
    assert [file.name for file in path.parent.iterdir()] == ["sweep.html"]


def test_headline(report: dict[str, Any]) -> None:
    fastest = min(report["sparse"], key=lambda run: run["seconds"])
    nearest = max(report["sparse"], key=lambda run: run["metrics"]["psnr_db"])
    told = headline(report)
    assert f"{fastest['name']} is the fastest ({fastest['speedup']:.2f}×" in told
    whose = "" if nearest is fastest else f"{nearest['name']} "
    assert f" and {whose}the nearest to dense ({nearest['metrics']['psnr_db']:.1f} dB)" in told
    random.choice(report["sparse"])["metrics"] |= {"psnr_db": None, "identical": True}
    assert "identical to dense" in headline(report)
