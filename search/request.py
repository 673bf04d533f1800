"""What a comparison is asked to do, checked as far as it can be without the model."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dit_sparse.options import Options
from dit_sparse.pipelines.generate import Job, check_device, default_device
from dit_sparse.plan import Plan
from dit_sparse.spec import parse_spec

# Steps of the separate attention pass, after which it stops: a CPU step takes seconds, and its calls vary little.
ATTENTION_STEPS = {"cpu": 1}
ATTENTION_STEPS_ACCELERATOR = 12


@dataclass(frozen=True)
class Request:
    """Say what to compare, on what, and where to put it."""

    job: Job
    plans: tuple[str, ...]
    out: Path
    model: str = "bundled"
    device: str = field(default_factory=default_device)
    dtype: str | None = None
    options: Options = field(default_factory=Options)
    fps: float = 8.0
    attention_steps: int | None = None
    yardstick: bool = False  # render another seed, too

    def __post_init__(self) -> None:
        if not self.plans:
            raise ValueError("at least one plan is needed, e.g. --plan balanced")
        check_device(self.device)
        if self.fps <= 0:
            raise ValueError(f"fps must be positive, got {self.fps}")
        if self.attention_steps is not None and self.attention_steps < 1:
            raise ValueError(f"attention_steps must be at least 1, got {self.attention_steps}")

    @property
    def enable_options(self) -> dict[str, Any]:
        names = ("backend", "min_tokens", "dense_steps", "dense_layers")
        return {name: getattr(self.options, name) for name in names}

    @property
    def most_attention_steps(self) -> int:
        return self.attention_steps or ATTENTION_STEPS.get(self.device, ATTENTION_STEPS_ACCELERATOR)


def check_request(request: Request, known: Mapping[str, Plan] | None = None) -> dict[str, Plan]:
    """Read the plans; return them under names that are unique and fit a file name.

    known: plans that are read already, by the words of `request.plans`; for these, no file or hub is asked.

    Raises:
        ValueError: an unknown pattern, field or value, a broken plan.
        FileNotFoundError: a plan's path does not exist.
    """
    plans: dict[str, Plan] = {}
    for spec in request.plans:
        plan = known[spec] if known is not None and spec in known else parse_spec(spec)
        name = slug(spec)
        while name in plans or name in ("", "dense"):
            name += "-again" if name else "plan"
        plans[name] = plan
    return plans


def parse_dense_steps(text: str | None) -> int | float | None:
    """Read the value of --dense-steps: a whole number is steps, one with a point is a share.

    Raises:
        ValueError: neither.
    """
    if text is None:
        return None
    try:
        return float(text) if "." in text else int(text)
    except ValueError:
        raise ValueError(f"--dense-steps must be steps such as 2, or a share such as 0.1, got {text!r}") from None


def reproduce_command(request: Request) -> str:
    """Return the exact command line of a request whose open values have been filled in."""
    job, options = request.job, request.options
    flags: list[tuple[str, Any]] = [("--model", request.model), ("--prompt", job.prompt)]
    flags += [("--negative-prompt", job.negative_prompt), *(("--plan", plan) for plan in request.plans)]
    flags += [(f"--{name}", getattr(job, name)) for name in ("seed", "steps", "frames", "height", "width", "guidance")]
    flags += [("--device", request.device), ("--dtype", request.dtype), ("--out", request.out)]
    if options.backend != "auto":
        flags.append(("--backend", options.backend))
    flags += [("--min-tokens", options.min_tokens), ("--dense-steps", options.dense_steps)]
    flags += [("--dense-layers", options.dense_layers), ("--attention-steps", request.attention_steps)]
    words = [word for name, value in flags if value is not None for word in (name, str(value))]
    words += ["--monitor"] * options.monitor + ["--yardstick"] * request.yardstick
    return shlex.join(["dit-sparse", "compare", *words])


def slug(spec: str) -> str:
    """Turn a spec into a short file name: topblocks:keep=0.2 -> topblocks-keep-0.2, a/b/plan.json -> plan."""
    stem = spec if ":" in spec else Path(spec).name.removesuffix(".json")
    return re.sub(r"[^a-z0-9._]+", "-", stem.lower()).strip("-.")
