"""Hold a plan that exists against a gate: at another size, with other steps, prompts or weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from dit_sparse.pipelines.presets import for_model
from dit_sparse.pipelines.targets import find_targets
from dit_sparse.plan import Plan
from dit_sparse.search.environment import environment
from dit_sparse.search.planner.capture import Told
from dit_sparse.search.planner.clock import Clock
from dit_sparse.search.planner.identity import fingerprint, grid_of
from dit_sparse.search.planner.renders import OutOfTimeError, Renders
from dit_sparse.search.planner.request import Search
from dit_sparse.search.planner.result import measured
from dit_sparse.search.planner.store import Store
from dit_sparse.search.staging import write_text

WORK = "validation-work"
FILE = "validation.json"
HEADINGS = ("prompt", "seed", "PSNR dB", "SSIM", "LPIPS", "flicker")


def validate_plan(pipe: Any, plan: Plan, search: Search, out: Path, told: Told) -> dict[str, Any]:
    """Render the held-out clips dense and with a plan; write out/validation.json and return what it holds.

    Clips are kept in out/validation-work, from which the same call resumes.

    Raises:
        ValueError: the plan does not fit the model or its grid, or the work there is that of other clips.
        OSError: the disk is full or gone.
    """
    clock, grid, targets = Clock(search.minutes), grid_of(pipe, search), find_targets(pipe)
    models = [target.binding() for target in targets]
    plan = for_model(plan, models)
    for bound in models:
        plan.check(bound.transformer_class, bound.layers, bound.heads, bound.config)
    search.gate.check(search.job.frames, search.job.height or 0, search.job.width or 0)
    for rule in plan.rules:
        rule.pattern.check(grid)
    settings = {
        "validates": plan.to_dict()["rules"],
        "transformers": [[str(target.binding()), fingerprint(target)] for target in targets],
        "job": asdict(search.job) | {"prompt": None, "seed": None},
        "backend": search.backend,
        "batch": search.batch,
    }
    renders = Renders(
        pipe, search.held_out_jobs, search.batch, Store(out / WORK, settings), search.backend, clock.up, told,
        search.gate.metrics,
    )  # fmt: skip
    result: dict[str, Any] = {
        "plan": plan.name,
        "made_on": plan.provenance.get("grid"),
        "grid": "x".join(map(str, grid.shape)),
        "steps": search.job.steps,
        "gate": str(search.gate),
        "prompts": list(search.held_out),
    }
    try:
        dense = renders.dense()
        found = measured(search, renders.of(plan, "rendering the plan"))
        yardsticks = {name: asdict(one) for name, one in renders.yardsticks().items()}
        result |= {
            "verdict": "met" if found["passes"] else "not met",
            "dense": {"seconds": float(np.mean(dense.seconds)), "attention_seconds": dense.attention_seconds},
            "measured": found,
            "yardsticks": yardsticks,
        }
    except OutOfTimeError:
        result |= {"verdict": "unverified"}
    result["environment"] = environment()
    write_text(out / FILE, json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    return result


def rows(result: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Return one row for each clip, under HEADINGS."""
    return [
        (
            f"{clip['prompt'] + 1} {result['prompts'][clip['prompt']][:60]}", str(clip["seed"]),
            "identical" if clip["psnr_db"] is None else f"{clip['psnr_db']:.1f}", _number(clip["ssim"], ".3f"),
            _number(clip["lpips"], ".3f"), _number(clip["flicker"], ".4f"),
        )
        for clip in result.get("measured", {}).get("clips", [])
    ]  # fmt: skip


def verdict(result: Mapping[str, Any]) -> str:
    """Say in one line what came out."""
    if "measured" not in result:
        return f"unverified: time was up before all clips of {result['plan']!r} were rendered"
    found, dense = result["measured"], result["dense"]
    speed = ""
    if found["attention_seconds"] and dense["attention_seconds"]:
        speed = f"{dense['attention_seconds'] / found['attention_seconds']:.2f}x attention, "
    psnr = f"PSNR {found['psnr_db']['mean']:.1f} dB, worst {found['psnr_db']['worst']:.1f} dB"
    worst = f"prompt {found['worst_prompt'] + 1}, seed {found['worst_seed']}"
    seconds = f"{dense['seconds'] / found['seconds']:.2f}x end to end"
    return (
        f"gate {result['verdict']}: {speed}{seconds}, {psnr} ({worst}); {result['gate']} on the grid {result['grid']}"
    )


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)
