"""The player over the stored comparison, in a real browser: it plays, it keeps both clips together, it obeys."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from dit_sparse.search.report import load_report
from tests.app.browser import PHONE, Visitor
from tests.app.stage import STORED, stage

# the average brightness of what a video shows now, from a canvas, and its mean absolute difference from another video
BRIGHTNESS = """video => { const c = document.createElement("canvas"); c.width = 64; c.height = 64;
  const p = c.getContext("2d"); p.drawImage(video, 0, 0, 64, 64); const d = p.getImageData(0, 0, 64, 64).data;
  let sum = 0; for (let i = 0; i < d.length; i += 4) sum += d[i] + d[i + 1] + d[i + 2]; return sum / (3 * 64 * 64); }"""
TIMES = (
    """() => { const [a, b] = document.querySelectorAll("#player video"); return [a.currentTime, b.currentTime]; }"""
)
PLAYING = """() => [...document.querySelectorAll("#player video")].length === 2
  && [...document.querySelectorAll("#player video")].every(v => v.readyState >= 2 && v.videoWidth > 0 && !v.paused
  && v.currentTime > 0.1)"""
STILL = (
    """() => [...document.querySelectorAll("#player video")].every(v => v.readyState >= 2 && v.paused && !v.seeking)"""
)
WIDER = "() => document.documentElement.scrollWidth - document.documentElement.clientWidth"


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with stage() as served:
        yield served


@pytest.fixture
def playing(address: str, open_page: Callable[..., Visitor]) -> Visitor:
    seen = open_page(address)
    seen.page.wait_for_function(PLAYING)
    return seen


def frames(seen: Visitor) -> list[int]:
    """Compute the frame that each clip stands at from its own time and its own length."""
    count = load_report(STORED)["request"]["frames"]
    pairs = seen.page.eval_on_selector_all("#player video", "vs => vs.map(v => [v.currentTime, v.duration])")
    return [int(time / duration * count) for time, duration in pairs]


def pause(seen: Visitor) -> None:
    seen.page.click("#player .play")
    seen.page.wait_for_function(STILL)


def crop(seen: Visitor, left: float, right: float) -> bytes:
    """Take the pixels of a part of the picture, given as shares of its width, away from names and handle."""
    box = seen.page.locator("#player .stage").bounding_box()
    top, high = box["y"] + 0.2 * box["height"], 0.6 * box["height"]
    clip = {"x": box["x"] + left * box["width"], "y": top, "width": (right - left) * box["width"], "height": high}
    return seen.page.screenshot(clip=clip)


def test_both_clips_play_in_sync(playing: Visitor) -> None:
    page = playing.page
    before = page.evaluate(TIMES)
    page.wait_for_timeout(2000)
    samples = [page.evaluate(TIMES) for _ in range(5)]
    for dense, sparse in samples:
        assert abs(dense - sparse) < 0.05, samples
    assert samples[-1] != before
    for video in page.query_selector_all("#player video"):
        assert video.evaluate(BRIGHTNESS) > 20  # not black
        assert video.evaluate("v => v.muted && v.playsInline")
    playing.shot("player")


def test_clips_start_over_together(playing: Visitor) -> None:
    page = playing.page
    length = page.eval_on_selector("#player .dense", "v => v.duration")
    page.evaluate("() => document.querySelectorAll('#player video').forEach(v => { v.currentTime = v.duration - 0.3 })")
    page.wait_for_function(f"() => document.querySelector('#player .dense').currentTime < {length / 2}")
    page.wait_for_timeout(700)
    dense, sparse = page.evaluate(TIMES)
    assert 0 < dense < length / 2
    assert abs(dense - sparse) < 0.05
    assert page.inner_text("#player .play") == "Pause"
    page.uncheck("#player .loop")
    page.evaluate("() => document.querySelectorAll('#player video').forEach(v => { v.currentTime = v.duration - 0.2 })")
    page.wait_for_function("() => document.querySelector('#player .dense').ended")
    assert page.inner_text("#player .play") == "Play"


def test_a_clip_that_drifts_is_caught(playing: Visitor) -> None:
    page = playing.page
    for shift in (0.15, 1.0):  # run faster; seek
        page.evaluate(f"() => {{ document.querySelector('#player .sparse').currentTime += {shift} }}")
        page.wait_for_timeout(1200)
        dense, sparse = page.evaluate(TIMES)
        assert abs(dense - sparse) < 0.05, (shift, dense, sparse)


def test_pause_puts_both_on_one_frame(playing: Visitor) -> None:
    pause(playing)
    first, second = frames(playing)
    assert first == second
    assert playing.page.inner_text("#player .number") == f"frame {first + 1} of 33"
    before = playing.page.evaluate(TIMES)
    playing.page.wait_for_timeout(300)
    assert playing.page.evaluate(TIMES) == before


def test_scrubber_seeks_both(playing: Visitor) -> None:
    page = playing.page
    wanted = random.sample(range(33), 4)
    for frame in wanted:
        page.locator("#player .scrubber").fill(str(frame))
        page.wait_for_function(STILL)
        assert frames(playing) == [frame, frame]
        assert page.get_attribute("#player .scrubber", "aria-valuetext") == f"frame {frame + 1} of 33"
    # the picture is that frame of the file: another one looks different
    page.locator("#player .scrubber").fill("3")
    page.wait_for_function(STILL)
    one = crop(playing, 0.0, 0.4)
    page.locator("#player .scrubber").fill("7")
    page.wait_for_function(STILL)
    assert crop(playing, 0.0, 0.4) != one


def test_wipe_by_mouse_and_by_keyboard(playing: Visitor) -> None:
    page = playing.page
    pause(playing)
    box = page.locator("#player .stage").bounding_box()
    share = random.uniform(0.3, 0.8)
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.mouse.down()
    page.mouse.move(box["x"] + share * box["width"], box["y"] + box["height"] / 3, steps=4)
    page.mouse.up()
    at = float(page.input_value("#player .wipe")) / 100
    assert at == pytest.approx(share, abs=0.015)
    line = page.locator("#player .line").bounding_box()
    assert line["x"] + line["width"] / 2 == pytest.approx(box["x"] + at * box["width"], abs=1.5)
    clip = page.eval_on_selector("#player .sparse", "v => getComputedStyle(v).clipPath")
    assert f"{round(100 * at)}%" in clip
    page.keyboard.press("ArrowLeft")
    assert float(page.input_value("#player .wipe")) / 100 == pytest.approx(at - 0.01)
    page.keyboard.press("Home")
    assert page.input_value("#player .wipe") == "0"
    assert page.get_attribute("#player .wipe", "aria-valuetext") == "0 % dense, 100 % sparse"


def test_each_side_of_the_wipe_shows_its_clip(address: str, open_page: Callable[..., Visitor]) -> None:
    """The neighborhood plan's clip is far from dense: the ends of the wipe differ, and each is the clip of its name."""
    page = (seen := open_page(address)).page
    page.get_by_label("neighborhood-window-0.3").check()
    page.wait_for_function("() => document.querySelector('#player .sparse-name').textContent.includes('neighborhood')")
    page.locator("#player .scrubber").fill("16")
    page.wait_for_function(STILL)
    page.locator("#player .wipe").fill("100")
    only_dense = crop(seen, 0.05, 0.9)
    page.locator("#player .wipe").fill("0")
    only_sparse = crop(seen, 0.1, 0.95)
    page.locator("#player .wipe").fill("50")
    assert crop(seen, 0.05, 0.4) != crop(seen, 0.6, 0.95)
    assert only_dense != only_sparse
    # hiding the dense clip changes nothing where the sparse one covers it, and turns the other side black
    left, right = crop(seen, 0.05, 0.4), crop(seen, 0.6, 0.95)
    page.eval_on_selector("#player .dense", "v => { v.style.visibility = 'hidden' }")
    assert crop(seen, 0.6, 0.95) == right
    assert crop(seen, 0.05, 0.4) != left


