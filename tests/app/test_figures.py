"""The figures of a run against the numbers of its report, and against text that tries to be markup."""

from __future__ import annotations

import random
from collections.abc import Callable
from html.parser import HTMLParser
from typing import Any

import pytest

from dit_sparse.app.figures import compared, environment_line, figures_html, quality_rows, run_named
from dit_sparse.search.report import load_report, validate
from tests.app.browser import DESKTOP, PHONE, Visitor
from tests.app.stage import STORED, stage

EVIL = "<script>alert(1)</script><img src=x onerror=alert(2)> \"'& ${alert(3)} `{{alert}}`"
# every text against what lies beneath it: WCAG 2.2, 1.4.3, contrast ratio; opacity blends the text into the ground
CONTRAST = """root => {
  const parse = c => { const n = c.match(/[\\d.]+/g).map(Number); return { rgb: n.slice(0, 3), a: n[3] ?? 1 } };
  const luminance = rgb => { const [r, g, b] = rgb.map(v => { v /= 255;
    return v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4 }); return 0.2126 * r + 0.7152 * g + 0.0722 * b };
  const found = [];
  const walk = document.createTreeWalker(root, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const e = walk.currentNode.parentElement;
    if (!walk.currentNode.textContent.trim() || !e.getClientRects().length) continue;
    let opacity = 1, ground = null;
    for (let p = e; p; p = p.parentElement) {
      const s = getComputedStyle(p);
      opacity *= Number(s.opacity);
      const b = parse(s.backgroundColor);
      if (!ground && b.a > 0.99) ground = b.rgb;
    }
    ground ??= [255, 255, 255];
    const text = parse(getComputedStyle(e).color), a = text.a * opacity;
    const seen = text.rgb.map((v, i) => a * v + (1 - a) * ground[i]);
    const [x, y] = [luminance(seen), luminance(ground)].sort((m, n) => n - m);
    found.push([(x + 0.05) / (y + 0.05), walk.currentNode.textContent.trim()]);
  }
  return found.sort((a, b) => a[0] - b[0]); }"""


