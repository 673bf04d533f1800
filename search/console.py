"""How the command line talks: results on stdout, progress on stderr, no colours where NO_COLOR or a pipe says so."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence

from rich import box
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table


def stdout() -> Console:
    """Return a console for results: no markup, no highlighting, wide where it is not a terminal."""
    console = Console(markup=False, highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console.width = 160
    return console


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """Lay out rows of text; numbers are expected as text, all but the first column to the right."""
    laid = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for i, heading in enumerate(headings):
        laid.add_column(heading, justify="left" if i == 0 else "right", no_wrap=True)
    for row in rows:
        laid.add_row(*row)
    return laid


@contextlib.contextmanager
def progress_on_stderr(silent: bool = False, remaining: bool = False) -> Iterator[Callable[[str, int, int], None]]:
    """Give a function (what, done, total): a live bar on a terminal, one line a stage elsewhere.

    remaining: estimate the time that is left of each stage, too.
    """
    console = Console(stderr=True, markup=False, highlight=False)
    if silent:
        yield lambda what, done, total: None
    elif console.is_terminal:
        with _bars(console, remaining) as bars:
            current: dict[str, TaskID] = {}

            def show(what: str, done: int, total: int) -> None:
                if what not in current:
                    for task in current.values():
                        bars.stop_task(task)
                    current[what] = bars.add_task(what, total=total)
                bars.update(current[what], completed=done)

            yield show
    else:
        yield _lines(console)


@contextlib.contextmanager
def library_prints_on_stderr() -> Iterator[None]:
    """Send to stderr what compiled libraries print on stdout (HiGHS may, against its settings: HiGHS#2783)."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def _bars(console: Console, remaining: bool) -> Progress:
    columns: list[ProgressColumn] = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()]
    columns += [TimeElapsedColumn(), *([TextColumn("left"), TimeRemainingColumn()] if remaining else [])]
    return Progress(*columns, console=console)


def _lines(console: Console) -> Callable[[str, int, int], None]:
    start, seen = time.perf_counter(), set[str]()

    def show(what: str, done: int, total: int) -> None:
        if what not in seen:
            seen.add(what)
            steps = f", {total} steps" if total > 1 else ""
            console.print(f"[{time.perf_counter() - start:6.1f} s] {what}{steps}", soft_wrap=True)

    return show