def test_keyboard(playing: Visitor) -> None:
    page = playing.page
    page.focus("#player .wipe")
    page.keyboard.press(" ")
    page.wait_for_function(STILL)
    page.focus("#player .play")
    before = frames(playing)[0]
    page.keyboard.press("ArrowRight")
    page.wait_for_function(STILL)
    assert frames(playing) == [min(before + 1, 32)] * 2
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowLeft")
    page.wait_for_function(STILL)
    assert frames(playing) == [max(min(before + 1, 32) - 2, 0)] * 2
    page.keyboard.press(" ")  # the button's own
    page.wait_for_function("() => !document.querySelector('#player .dense').paused")
    page.focus("#player .scrubber")
    page.keyboard.press("End")
    page.wait_for_function(STILL)
    assert frames(playing) == [32, 32]
    page.focus("#player .wipe")
    order = []
    for _ in range(4):
        order.append(page.evaluate("() => document.activeElement.className"))
        page.keyboard.press("Tab")
    assert order == ["wipe", "play", "scrubber", "loop"]
    unnamed = page.eval_on_selector_all(
        "#player input, #player button",
        "all => all.filter(e => !(e.ariaLabel || e.textContent.trim() || e.labels?.[0]?.textContent.trim())).length",
    )
    assert unnamed == 0


