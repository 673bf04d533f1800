"""Film the page: python -m tests.app.film --out docs/media

Writes demo.mp4 (the wipe, a pattern, the sweep) and demo.png (the first view); needs Chromium (tests/app/browser.py).
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dit_sparse.search.staging import staged
from dit_sparse.search.video import write_mp4
from tests.app.browser import launched, visitor
from tests.app.serving import served, tab, wait_for_text

SIZE = {"width": 1120, "height": 720}
FPS = 8.0


class Film:
    """Collect pictures of a page."""

    def __init__(self, page: Any) -> None:
        self.page = page
        self.frames: list[Any] = []

    def take(self, count: int) -> None:
        """Take some pictures, one after the other."""
        for _ in range(count):
            picture = Image.open(io.BytesIO(self.page.screenshot())).convert("RGB")
            self.frames.append(np.asarray(picture))


def film(page: Any) -> list[Any]:
    """Play the tour; return its frames."""
    shots = Film(page)
    shots.take(6)
    box = page.locator("#player .wipe").bounding_box()
    middle = box["y"] + box["height"] / 2
    page.mouse.move(box["x"] + box["width"] / 2, middle)
    page.mouse.down()
    for share in [*np.linspace(0.5, 0.1, 8), *np.linspace(0.1, 0.9, 14), *np.linspace(0.9, 0.5, 8)]:
        page.mouse.move(box["x"] + box["width"] * share, middle)
        shots.take(1)
    page.mouse.up()
    page.get_by_label("neighborhood-window-0.3").check()
    shots.take(10)
    tab(page, "See the pattern")
    page.click("#look")
    wait_for_text(page, "#mask-said", "neighborhood")
    page.locator("#sheet").scroll_into_view_if_needed()
    for place in ("2", "8", "14"):
        page.locator("#column input").fill(place)
        page.click("#show-token")
        wait_for_text(page, "#sheet-said", f"column {place}")
        shots.take(6)
    tab(page, "Sweep")
    page.locator("#pareto").scroll_into_view_if_needed()
    shots.take(12)
    return shots.frames


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    with served() as server, launched() as browser, visitor(browser, SIZE) as seen:
        seen.page.goto(server.address)
        seen.page.wait_for_function("[...document.querySelectorAll('#player video')].every(v => v.readyState >= 3)")
        seen.page.wait_for_timeout(1000)
        picture = seen.page.screenshot(full_page=False)
        frames = film(seen.page)
        assert seen.complaints() == []
    with staged(out) as folder:
        Image.open(io.BytesIO(picture)).convert("RGB").quantize(128).save(folder / "demo.png", optimize=True)
        write_mp4(folder / "demo.mp4", np.stack(frames), FPS)
    print(out / "demo.mp4", out / "demo.png")


if __name__ == "__main__":
    main()
