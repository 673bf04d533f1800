"""Looking at patterns, sweeping plans and the blind test, in a real browser."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from dit_sparse.app.choice import served as served_with
from dit_sparse.app.demo import Server
from dit_sparse.patterns import Dense, Pattern, TopBlocks
from dit_sparse.pipelines.presets import FOLDER, machine
from dit_sparse.plan import Plan
from tests.app.browser import Visitor
from tests.app.serving import SMALL, SPARSE, fill, served, tab, wait_for_text


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with served() as found:
        yield found


@pytest.fixture
def visit(server: Server, open_page: Callable[..., Visitor]) -> Callable[[], Visitor]:
    def go() -> Visitor:
        found = open_page(server.address)
        found.page.wait_for_selector("#player video")
        return found

    return go


def place(page: Any) -> list[int]:
    """Return frame, row and column as the page shows them."""
    return [int(page.input_value(f"#{name} input")) for name in ("frame", "row", "column")]


def test_a_static_pattern_is_seen_at_once(visit: Callable[[], Visitor]) -> None:
    seen = visit()
    page = seen.page
    page.get_by_label("neighborhood-window-0.3").check()
    tab(page, "See the pattern")
    wait_for_text(page, "#plan-map", "neighborhood (36 heads)")
    page.click("#look")
    wait_for_text(page, "#mask-said", "neighborhood", 60_000)
    page.wait_for_selector("#sheet img")
    assert place(page) == [8, 8, 8]
    # The sheet is 4 frames a row of 16 x 16 tokens: a click in its corner picks a token of the first frame.
    image = page.locator("#sheet img")
    box = image.bounding_box()
    image.click(position={"x": box["width"] * 0.05, "y": box["height"] * 0.08})
    page.wait_for_function("document.querySelector('#frame input').value == '0'")
    clicked = place(page)
    assert wait_for_text(page, "#sheet-said", f"Frame 0, row {clicked[1]}, column {clicked[2]}", 10_000)
    for name, value in (("frame", 3), ("row", 5), ("column", 7)):
        page.locator(f"#{name} input").fill(str(value))
    page.click("#show-token")
    wait_for_text(page, "#sheet-said", "Frame 3, row 5, column 7", 10_000)
    seen.shot("pattern")
    page.locator("#row input").fill("99")
    page.click("#show-token")
    wait_for_text(page, "#sheet-said", "must lie on the grid", 10_000)


def look(page: Any, wanted: Callable[[Pattern], bool]) -> str:
    """Look at a head that runs a wanted pattern in `balanced` of this machine; return the pattern of its group."""
    plan, steps = Plan.load(FOLDER / machine() / "bundled" / "balanced"), SPARSE["steps"]
    for step, layer, head in itertools.product(reversed(range(steps)), range(6), range(6)):
        pattern = plan.patterns_at(step / steps, "transformer", layer, 6)[head]
        if wanted(pattern):
            for name, value in (("layer", layer), ("head", head), ("step", step)):
                page.locator(f"#{name} input").fill(str(value))
            page.click("#look")
            return str(served_with(plan, 6, 6, step / steps, layer, head).pattern)
    raise AssertionError(f"no such pattern in {plan.name}")


def test_a_choice_by_content_is_recorded_in_a_run(visit: Callable[[], Visitor]) -> None:
    seen = visit()
    page = seen.page
    page.get_by_text("More", exact=True).click()
    page.get_by_label("Also measure recall of each step").check()
    page.get_by_label("Also render another seed").check()
    fill(page, "compare", SPARSE)
    page.click("#generate")
    wait_for_text(page, "#status", "done")
    wait_for_text(page, "#figures", "another seed would")
    assert "ran sparse" in page.inner_text("#figures")
    tab(page, "See the pattern")
    page.wait_for_selector("#recall svg")
    chosen = look(page, lambda pattern: isinstance(pattern, TopBlocks))
    wait_for_text(page, "#mask-said", chosen)
    page.wait_for_selector("#sheet img")
    wait_for_text(page, "#sheet-said", "told by blocks of up to 128 tokens")
    seen.shot("pattern-by-content")
    look(page, lambda pattern: isinstance(pattern, Dense))
    wait_for_text(page, "#mask-said", "dense on the grid")
    page.locator("#step input").fill("7")
    page.click("#look")
    wait_for_text(page, "#look-status [role=alert]", "step 7 does not exist")


def test_a_sweep_is_a_table_a_plot_and_a_report(visit: Callable[[], Visitor], tmp_path: Any) -> None:
    seen = visit()
    page = seen.page
    tab(page, "Sweep")
    fill(page, "sweep", SMALL)
    page.fill("#sweep-specs textarea", "topblocks:keep=0.5\nradial:kind=block")
    page.click("#sweep")
    wait_for_text(page, "#sweep-status", "done")
    text = wait_for_text(page, "#sweep-table", "topblocks-keep-0.5")
    assert "balanced" in text
    assert "dense" in text
    assert page.locator("#pareto svg").count() == 1
    with page.expect_download() as waiting:
        page.click("#sweep-report")
    path = tmp_path / "report.html"
    waiting.value.save_as(path)
    page_text = path.read_text(encoding="utf-8")
    assert "radial" in page_text
    assert "http://" not in page_text.replace("http://www.w3.org/", "")
    seen.shot("sweep")
    page.fill("#sweep-specs textarea", "../../etc/passwd")
    page.click("#sweep")
    wait_for_text(page, "#sweep-status [role=alert]", "unknown plan")


def test_the_blind_test_counts_votes(visit: Callable[[], Visitor], server: Server) -> None:
    seen = visit()
    page = seen.page
    tab(page, "Blind test")
    assert page.locator("#blind-vote-left").is_disabled()
    for asked in (1, 2):
        page.click("#blind-ask")
        page.wait_for_function("!document.querySelector('#blind-vote-left').disabled")
        page.wait_for_function(
            "[...document.querySelectorAll('#blind-left video, #blind-right video')].filter(v => v.readyState >= 2)"
            ".length == 2",
            timeout=20_000,
        )
        sources = page.evaluate(
            "[...document.querySelectorAll('#blind-left video, #blind-right video')].map(v => v.currentSrc)"
        )
        assert all(re.fullmatch(r"[0-9a-f]{32}\.mp4", source.rpartition("/")[2]) for source in sources)
        page.click("#blind-vote-left")
        wait_for_text(page, "#blind-said", f"of {asked} right", 10_000)
        assert page.locator("#blind-vote-left").is_disabled()
    seen.shot("blind-test")