def test_another_value_swaps_the_clip_and_keeps_the_frame(playing: Visitor) -> None:
    page = playing.page
    page.locator("#player .scrubber").fill("11")
    page.wait_for_function(STILL)
    page.get_by_label("radial-kind-block").check()
    page.wait_for_function(
        "() => document.querySelector('#player .sparse').currentSrc.endsWith('radial-kind-block.mp4')"
    )
    page.wait_for_function("() => document.querySelector('#player .sparse-name').textContent.includes('radial')")
    page.wait_for_function(STILL)
    assert page.inner_text("#player .sparse-name") == "sparse: radial-kind-block"
    assert frames(playing) == [11, 11]
    page.get_by_label("nothing").check()
    page.wait_for_selector("#player .message:visible")
    assert not page.is_visible("#player .stage")
    page.get_by_label("balanced").check()
    page.wait_for_selector("#player .stage:visible")
    page.click("#player .play")
    page.wait_for_function(PLAYING)


def test_a_clip_that_cannot_be_loaded_is_told(address: str, chromium: Any) -> None:
    from tests.app.browser import visitor

    with visitor(chromium) as seen:
        seen.context.route("**/sparse-balanced.mp4", lambda route: route.fulfill(status=404))
        seen.page.goto(address)
        seen.page.wait_for_selector("#player .message:has-text('could not be loaded')")
        assert seen.errors, "the browser tells the 404 by itself"
        seen.page.get_by_label("radial-kind-block").check()
        seen.page.wait_for_function(PLAYING)


def test_handle_and_names_are_seen_on_any_picture(playing: Visitor) -> None:
    """White on black with a white rim: some of it stands out from every colour beneath."""
    look = "e => { const s = getComputedStyle(e); return [s.color, s.backgroundColor, s.borderTopColor] }"
    for caption in playing.page.query_selector_all("#player .caption span"):
        assert caption.evaluate(look) == ["rgb(255, 255, 255)", "rgba(0, 0, 0, 0.82)", "rgb(255, 255, 255)"]
        assert caption.is_visible()
    grip = playing.page.query_selector("#player .grip").evaluate(look)
    assert grip[1:] == ["rgb(255, 255, 255)", "rgb(0, 0, 0)"]
    for colour in ("#fff", "#000", "#f00"):
        playing.page.eval_on_selector_all("#player video", "vs => vs.forEach(v => { v.style.visibility = 'hidden' })")
        playing.page.eval_on_selector("#player .stage", "(e, c) => { e.style.background = c }", colour)
        playing.shot(f"handle on {colour[1:]}", full_page=False)


# a phone's width; dark and light
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_phone(theme: str, address: str, open_page: Callable[..., Visitor]) -> None:
    seen = open_page(f"{address}/?__theme={theme}", viewport=PHONE, colour_scheme=theme)
    seen.page.wait_for_function(PLAYING)
    assert seen.page.evaluate(WIDER) <= 0
    for part in ("stage", "play", "scrubber", "number", "loop"):
        box = seen.page.locator(f"#player .{part}").bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= PHONE["width"], part
    assert seen.page.locator("#player .stage").bounding_box()["width"] > 300
    assert seen.page.locator("#player .scrubber").bounding_box()["width"] > 100
    seen.shot(f"phone {theme}")


def test_reduced_motion_starts_still(address: str, chromium: Any) -> None:
    context = chromium.new_context(reduced_motion="reduce")
    page = context.new_page()
    page.goto(address)
    page.wait_for_selector("#player .stage:visible")
    page.wait_for_timeout(500)
    assert page.evaluate(TIMES) == [0, 0]
    assert page.inner_text("#player .play") == "Play"
    context.close()
