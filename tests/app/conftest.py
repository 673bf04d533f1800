"""One Chromium for all tests of the page; each test gets a watched page of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from tests.app.browser import DESKTOP, Visitor, browser_is_mandatory, launched, visitor


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    """Give a running Chromium; without one skip, or fail where CI_BROWSER=1 says that there must be one."""
    with ExitStack() as stack:
        try:
            browser = stack.enter_context(launched())
        except (ImportError, FileNotFoundError) as error:
            if browser_is_mandatory():
                pytest.fail(f"CI_BROWSER=1 and no browser: {error}")
            pytest.skip(f"no browser: {error}")
        yield browser


@pytest.fixture
def open_page(chromium: Any) -> Iterator[Callable[..., Visitor]]:
    """Open pages `open_page(address, viewport=, colour_scheme=)`; at the end none may have erred or gone outside."""
    with ExitStack() as stack:
        seen: list[Visitor] = []

        def go(address: str, viewport: dict[str, int] = DESKTOP, colour_scheme: str = "light") -> Visitor:
            found = stack.enter_context(visitor(chromium, viewport, colour_scheme))
            seen.append(found)
            found.page.goto(address)
            return found

        yield go
        complaints = [complaint for one in seen for complaint in one.complaints()]
        assert not complaints, complaints


@pytest.fixture
def browser_page(open_page: Callable[..., Visitor]) -> Visitor:
    """Give one watched page on a desktop, in light colours."""
    return open_page("about:blank")
