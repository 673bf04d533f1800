"""What a search is asked for, checked as far as it can be without the model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from dit_sparse.kernels.backends import BACKENDS
from dit_sparse.pipelines.generate import Job
from dit_sparse.search.planner.candidates import DENSITIES
from dit_sparse.search.planner.gate import USUAL, Gate
from dit_sparse.search.planner.groups import StepGroups
from dit_sparse.search.planner.price_table import MEASURED
from dit_sparse.search.planner.scoring import ROWS

PROMPTS = Path(__file__).with_name("prompts.json")
CALIBRATION, HELD_OUT = 4, 8  # shipped prompts that are used where the user names none


@dataclass(frozen=True)
class Search:
    """Say what to search.

    job: size, steps and guidance of every clip; its prompt and seed are not used. prompts are scored with seed 0,
    held_out are rendered with each of seeds. minutes: limit of all of it, None for none. sensitivity: render probes
    that tell how much each part of the model matters; None where about a third of the time allows it. batch: clips
    that are rendered in one call, for which calls are priced, too. prices: "measured" on this machine; "shipped" or
    a file: predicted for another one (see `price_table`). against: render the uniform patterns nearest to the plan,
    too.
    """

    job: Job
    prompts: tuple[str, ...]
    held_out: tuple[str, ...]
    seeds: tuple[int, ...] = (0,)
    gate: Gate = field(default_factory=lambda: Gate.parse(USUAL))
    minutes: float | None = None
    specs: tuple[str, ...] | None = None
    densities: tuple[float, ...] = DENSITIES
    groups: StepGroups = field(default_factory=StepGroups)
    backend: str = "auto"
    rows: int = ROWS
    batch: int = 1
    prices: str = MEASURED
    against: bool = False
    sensitivity: bool | None = None
    most_trials: int = 8

    def __post_init__(self) -> None:
        for name in ("prompts", "held_out"):
            if not getattr(self, name) or not all(text.strip() for text in getattr(self, name)):
                raise ValueError(f"{name} must hold at least one prompt and no empty one, got {getattr(self, name)!r}")
        if not self.seeds:
            raise ValueError("seeds must hold at least one number")
        if self.minutes is not None and not self.minutes > 0:
            raise ValueError(f"minutes must be positive, got {self.minutes}")
        if self.backend != "auto" and self.backend not in BACKENDS:
            raise ValueError(f"backend must be one of {', '.join(('auto', *BACKENDS))}, got {self.backend!r}")
        for name in ("rows", "batch", "most_trials"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    @property
    def calibration_jobs(self) -> tuple[Job, ...]:
        return tuple(replace(self.job, prompt=prompt, seed=0) for prompt in self.prompts)

    @property
    def held_out_jobs(self) -> tuple[Job, ...]:
        return tuple(replace(self.job, prompt=prompt, seed=seed) for prompt in self.held_out for seed in self.seeds)


def shipped_prompts(model: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return calibration and held-out prompts: those in the bundled model's words for `bundled`, others for any."""
    found = json.loads(PROMPTS.read_text(encoding="utf-8"))["bundled" if model == "bundled" else "any"]
    return tuple(found["calibration"]), tuple(found["held_out"])


def read_prompts(path: Path) -> tuple[str, ...]:
    """Read one prompt a line; empty lines and lines that begin with # do not count.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: no prompt is in it, or it is no text.
    """
    if not path.is_file():
        raise FileNotFoundError(f"prompts file {path} does not exist")
    try:
        lines: Sequence[str] = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"prompts file {path} is no UTF-8 text: {error}") from error
    found = tuple(line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#"))
    if not found:
        raise ValueError(f"prompts file {path} holds no prompt: write one a line")
    return found


def read_edges(text: str) -> tuple[float, ...]:
    """Read step edges such as 0,0.1,0.5,1.

    Raises: ValueError for what are no numbers; StepGroups refuses the rest.
    """
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"step edges must be numbers from 0 to 1 joined by commas, got {text!r}") from None