class Page(HTMLParser):
    """Read elements and text as a browser would."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += " ".join(data.split()) + "\n"

    def widths(self) -> list[float]:
        """Return the length of every bar in percent."""
        styles = [found["style"] or "" for tag, found in self.tags if (found.get("class") or "").startswith("fill")]
        return [float(style.removeprefix("width:").removesuffix("%")) for style in styles]


@pytest.fixture
def report() -> dict[str, Any]:
    """Give the stored report with other numbers in it each time, and no yardstick."""
    found = load_report(STORED)
    found.pop("yardsticks", None)
    for run in (found["dense"], *found["sparse"]):
        run["seconds"] = random.uniform(1.0, 300.0)
        run["attention_seconds"] = run["seconds"] * random.uniform(0.1, 0.9)
    for run in found["sparse"]:
        run["speedup"] = found["dense"]["seconds"] / run["seconds"]
        run["attention_speedup"] = found["dense"]["attention_seconds"] / run["attention_seconds"]
        kept = random.random()
        run["computed_density"] = {"kept": kept, "skipped": 1 - kept}
    validate(found)
    return found


def test_bars_are_to_scale_from_zero(report: dict[str, Any]) -> None:
    dense, run = report["dense"], report["sparse"][0]
    page = Page(figures_html(report, "balanced"))
    values = []
    for field in ("seconds", "attention_seconds"):
        values += [dense[field], run[field]]
    values += [dense["seconds"] - dense["attention_seconds"], run["seconds"] - run["attention_seconds"]]
    longest = max(dense["seconds"], run["seconds"])
    shares = [run[name]["kept"] for name in ("density", "computed_density", "run_density")]
    shares.append(run["sparse_calls"] / (run["sparse_calls"] + run["dense_calls"]))
    wanted = [100 * value / longest for value in values] + [100 * share for share in shares]
    assert page.widths() == pytest.approx(wanted, abs=0.001)
    for value in values:
        assert f"{value:.2f} s" in page.text or f"{value:.0f} s" in page.text
    kept = run["computed_density"]["kept"]
    assert f"keeps {100 * kept:.1f} %, skips {100 - 100 * kept:.1f} %" in page.text


def test_what_was_not_measured_has_no_bar(report: dict[str, Any]) -> None:
    run = report["sparse"][1]
    report["dense"]["attention_seconds"] = run["attention_seconds"] = run["attention_speedup"] = None
    run["density"] = run["computed_density"] = run["run_density"] = None
    run |= {
        "sparse_calls": 0,
        "dense_calls": 192,
        "dense_reasons": {"dense_steps": 12, "800 tokens < min_tokens 900": 180},
    }
    run["metrics"] |= {"ssim": None, "warp_error": None}
    validate(report)
    page = Page(figures_html(report, run["name"]))
    longest = max(report["dense"]["seconds"], run["seconds"])
    wanted = [100 * report["dense"]["seconds"] / longest, 100 * run["seconds"] / longest, 0]
    assert page.widths() == pytest.approx(wanted, abs=0.001)
    assert page.text.count("not known") == 4
    assert page.text.count("nothing ran sparse") == 3
    assert page.text.count("not measured\n") == 2
    assert "0 of 192 attention calls ran sparse, 192 dense" in page.text
    first, second = page.text.index("180 × 800 tokens < min_tokens 900"), page.text.index("12 × steps that the option")
    assert first < second


def test_attention_slower_than_the_run_leaves_no_rest(report: dict[str, Any]) -> None:
    report["dense"]["attention_seconds"] = report["dense"]["seconds"] * 1.01
    assert "not known" in figures_html(report, "balanced")


def test_no_claim_without_the_seed(report: dict[str, Any]) -> None:
    html = figures_html(report, "balanced")
    assert "would" not in html.replace("another seed would be was not measured", "")
    assert "not compared with another seed" in html
    assert [len(row) for row in quality_rows(report, report["sparse"][0])] == [3] * 4


def test_the_seed_is_the_yardstick(report: dict[str, Any]) -> None:
    run = report["sparse"][0]
    seed = {"psnr_db": 20.0, "ssim": 0.8, "flicker": 0.01, "warp_error": 0.1, "lpips": 0.3, "identical": False}
    run["metrics"] = {
        "psnr_db": 25.0,
        "ssim": 0.7,
        "flicker": 0.02,
        "warp_error": 0.0,
        "lpips": 0.2,
        "identical": False,
    }
    report["yardsticks"] = {"another seed": seed}
    rows = {row[0]: row for row in quality_rows(report, run)}
    less, more = "differs less than another seed would", "differs at least as much as another seed would"
    assert rows["PSNR, dB"][1:3] == ("25.0", "20.0")
    said = {name: row[3].split(";")[0] for name, row in rows.items()}
    assert (said["PSNR, dB"], said["SSIM"], said["flicker"], said["LPIPS"]) == (less, more, more, less)
    assert "seed" not in said["warp error"]
    page = Page(figures_html(report, "balanced"))
    assert "was not measured" not in page.text
    assert "PSNR against dense\n" in page.text
    run["metrics"] |= {"identical": True, "psnr_db": None}
    assert {row[0]: row for row in quality_rows(report, run)}["PSNR, dB"][1] == "identical"
    assert "every pixel is the same" in figures_html(report, "balanced")


def test_judgement_agrees_with_distances() -> None:
    for _ in range(50):
        value, seed = random.random(), random.random()
        for closer, distances in ((1, (1 - value, 1 - seed)), (-1, (value, seed))):
            assert compared(value, seed, closer).startswith("differs less") == (distances[0] < distances[1])
    assert compared(0.5, 0.5, 1).startswith("differs at least as much")
    assert compared(None, 0.5, 1) == compared(0.5, None, 1) == compared(0.5, 0.4, 0) == ""


def test_memory_and_machine(report: dict[str, Any]) -> None:
    run = report["sparse"][0]
    assert "Peak GPU memory" not in figures_html(report, "balanced")
    report["dense"]["peak_memory_bytes"], run["peak_memory_bytes"] = 3 * 2**30, 7 * 2**29
    assert "dense 3.00 GiB, sparse 3.50 GiB" in figures_html(report, "balanced")
    assert "AMD EPYC" in environment_line(report)
    report["environment"]["gpu"] = "1 × NVIDIA H200, 140 GiB"
    line = environment_line(report)
    assert line.startswith("1 × NVIDIA H200")
    assert f"torch {report['environment']['packages']['torch']}" in line
    assert "\n" not in line


def test_unknown_plans_are_refused(report: dict[str, Any]) -> None:
    for name in ("dense", "../x"):
        with pytest.raises(ValueError, match="balanced, radial-kind-block"):
            run_named(report, name)


def test_text_stays_text(report: dict[str, Any]) -> None:
    report["notes"], report["sparse"][0]["dense_reasons"] = ["plain"], {"plain": 108}
    clean = Page(figures_html(report, "balanced"))
    report["request"] |= {"prompt": EVIL, "model": EVIL, "device": EVIL}
    report["notes"] = [EVIL]
    report["timing"]["warm_up"] = EVIL
    report["environment"] |= {"cpu": EVIL, "python": EVIL, "dit-sparse": EVIL}
    report["environment"]["packages"]["torch"] = EVIL
    run = report["sparse"][0]
    run["spec"], run["dense_reasons"] = EVIL, {EVIL: 108}
    page = Page(figures_html(report, "balanced"))
    assert page.text.count("alert(1)") == 11  # each of the fields above
    assert [tag for tag, _ in page.tags] == [tag for tag, _ in clean.tags]
    assert all(not name.startswith("on") for _, found in page.tags for name in found)


def test_text_stays_text_in_the_browser(open_page: Callable[..., Visitor]) -> None:
    with stage(prompt=EVIL) as address:
        page = (seen := open_page(address)).page
        told: list[str] = []
        page.on("dialog", lambda dialog: (told.append(dialog.message), dialog.dismiss()))
        page.get_by_label("radial-kind-block").check()
        page.wait_for_function("() => document.querySelector('#figures code').textContent.includes('radial')")
        assert page.inner_text("#figures blockquote").split() == EVIL.split()
        assert page.locator("#figures script, #figures img").count() == 0
        assert told == []
        assert seen.complaints() == []


# each theme on a desktop and on a phone
@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_readable_and_no_wider_than_the_screen(
    theme: str, size: dict[str, int], open_page: Callable[..., Visitor]
) -> None:
    with stage() as address:
        seen = open_page(f"{address}/?__theme={theme}", viewport=size, colour_scheme=theme)
        seen.page.wait_for_selector("#figures .fill")
        for part in ("#figures", "#player .controls", "#player .hint", "#player .caption"):
            found = seen.page.eval_on_selector(part, CONTRAST)
            assert found
            assert found[0][0] >= 4.5, (part, found[:3])
        ground = seen.page.evaluate("() => getComputedStyle(document.body).backgroundColor")
        assert (max(int(v) for v in ground[4:-1].split(",")) < 80) == (theme == "dark"), ground
        wider = seen.page.evaluate("() => document.documentElement.scrollWidth - document.documentElement.clientWidth")
        assert wider <= 0
        table = seen.page.eval_on_selector("#figures .wide", "e => e.scrollWidth - e.clientWidth")
        assert table <= 0
        seen.shot(f"figures {theme} {size['width']}")
