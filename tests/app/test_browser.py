"""The watch on a page: what it lets through, what it stops, and when a missing browser is a failure."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.app import browser
from tests.app.browser import Visitor, visitor

ROOT = Path(__file__).resolve().parents[2]


def test_requests_to_others_are_stopped_and_told(chromium: Any) -> None:
    with visitor(chromium) as seen:
        seen.page.set_content("<p>here</p><img src='http://example.com/pixel.png'>")
        seen.page.wait_for_function("document.images[0].complete")
        assert seen.outside == ["http://example.com/pixel.png"]


def test_errors_are_told(chromium: Any) -> None:
    with visitor(chromium) as seen:
        seen.page.set_content(
            "<script>console.error('said'); setTimeout(() => { throw new Error('thrown') }, 0)</script>"
        )
        seen.page.wait_for_timeout(100)
        assert any("said" in error for error in seen.errors)
        assert any("thrown" in error for error in seen.errors)


def test_a_quiet_page_has_no_complaints(browser_page: Visitor) -> None:
    browser_page.page.set_content("<p>here</p><script>console.log('fine')</script>")
    assert browser_page.page.inner_text("p") == "here"
    assert browser_page.complaints() == []


def test_screenshots_go_where_asked(browser_page: Visitor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DIT_SPARSE_SCREENSHOTS", raising=False)
    browser_page.shot("none")
    monkeypatch.setenv("DIT_SPARSE_SCREENSHOTS", str(tmp_path / "new"))
    browser_page.shot("a page/of: mine")
    assert [path.name for path in tmp_path.rglob("*.png")] == ["a-page-of-mine.png"]


def test_a_wrong_path_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DIT_SPARSE_CHROMIUM", str(tmp_path / "none"))
    with pytest.raises(FileNotFoundError, match="DIT_SPARSE_CHROMIUM"):
        browser.chromium_path()


# skip for people, fail for CI
@pytest.mark.parametrize(("mandatory", "outcome"), [("0", "1 skipped"), ("1", "1 error")])
def test_a_missing_browser(mandatory: str, outcome: str, tmp_path: Path) -> None:
    case = f"{__file__}::test_a_quiet_page_has_no_complaints"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-rs", case],
        cwd=ROOT, capture_output=True, text=True, timeout=120, env={"PATH": str(tmp_path), "CI_BROWSER": mandatory},
    )  # fmt: skip
    assert outcome in done.stdout, done.stdout + done.stderr
    assert "apt-get install chromium" in done.stdout
