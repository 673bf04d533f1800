"""The page of a search: it needs nothing else, and shows whatever report it is given."""

from __future__ import annotations

import base64
import copy
import json
import random
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable

import pytest

from dit_sparse.patterns import PATTERNS, Cached, pattern_from_text
from dit_sparse.search.heads_map import kind_of, letters, shade_of
from dit_sparse.search.planner.charts import pareto
from dit_sparse.search.planner.points import by_speed, gate_line
from dit_sparse.search.planner.report import group_densities, to_html, to_json, to_markdown, validate, verdict_line
from tests.search.made_reports import CASES, EVIL, Page, Report, made, no_attention, pictures, uneven_map, unrendered


@pytest.fixture
def report() -> Report:
    return made(random.randrange(2**32))


@pytest.mark.parametrize("change", CASES, ids=lambda change: change.__name__)  # each empties or stretches one part
def test_every_case_renders(change: Callable[[Report], None], report: Report) -> None:
    change(report)
    before = copy.deepcopy(report)
    validate(report)
    page = Page(to_html(report, pictures()))
    for bad in ("None", "nan", "inf"):
        assert not re.search(rf"\b{bad}\b", page.text), bad
        assert not re.search(rf"\b{bad}\b", to_markdown(report).replace(report["command"], "")), bad
    for shown in [point["name"] for point in report["points"]] + report["request"]["held_out_prompts"]:
        assert shown in page.text
    assert verdict_line(report) in page.text
    assert "\n" not in verdict_line(report)
    assert sum(attributes.get("class") == "chosen" for attributes in page.of("tr")) == (report["chosen"] is not None)
    assert len(page.of("img")) == sum(len(one["pictures"]) for one in report["worst"])
    cells = [attributes for attributes in page.of("rect") if re.fullmatch(r"s\d", attributes.get("class", ""))]
    assert len(cells) == sum(len(unit["heads"]) for unit in report["map"])
    assert json.loads(to_json(report)) == report == before


