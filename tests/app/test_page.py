"""The page in a real browser: what is there at first, generating, stopping, refusing, two visitors, phone and dark."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import dit_sparse as ds
from dit_sparse.app.demo import Server
from tests.app.browser import PHONE, Visitor
from tests.app.serving import LONG, MINUTE, SMALL, fill, served, tab, wait_for_text

TABS = ("Compare", "See the pattern", "Sweep", "Blind test")


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with served() as found:
        yield found


@pytest.fixture
def visit(server: Server, open_page: Callable[..., Visitor]) -> Callable[..., Visitor]:
    """Open the page and wait until its clips are there."""

    def go(query: str = "", **options: Any) -> Visitor:
        found = open_page(f"{server.address}{query}", **options)
        wait_for_playing(found.page)
        return found

    return go


def wait_for_playing(page: Any) -> None:
    page.wait_for_function(
        "() => { const all = [...document.querySelectorAll('#player video')];"
        " return all.length == 2 && all.every(v => v.readyState >= 2 && v.videoWidth > 0) }",
        timeout=30_000,
    )


def generate(page: Any, size: dict[str, int]) -> None:
    fill(page, "compare", size)
    page.click("#generate")


def test_the_first_view_is_filled(visit: Callable[..., Visitor]) -> None:
    seen = visit()
    page = seen.page
    times = [page.evaluate("[...document.querySelectorAll('#player video')].map(v => v.currentTime)")]
    page.wait_for_timeout(700)
    times.append(page.evaluate("[...document.querySelectorAll('#player video')].map(v => v.currentTime)"))
    assert all(now != before for before, now in zip(*times, strict=True))
    brightness = page.evaluate(
        "[...document.querySelectorAll('#player video')].map(v => { const c = document.createElement('canvas');"
        " c.width = c.height = 16; const g = c.getContext('2d'); g.drawImage(v, 0, 0, 16, 16);"
        " return g.getImageData(0, 0, 16, 16).data.reduce((a, b) => a + b) / 1024 })"
    )
    assert min(brightness) > 70  # the opaque alpha alone is 64
    assert "×" in page.inner_text("#figures")
    assert "job" in page.inner_text("#queue")
    assert "This server" in page.inner_text("#environment")
    seen.shot("first-view")


def test_generating_shows_the_new_clips(visit: Callable[..., Visitor], server: Server) -> None:
    seen = visit()
    page = seen.page
    before = page.evaluate("document.querySelector('#player video').src")
    page.fill("#compare-prompt textarea", "a blue square moving right")
    generate(page, SMALL)
    wait_for_text(page, "#status", "done")
    wait_for_playing(page)
    wait_for_text(page, "#figures", "a blue square moving right")
    assert "320 tokens" in page.inner_text("#figures")
    page.wait_for_function("src => document.querySelector('#player video').src != src", arg=before)
    page.get_by_text("Copy the Python").click()
    assert "num_inference_steps=3" in wait_for_text(page, "#code", "enable", 10_000)
    assert page.locator("#stop").is_disabled()
    assert server.site.studio.waiting == 0
    seen.shot("generated")


def test_stop_stops_and_the_next_job_runs(visit: Callable[..., Visitor]) -> None:
    seen = visit()
    page = seen.page
    generate(page, LONG)
    wait_for_text(page, "#status", "step 1 of 24")
    seen.shot("on-the-way")
    page.click("#stop")
    wait_for_text(page, "#status", "stopped", MINUTE)
    page.wait_for_function("!document.querySelector('#generate').disabled", timeout=10_000)
    generate(page, SMALL)
    wait_for_text(page, "#status", "done")


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("steps", 1000, "steps must lie between 1 and 24"),
        ("height", 4096, "height must lie"),
        ("width", 40, "multiple"),
    ],
)
def test_what_is_over_a_limit_is_told_and_runs_nothing(
    visit: Callable[..., Visitor], field: str, value: int, said: str
) -> None:
    seen = visit()
    generate(seen.page, {**SMALL, field: value})
    text = wait_for_text(seen.page, "#status [role=alert]", said)
    assert "Traceback" not in text
    assert seen.page.locator("#generate").is_enabled()


def test_a_prompt_may_hold_anything_but_runs_nothing(visit: Callable[..., Visitor]) -> None:
    page = visit().page
    page.fill("#compare-prompt textarea", "<img src=x onerror=alert(1)> ${alert(2)} {{value}}")
    generate(page, SMALL)
    wait_for_text(page, "#status", "done")
    wait_for_text(page, "#figures", "<img src=x onerror=alert(1)> ${alert(2)} {{value}}")


def test_plans_are_taken_from_files_and_bad_files_refused(visit: Callable[..., Visitor], tmp_path: Path) -> None:
    page = visit().page
    page.get_by_label("my plan file").check()
    bad, good = tmp_path / "bad.json", tmp_path / "good.json"
    bad.write_text('{"schema": 1, "rules": [{"pattern": {"name": "topblock"}}]}')
    good.write_text(json.dumps(ds.Plan.of(ds.TopBlocks(0.5), "my own <b>plan</b>").to_dict()))
    page.set_input_files("#plan-file input[type=file]", bad)
    assert str(tmp_path) not in wait_for_text(page, "#plan-said", "Not taken")
    generate(page, SMALL)
    assert wait_for_text(page, "#status [role=alert]", "upload a plan.json")
    page.locator("#plan-file").get_by_label("Clear").click()
    page.set_input_files("#plan-file input[type=file]", good)
    wait_for_text(page, "#plan-said", "my own <b>plan</b>")
    page.click("#generate")
    wait_for_text(page, "#status", "done")
    wait_for_text(page, "#player", "my-own-b-plan-b")


def test_a_pattern_has_its_own_controls(visit: Callable[..., Visitor]) -> None:
    seen = visit()
    page = seen.page
    page.get_by_label("a pattern").check()
    page.locator("#pattern-name input").click()
    page.get_by_role("option", name="stripes").click()
    page.locator("#option-stripes-width input[type=number]").fill("0.3")
    page.locator("#option-stripes-width input[type=number]").press("Enter")
    kind = page.locator("#option-stripes-kind").locator("textarea, input")
    kind.fill("diagonal")
    kind.press("Tab")
    page.wait_for_function(
        "document.querySelector('#pattern-text').querySelector('textarea, input').value"
        " == 'stripes:kind=diagonal,width=0.3'"
    )
    generate(page, SMALL)
    wait_for_text(page, "#status", "done")
    wait_for_text(page, "#player", "stripes-kind-diagonal")
    seen.shot("a-pattern")


def test_two_visitors_wait_for_each_other(visit: Callable[..., Visitor]) -> None:
    first, second = visit().page, visit().page
    generate(first, {**LONG, "frames": 17, "steps": 4})
    wait_for_text(first, "#status", "step 1 of 4")
    generate(second, SMALL)
    wait_for_text(second, "#status", "waiting: 1 job before this one")
    wait_for_text(first, "#queue", "1 job waiting", 20_000)
    wait_for_text(second, "#status", "done", 300_000)
    assert "done" in first.inner_text("#status")


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_a_phone_has_no_sideways_scroll(visit: Callable[..., Visitor], theme: str) -> None:
    seen = visit(f"?__theme={theme}", viewport=PHONE, colour_scheme=theme)
    page = seen.page
    for name in TABS:
        tab = page.get_by_role("tab", name=name)
        if not tab.is_visible():  # Gradio folds tabs that find no room
            page.locator("button.overflow-menu, .overflow-menu button").first.click()
            page.get_by_text(name, exact=True).last.click()
        else:
            tab.click()
        page.wait_for_timeout(300)
        wide = page.evaluate("[document.documentElement.scrollWidth, window.innerWidth]")
        assert wide[0] <= wide[1], (name, wide)
        seen.shot(f"phone-{theme}-{name}")
    colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
    level = sum(int(part) for part in colour[colour.index("(") + 1 : -1].split(",")[:3]) / 3
    assert (level < 80) == (theme == "dark")


def test_everything_that_can_be_used_has_a_name(visit: Callable[..., Visitor]) -> None:
    page = visit().page
    for name in TABS:
        tab(page, name)
        page.wait_for_timeout(200)
        nameless = page.evaluate(
            "[...document.querySelectorAll('button, input, textarea, select')].filter(e => e.offsetParent && !("
            "e.innerText?.trim() || e.ariaLabel || e.title || e.labels?.length || e.getAttribute('aria-labelledby')"
            ")).map(e => e.outerHTML.slice(0, 200))"
        )
        assert nameless == [], (name, nameless)
