"""A Chromium for the tests of the page: it sees 127.0.0.1 alone, and anything that goes wrong in it fails the test."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

ARGUMENTS = ("--no-sandbox", "--disable-gpu", "--autoplay-policy=no-user-gesture-required")
PHONE = {"width": 390, "height": 844}
DESKTOP = {"width": 1280, "height": 900}


def chromium_path() -> str | None:
    """Find a Chromium that plays H.264: Debian's, or the one that DIT_SPARSE_CHROMIUM names.

    Raises:
        FileNotFoundError: DIT_SPARSE_CHROMIUM names no file.
    """
    asked = os.environ.get("DIT_SPARSE_CHROMIUM")
    if asked and not Path(asked).is_file():
        raise FileNotFoundError(f"DIT_SPARSE_CHROMIUM={asked} is no file; unset it or name a Chromium")
    return asked or shutil.which("chromium")


def browser_is_mandatory() -> bool:
    return os.environ.get("CI_BROWSER") == "1"


@contextmanager
def launched() -> Iterator[Any]:
    """Start Chromium and give playwright's Browser.

    Raises:
        ImportError: playwright is not installed.
        FileNotFoundError: there is no Chromium.
    """
    from playwright.sync_api import sync_playwright

    path = chromium_path()
    if path is None:
        raise FileNotFoundError("no chromium in PATH: apt-get install chromium, or set DIT_SPARSE_CHROMIUM")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=list(ARGUMENTS))
        yield browser
        browser.close()


@dataclass
class Visitor:
    """Hold one page of a browser context of its own, and what it did that no page of ours may do."""

    page: Any
    context: Any
    outside: list[str] = field(default_factory=list)  # requests that were aborted
    errors: list[str] = field(default_factory=list)  # of the console and of scripts

    def shot(self, name: str, full_page: bool = True) -> None:
        """Save a screenshot where DIT_SPARSE_SCREENSHOTS says; without it, none."""
        folder = os.environ.get("DIT_SPARSE_SCREENSHOTS")
        if folder:
            Path(folder).mkdir(parents=True, exist_ok=True)
            safe = re.sub(r"[^\w.-]+", "-", name)
            self.page.screenshot(path=str(Path(folder) / f"{safe}.png"), full_page=full_page)

    def complaints(self) -> list[str]:
        return [f"request to {url}" for url in self.outside] + self.errors


@contextmanager
def visitor(browser: Any, viewport: dict[str, int] = DESKTOP, colour_scheme: str = "light") -> Iterator[Visitor]:
    """Open an empty page that is watched; the caller asserts on `complaints` before it closes."""
    context = browser.new_context(viewport=viewport, color_scheme=colour_scheme)
    found = Visitor(context.new_page(), context)

    def guard(route: Any) -> None:
        address = urlsplit(route.request.url)
        if address.scheme in ("data", "blob", "about") or address.hostname == "127.0.0.1":
            route.continue_()
        else:
            found.outside.append(route.request.url)
            route.abort()

    def hear(message: Any) -> None:
        if message.type == "error":
            found.errors.append(f"console: {message.text} ({message.location.get('url', '')})")

    context.route("**/*", guard)
    found.page.on("console", hear)
    found.page.on("pageerror", lambda error: found.errors.append(f"page: {error}"))
    try:
        yield found
    finally:
        context.close()
