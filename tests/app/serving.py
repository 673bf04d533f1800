"""The page as it is served, for tests: the bundled model at a size that takes seconds."""

from __future__ import annotations

import socket
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from dit_sparse.app.demo import Server, launch

SMALL = {"steps": 3, "frames": 9, "height": 32, "width": 32}  # 5 x 8 x 8 tokens, so few that all calls run dense
SPARSE = {"steps": 4, "frames": 33, "height": 48, "width": 48}  # 17 x 12 x 12
LONG = {"steps": 24, "frames": 33, "height": 64, "width": 64}
MINUTE = 60_000


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@contextmanager
def served(**options: Any) -> Iterator[Server]:
    """Serve the page on a free port."""
    server = launch(port=free_port(), device="cpu", block=False, **options)
    try:
        yield server
    finally:
        server.close()


def fetch(address: str) -> bytes:
    with urllib.request.urlopen(address, timeout=20) as answer:
        return bytes(answer.read())


def fill(page: Any, where: str, values: dict[str, int]) -> None:
    """Type numbers into the controls of a tab."""
    for name, value in values.items():
        field = page.locator(f"#{where}-{name} input")
        field.fill(str(value))
        field.press("Tab")


def tab(page: Any, name: str) -> None:
    page.get_by_role("tab", name=name).click()


def wait_for_text(page: Any, selector: str, words: str, timeout: int = 2 * MINUTE) -> str:
    """Wait until an element holds some words; return all of its text."""
    page.wait_for_function(
        "([selector, words]) => document.querySelector(selector)?.innerText.includes(words)",
        arg=[selector, words],
        timeout=timeout,
    )
    return str(page.inner_text(selector))