def test_page_asks_for_nothing(report: Report) -> None:
    report["request"]["held_out_prompts"][0] = report["worst"][0]["prompt"] = EVIL
    html = to_html(report, pictures())
    page = Page(html)
    for tag, attributes in page.tags:
        assert tag not in ("script", "link", "iframe", "object", "embed", "base", "a", "video", "image"), tag
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if name in ("src", "href", "xlink:href", "srcset", "data", "poster", "action"):
                assert value.startswith(("#", "data:image/png;base64,")), (tag, name, value)
    assert all(place.strip("\"'").startswith("#") for place in re.findall(r"url\((.*?)\)", html))
    assert "@import" not in html
    policy = [a["content"] for a in page.of("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy[0].startswith("default-src 'none'")


def test_text_of_others_stays_text(report: Report) -> None:
    """Whatever a prompt, a name or an environment holds, the page has the same elements as without it."""
    plain = Page(to_html(report, pictures()))
    evil = copy.deepcopy(report)
    evil |= {"why": EVIL, "command": EVIL, "notes": [EVIL], "created": EVIL}
    evil["request"] |= {"model": EVIL, "backend": EVIL, "specs": [EVIL]}
    evil["request"]["held_out_prompts"] = [EVIL for _ in report["request"]["held_out_prompts"]]
    evil["environment"] = {EVIL: EVIL, "gpu": None, "packages": {EVIL: EVIL}}
    evil["worst"][0]["prompt"] = evil["prices"]["where"] = EVIL
    evil["worst"][0]["pictures"] = [[EVIL, "a.png"], ["sparse", "b.png"]]
    for point in evil["points"]:
        point["name"] = EVIL
    for unit in evil["map"]:
        for head in unit["heads"]:
            head["pattern"] = EVIL
    page = Page(to_html(evil, pictures()))
    differing = {"li", "br", "dt", "dd", "b"}  # one kind in the legend, other facts
    assert [t for t, _ in page.tags if t not in differing] == [t for t, _ in plain.tags if t not in differing]
    assert page.text.count(" ".join(EVIL.split())) > 10


def test_same_report_same_bytes(report: Report) -> None:
    import matplotlib

    shown = pictures()
    first = to_html(report, shown)
    with matplotlib.rc_context({"font.size": 30, "svg.fonttype": "path"}):
        before = dict(matplotlib.rcParams)
        assert to_html(report, shown) == first
        assert dict(matplotlib.rcParams) == before
    assert to_json(report) == to_json(copy.deepcopy(report))


def test_chart_shows_every_point_and_line() -> None:
    report = made(random.randrange(2**32), points=17)
    report["chosen"] = 5
    svg = pareto(report)
    root = ET.fromstring(svg)
    names = "{http://www.w3.org/2000/svg}"
    texts = {"".join(text.itertext()).strip() for text in root.iter(f"{names}text")}
    assert {"gate: mean 25 dB", "another seed: 14.2 dB", "another dense kernel: 45.5 dB", "chosen", "front"} <= texts
    assert {"attention speed-up over dense, measured", "PSNR against dense, dB"} <= texts
    assert "predicted loss (less is better)" not in texts
    assert str([point is report["points"][5] for point in by_speed(report)].index(True) + 1) in texts
    axes = next(g for g in root.iter(f"{names}g") if g.get("id") == "axes_1")  # beside it: the legend
    collections = [g for g in axes.iter(f"{names}g") if g.get("id", "").startswith("PathCollection")]
    drawn = [len(list(g.iter(f"{names}use"))) or len(g.findall(f"{names}path")) for g in collections]
    assert sum(drawn) == 17 + 1  # the ring
    assert "viewBox" in root.attrib
    assert "width" not in root.attrib


@pytest.mark.parametrize(("rendered", "panels"), [(0.0, 1), (1.0, 1), (0.5, 2)])  # by loss, by PSNR, both
def test_chart_panels(rendered: float, panels: int) -> None:
    report = made(random.randrange(2**32), points=40, rendered=rendered)
    svg = pareto(report)
    assert svg.count("PSNR against dense, dB") - svg.count("<!-- PSNR against dense, dB -->") == (rendered > 0)
    assert len(re.findall(r'id="axes_\d+"', svg)) == panels
    assert pareto({**report, "points": [], "chosen": None}) == ""


def test_gate_line_stands_above_the_first_that_passes(report: Report) -> None:
    passing = {report["points"].index(point) for point in report["points"] if point["measured"]["passes"]}
    above, text = gate_line(report)
    order = by_speed(report)
    assert not any(point["measured"]["passes"] for point in order[:above])
    assert above == len(order) if not passing else order[above]["measured"]["passes"]
    assert "mean PSNR at least 25 dB, worst PSNR at least 20 dB" in text
    assert "LPIPS" not in text
    rows = re.findall(r"<tr[ >].*?</tr>", to_html(report, pictures()), re.S)
    points = [row for row in rows if 'class="gate"' in row or any(p["name"] in row for p in report["points"])]
    assert [i for i, row in enumerate(points) if 'class="gate"' in row] == [above]


def test_headline(report: Report) -> None:
    point = report["points"][report["chosen"]]
    text = Page(to_html(report, pictures())).text
    head = text[: text.index("Speed and quality")]
    assert f"attention {40 / point['measured']['attention_seconds']:.2f}× measured" in head
    assert f"end to end {80 / point['measured']['seconds']:.2f}×" in head
    assert f"mean {point['measured']['psnr_db']['mean']:.1f}" in head
    assert f"density kept {100 * point['density']:.1f} % skips {100 * (1 - point['density']):.1f} %" in head
    no_attention(report)
    assert f"attention {point['predicted_speedup']:.2f}× predicted" in Page(to_html(report, pictures())).text


def test_map_shows_each_head(report: Report) -> None:
    uneven_map(report)
    page = Page(to_html(report, pictures()))
    told = [text for tag, text in page.texts if tag == "title"][1:]
    shades = [a["class"] for a in page.of("rect") if re.fullmatch(r"s\d", a.get("class", ""))]
    units = sorted(report["map"], key=lambda unit: (unit["transformer"], unit["group"], unit["layer"]))
    heads = [(unit["layer"], i, head) for unit in units for i, head in enumerate(unit["heads"])]
    for text, shade, (layer, i, head) in zip(told, shades, heads, strict=True):
        assert text.startswith(f"layer {layer}, head {i}: {head['pattern']}, density {head['density']:.3f}, recall ")
        assert shade == f"s{shade_of(head['density'])}"
    marks = re.findall(r'<text class="marks" y="\d+" x="([\d ]+)"[^>]*>(.*?)</text>', to_html(report, pictures()))
    assert [letter for _, row in marks for letter in row] == [kind_of(head["pattern"])[0] for _, _, head in heads]
    assert all(len(places.split()) == len(row) for places, row in marks)


def test_letters_tell_patterns_apart() -> None:
    assert set(letters()) == set(PATTERNS)
    assert len(set(letters().values())) == len(PATTERNS)
    for name in PATTERNS:
        assert kind_of(f"{name}:x=1") == (letters()[name], name)
    for inner in ("topblocks:keep=0.2,compensate=true", "strided"):
        text = str(Cached(pattern_from_text(inner), 4))
        name = inner.partition(":")[0]
        assert kind_of(text) == (letters()[name].lower(), f"cached {name}")
    assert kind_of("from_the_future:a=1") == ("?", "from_the_future")


def test_shades_rise_with_density() -> None:
    draws = sorted([0.0, 1.0, *(random.random() for _ in range(200))])
    shades = [shade_of(density) for density in draws]
    assert shades == sorted(shades)
    assert shades[0] == 0
    assert [density for density, shade in zip(draws, shades, strict=True) if shade == max(shades)] == [1.0]


def test_schedule_strip(report: Report) -> None:
    names = report["model"]["transformers"]
    for unit in report["map"]:
        for head in unit["heads"]:
            if unit["group"] == 1:
                head |= {"pattern": "dense", "density": 1.0}
    report["map"] = [unit for unit in report["map"] if unit["transformer"] != names[0] or unit["group"] != 3]
    heads = [h["density"] for u in report["map"] if (u["transformer"], u["group"]) == (names[0], 2) for h in u["heads"]]
    found = group_densities(report)
    assert found[names[0]][1] == 1.0
    assert found[names[0]][3] is None
    assert found[names[0]][2] == pytest.approx(sum(heads) / len(heads))
    text = Page(to_html(report, pictures())).text
    assert "15 % of the schedule is dense in every head" in text
    assert f"25–50 %: {sum(heads) / len(heads):.3f}; 50–100 %: not called" in text
    widths = re.findall(r'class="(?:s\d|none)" style="width: ([\d.]+)%"', to_html(report, pictures()))
    assert [float(width) for width in widths] == pytest.approx([10, 15, 25, 50] * len(names))


def test_bars_start_at_zero(report: Report) -> None:
    html = to_html(report, pictures())
    point = report["points"][report["chosen"]]["measured"]
    ours = [point["attention_seconds"], max(0.0, point["seconds"] - point["attention_seconds"])]
    longest = max(80.0, sum(ours))
    widths = re.findall(r'class="(?:attention|rest)" style="width: ([\d.]+)%"', html)
    assert [float(width) for width in widths] == pytest.approx([100 * s / longest for s in (40, 40, *ours)], abs=1e-3)
    unrendered(report)
    report["points"][report["chosen"]]["predicted_ms"] = 300.0
    html = to_html(report, pictures())
    assert re.findall(r'class="attention" style="width: ([\d.]+)%"', html) == ["100.0000", "33.3333"]
    assert "nothing was timed" in html


def test_pictures_are_inside(report: Report) -> None:
    shown = pictures()
    sources = [image["src"] for image in Page(to_html(report, shown)).of("img")]
    assert [base64.b64decode(source.partition(",")[2]) for source in sources] == [shown["a.png"], shown["b.png"]]
    with pytest.raises(ValueError, match=r"'b\.png'.*is not among the pictures; known: a\.png"):
        to_html(report, {"a.png": shown["a.png"]})
    with pytest.raises(ValueError, match=r"'a\.png'.*is no PNG"):
        to_html(report, {**shown, "a.png": b"<svg>"})


def test_shipped_prices_are_marked(report: Report) -> None:
    marked = "Predicted times are those of"
    assert marked not in to_html(report, pictures())
    report["prices"]["shipped"] = True
    assert marked in to_html(report, pictures())
    assert "predictions, not measured on this machine" in to_markdown(report)
