"""One thread for tiny models; and say which classes the installed diffusers lacks, for their cases did not run."""

from __future__ import annotations

from collections.abc import Iterator

import diffusers
import pytest
import torch
from _pytest.terminal import TerminalReporter

from tests.models.cases import CASES


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the matrices are tiny; more threads only wait for each other
    yield
    torch.set_num_threads(threads)


def pytest_terminal_summary(terminalreporter: TerminalReporter) -> None:
    absent = sorted({case.model for case in CASES if not case.exists})
    if absent:
        terminalreporter.write_line(f"diffusers {diffusers.__version__} lacks, so not tested: {', '.join(absent)}")
