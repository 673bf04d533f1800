"""What a search is of: the model with its weights, the grid, the device, and all else that decides its results."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from dit_sparse.grid import Grid
from dit_sparse.patterns import Pattern
from dit_sparse.pipelines.generate import known_transformers
from dit_sparse.pipelines.geometry import expected_grid
from dit_sparse.pipelines.targets import Target
from dit_sparse.plan import ModelBinding
from dit_sparse.search.planner.request import Search

FEW = 4  # numbers of a parameter that tell weights apart


def grid_of(pipe: Any, search: Search) -> Grid:
    """Return the token grid of the clips that are searched for.

    Raises: ValueError where the job's size or the model's configs do not tell it.
    """
    transformer = next(iter(known_transformers(pipe).values()))
    job = search.job
    if job.height is None or job.width is None or not job.steps:
        raise ValueError("a search needs the clip's height, width and steps: give them")
    grid = expected_grid(transformer, pipe.vae.config, job.frames or 1, job.height, job.width)
    if grid is None:
        raise ValueError(f"no grid is known for {type(transformer).__name__} at this size")
    return grid


def device_of(pipe: Any) -> str:
    """Name the device that the pipeline computes on, also where its parts wait on the CPU (offloading)."""
    return str(getattr(pipe, "_execution_device", None) or pipe.device)


def binding(targets: Sequence[Target]) -> ModelBinding | None:
    """Return what a plan for all of these transformers is bound to, None where they differ."""
    found = {target.binding() for target in targets}
    return found.pop() if len(found) == 1 else None


def settings_of(pipe: Any, targets: Sequence[Target], search: Search, found: Sequence[Pattern]) -> dict[str, Any]:
    """Return all that decides what units and clips hold."""
    return {
        "transformers": [[target.name, str(target.binding()), fingerprint(target)] for target in targets],
        "device": torch.device(device_of(pipe)).type,
        "job": asdict(search.job) | {"prompt": None, "seed": None},
        "prompts": list(search.prompts),
        "step_edges": list(search.groups.edges),
        "candidates": [str(pattern) for pattern in found],
        "backend": search.backend,
        "rows": search.rows,
        "batch": search.batch,
    }


def fingerprint(target: Target) -> str:
    """Tell weights and dtypes apart by a few numbers of each parameter; quick for any size."""
    found = 0
    for name, parameter in target.transformer.named_parameters():
        few = parameter.detach().flatten()[:: max(1, parameter.numel() // FEW)][:FEW]
        numbers = "" if few.is_meta else str(few.float().tolist())
        found = zlib.crc32(f"{name} {parameter.dtype} {tuple(parameter.shape)} {numbers}".encode(), found)
    return f"{found:08x}"
