"""Fixtures of the pipeline tests: tiny pipelines, and a recorder of what the Schedule is told."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from dit_sparse.grid import Grid
from dit_sparse.schedule import Schedule
from tests.pipelines.tiny import PIPELINES


@dataclass(frozen=True)
class Told:
    """One call of Schedule.start_forward."""

    transformer: str
    grid: Grid | None
    step: int | None
    total_steps: int | None
    branch: str | None
    run: object
    reason: str | None


@pytest.fixture(autouse=True)
def _few_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the matrices are tiny; more threads only wait for each other
    yield
    torch.set_num_threads(threads)


# the two differ in dispatch (dispatcher / SDPA), place of the text (cross / prefix) and guidance (two calls / one)
@pytest.fixture(params=sorted(PIPELINES))
def pipe(request: pytest.FixtureRequest) -> Any:
    return PIPELINES[request.param]()


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[Told]:
    calls: list[Told] = []
    start_forward = Schedule.start_forward

    def record(self: Schedule, grid: Grid | None, **where: Any) -> None:
        position = {name: where[name] for name in ("step", "total_steps", "branch", "run", "reason")}
        calls.append(Told(self.transformer, grid, **position))
        start_forward(self, grid, **where)

    monkeypatch.setattr(Schedule, "start_forward", record)
    return calls
