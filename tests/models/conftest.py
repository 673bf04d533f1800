"""Say which classes the installed diffusers lacks: their cases did not run."""

from __future__ import annotations

import diffusers
from _pytest.terminal import TerminalReporter

from tests.models.cases import CASES


def pytest_terminal_summary(terminalreporter: TerminalReporter) -> None:
    absent = sorted({case.model for case in CASES if not case.exists})
    if absent:
        terminalreporter.write_line(f"diffusers {diffusers.__version__} lacks, so not tested: {', '.join(absent)}")
