"""What a visitor of the page may ask for: bounds, and checks that tell a visitor what to change."""

from __future__ import annotations

import math
import unicodedata
from dataclasses import dataclass, replace
from typing import Any

import torch

from dit_sparse.grid import Grid
from dit_sparse.patterns import Cached, TopBlocks
from dit_sparse.pipelines.generate import Job, known_transformers
from dit_sparse.pipelines.geometry import expected_grid, size_steps
from dit_sparse.plan import Plan

MOST_SEED = 2**32 - 1
BLOCK_TOKENS = 128
MOST_BLOCKS_FACTOR = 4  # times the fewest that a grid can be cut in
MOST_BLOCKS_OF_SMALL_GRIDS = 256


@dataclass(frozen=True)
class Limits:
    """Bound one job and the line of jobs. The defaults suit the bundled model on a CPU: some minutes for a job."""

    tokens: int = 10_000
    steps: int = 24
    frames: int = 49
    side_pixels: int = 128
    prompt_characters: int = 300
    plans: int = 4
    upload_bytes: int = 256 * 1024
    waiting: int = 8  # jobs that wait while one runs

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < (0 if name == "waiting" else 1):
                raise ValueError(f"the limit {name} must be at least 1, got {value}")

    @classmethod
    def of(cls, device: str) -> Limits:
        """Return the defaults for a device."""
        if torch.device(device).type == "cpu":
            return cls()
        return cls(tokens=120_000, steps=60, frames=161, side_pixels=1280, prompt_characters=1000, plans=8)


@dataclass(frozen=True)
class Ask:
    """Say what a visitor wants to see; None leaves a value to the model's default. Nothing in it is checked yet.

    plan: a preset or a pattern as text, or a plan that `Studio.read_plan` read.
    yardstick, monitor: see `search.request.Request` and `Options`; each costs a run more.
    """

    prompt: str
    plan: str | Plan = "balanced"
    seed: int = 0
    steps: int | None = None
    frames: int | None = None
    height: int | None = None
    width: int | None = None
    yardstick: bool = False
    monitor: bool = False


def check_prompt(text: object, limits: Limits) -> str:
    """Return a prompt on one line.

    Raises:
        ValueError: empty, too long, or with characters that are no text.
    """
    if not isinstance(text, str):
        raise ValueError(f"the prompt must be text, got {type(text).__name__}")
    if len(text) > limits.prompt_characters:
        raise ValueError(
            f"the prompt has {len(text):,} characters, at most {limits.prompt_characters:,} are taken here; shorten it"
        )
    line = " ".join(text.split())
    if not line:
        raise ValueError("the prompt is empty; say what the clip should show")
    # Cc: control characters, Cs: halves of surrogate pairs, which no encoder takes
    bad = next((mark for mark in line if unicodedata.category(mark) in ("Cc", "Cs")), None)
    if bad is not None:
        raise ValueError(f"the prompt holds the control character U+{ord(bad):04X}; take it out")
    return line


def check_whole(name: str, value: object, least: int, most: int) -> int:
    """Return a whole number between two bounds; a page may send 5.0 for 5.

    Raises:
        ValueError: not a whole number, or out of bounds.
    """
    whole = isinstance(value, (int, float)) and not isinstance(value, bool) and value == value // 1
    if not whole:
        raise ValueError(f"{name} must be a whole number from {least:,} to {most:,}, got {value!r}")
    number = int(value)  # type: ignore[call-overload]
    if not least <= number <= most:
        way_out = f"choose at most {most:,}" if number > most else f"choose at least {least:,}"
        raise ValueError(f"{name} must lie between {least:,} and {most:,} here, got {number:,}; {way_out}")
    return number


def check_ask(ask: Ask, limits: Limits) -> Job:
    """Return the job that a visitor asks for, checked as far as no model is needed; None stays None.

    Raises:
        ValueError: names the first thing that is out of bounds.
    """
    sizes: dict[str, Any] = {
        name: None if getattr(ask, name) is None else check_whole(name, getattr(ask, name), 1, most)
        for name, most in _bounds(limits).items()
    }
    return replace(Job(check_prompt(ask.prompt, limits), check_whole("seed", ask.seed, 0, MOST_SEED)), **sizes)


def check_size(pipe: Any, job: Job, limits: Limits) -> Grid | None:
    """Hold a job whose open values are filled in against the model: bounds, multiples, then tokens.

    Returns the grid, or None where the model's configs do not tell it.

    Raises:
        ValueError: a value is out of bounds, a side or the number of frames no multiple, or there are too many tokens.
    """
    for name, most in _bounds(limits).items():
        if getattr(job, name) is not None:
            check_whole(name, getattr(job, name), 1, most)
    steps, sides = size_steps(pipe), (job.height, job.width)
    if job.height is None or job.width is None:
        raise ValueError("this model does not say which size it takes; choose height and width")
    if steps is None:
        return None
    frames = job.frames or 1
    if (frames - 1) % steps[0]:
        near = _near(frames - 1, steps[0])
        raise ValueError(
            f"frames must be 1 more than a multiple of {steps[0]} for this model, got {frames}; choose {near + 1}"
        )
    for name, side, step in zip(("height", "width"), sides, steps[1:], strict=True):
        if side is not None and side % step:
            near = max(step, _near(side, step))
            raise ValueError(f"{name} must be a multiple of {step} for this model, got {side}; choose {near}")
    transformer = next(iter(known_transformers(pipe).values()))
    grid = expected_grid(transformer, pipe.vae.config, frames, job.height, job.width)
    if grid is not None and grid.tokens > limits.tokens:
        raise ValueError(
            f"{frames} frames of {job.height} x {job.width} pixels are {grid.tokens:,} tokens, at most "
            f"{limits.tokens:,} are taken here; choose fewer frames or a smaller size"
        )
    return grid


def check_blocks(plan: Plan, grid: Grid) -> None:
    """Refuse a plan that cuts the grid in very many blocks or clusters: every pair of them is scored.

    Raises:
        ValueError: names the pattern, its blocks and the most that are taken; or a pattern that does not fit the grid.
    """
    most = max(MOST_BLOCKS_OF_SMALL_GRIDS, MOST_BLOCKS_FACTOR * math.ceil(grid.tokens / BLOCK_TOKENS))
    for pattern in dict.fromkeys(rule.pattern for rule in plan.rules):
        pattern.check(grid)
        chooser = pattern.pattern if isinstance(pattern, Cached) else pattern
        blocks = pattern.token_order().layout(grid).blocks
        if isinstance(chooser, TopBlocks) and chooser.clusters is not None:
            blocks = max(blocks, *_pair(chooser.clusters))
        if blocks > most:
            raise ValueError(
                f"{pattern} cuts {grid.tokens:,} tokens in {blocks:,} blocks or clusters, at most {most:,} are taken "
                f"here; choose larger ones: a block holds up to {BLOCK_TOKENS} tokens"
            )


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return value if isinstance(value, tuple) else (value, value)


def _bounds(limits: Limits) -> dict[str, int]:
    side = limits.side_pixels
    return {"steps": limits.steps, "frames": limits.frames, "height": side, "width": side}


def _near(value: int, step: int) -> int:
    """Round down to a multiple, so that what is proposed breaks no other limit."""
    return value // step * step
