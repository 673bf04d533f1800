"""Folders of results: few, none for long, and none after the app."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dit_sparse.app.results import Results


@pytest.fixture
def results() -> Iterator[Results]:
    results = Results(most=3)
    yield results
    results.close()


def test_few_are_kept(results: Results) -> None:
    made = [results.new() for _ in range(5)]
    (made[-1] / "report.json").write_text("{}")
    assert {path.name for path in results.folder.iterdir()} == {path.name for path in made[2:]}
    assert results.folder.stat().st_mode & 0o077 == 0, "other users of this machine cannot look in"


def test_others_are_left_alone(results: Results, tmp_path: Path) -> None:
    results.remove(tmp_path)
    assert tmp_path.exists()
    results.remove(results.folder)
    assert results.folder.exists()


def test_old_ones_go() -> None:
    """By the thread that looks every 20 ms."""
    results = Results(lifetime_seconds=0.2, every_seconds=0.02)
    old = results.new()
    deadline = time.monotonic() + 20
    while old.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    young = results.new()
    results.expire()
    assert young.exists()
    results.close()
    results.close()
    assert not results.folder.exists()


def test_closing_ends_the_thread() -> None:
    before = threading.active_count()
    results = Results(every_seconds=0.02)
    results.close()
    deadline = time.monotonic() + 20
    while threading.active_count() > before:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_nothing_is_left_when_the_app_ends() -> None:
    """Also when it ends by an error."""
    code = "from dit_sparse.app.results import Results; r = Results(); r.new(); print(r.folder); raise SystemExit(3)"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ended.returncode == 3
    assert ended.stdout.strip()
    assert not Path(ended.stdout.strip()).exists()


@pytest.mark.parametrize(("most", "lifetime", "every"), [(0, 1.0, 1.0), (1, 0.0, 1.0), (1, 1.0, -1.0)])
def test_limits_must_be_positive(most: int, lifetime: float, every: float) -> None:
    with pytest.raises(ValueError, match="positive"):
        Results(most, lifetime, every)
