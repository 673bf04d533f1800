"""What a job tells the page while it runs: it begins with a Stage or Waiting and ends with one of LAST."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Waiting:
    """Another job runs; `ahead` counts it and those that wait too."""

    ahead: int


@dataclass(frozen=True)
class Beat:
    """Nothing new."""


@dataclass(frozen=True)
class Stage:
    """Something begins. run: "dense", a plan's run name, "another seed", or "" for what serves all runs.

    part: "generating", "warm-up", "timing attention", "monitoring"; of no run: "loading the model", "measuring",
    "writing".
    """

    run: str
    part: str


@dataclass(frozen=True)
class Step:
    """A denoising step of the present stage ended."""

    run: str
    part: str
    done: int
    total: int


@dataclass(frozen=True, eq=False)
class Preview:
    """Show what a frame of a run looks like so far: RGB [H, W, 3]."""

    run: str
    frame: NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class Finished:
    """The comparison is done; `folder` holds the clips and `report`, as `search.compare.write` wrote them."""

    folder: Path
    report: dict[str, Any]


@dataclass(frozen=True, eq=False)
class Done:
    """A borrowed pipeline is back; `value` is what the task returned."""

    value: Any


@dataclass(frozen=True)
class Failed:
    """The job ended with an error. log_id: where its traceback is in the log; None for what the visitor can mend."""

    message: str
    log_id: str | None = None


@dataclass(frozen=True)
class Stopped:
    """The visitor ended the job."""


Event = Waiting | Beat | Stage | Step | Preview | Finished | Done | Failed | Stopped
LAST = (Finished, Done, Failed, Stopped)


class StopJob(Exception):
    """Raised between two steps to end a job."""


def stage_of(what: str) -> Stage:
    """Read the words of a comparison's progress: "dense", "fast: warm-up", "measuring"."""
    if what in ("loading the model", "measuring", "writing"):
        return Stage("", what)
    run, _, part = what.partition(": ")
    return Stage(run, part or "generating")
