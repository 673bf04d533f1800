"""The report of a search as JSON values: see report.schema.json."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from dit_sparse.pipelines.geometry import shapes_of
from dit_sparse.search.environment import environment
from dit_sparse.search.metrics import Metrics
from dit_sparse.search.planner.find import Outcome
from dit_sparse.search.planner.gate import MOST_DB
from dit_sparse.search.planner.points import interval
from dit_sparse.search.planner.probe import bands_of
from dit_sparse.search.planner.problem import evaluate, uniform
from dit_sparse.search.planner.renders import Render
from dit_sparse.search.planner.request import Search
from dit_sparse.search.planner.uniform import costs, everywhere
from dit_sparse.search.planner.weigh import Scored, densities

WORST = 3


def report_of(pipe: Any, outcome: Outcome, model: str, command: str) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Return the report and the pictures that it names, PNG."""
    search, shapes = outcome.search, shapes_of(pipe)
    points, chosen = _points(outcome)
    worst, pictures = _worst(outcome)
    parts = ("capture_s", "prices_s", "sensitivity_s", "solve_s", "verify_s")
    report = {
        "schema": "dit-sparse/search",
        "schema_version": 1,
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "request": {
            "model": model,
            "calibration_prompts": list(search.prompts),
            "held_out_prompts": list(search.held_out),
            "seeds": list(search.seeds),
            "job": {name: getattr(search.job, name) for name in ("steps", "frames", "height", "width", "guidance")},
            "gate": dict(search.gate.limits),
            "minutes": search.minutes,
            "backend": search.backend,
            "specs": None if search.specs is None else list(search.specs),
            "densities": list(search.densities),
            "step_edges": list(search.groups.edges),
            "target_speedup": None,
        },
        "model": {
            "pipeline": type(pipe).__name__,
            "transformers": [f"{s.component}: {s.transformer}, {s.layers} layers x {s.heads} heads" for s in shapes],
            "parameters": sum(s.parameters for s in shapes),
        },
        "grid": {**asdict(outcome.grid), "tokens": outcome.grid.tokens},
        "verdict": outcome.verdict,
        "why": outcome.why,
        "plan": outcome.plan.to_dict(),
        "chosen": chosen,
        "dense": _dense(outcome),
        "yardsticks": _yardsticks(outcome),
        "points": points,
        "map": _map(outcome),
        "sensitivity": _sensitivity(outcome),
        "prices": {
            "where": "" if outcome.prices is None else outcome.prices.where,
            "shipped": outcome.prices is not None and outcome.prices.predicted,
        },
        "worst": worst,
        "timing": {
            **{part: outcome.seconds.get(part) for part in parts},
            "total_s": sum(outcome.seconds.values()),
        },
        "environment": environment(),
        "command": command,
        "notes": list(outcome.notes),
    }
    return report, pictures


def _points(outcome: Outcome) -> tuple[list[dict[str, Any]], int | None]:
    """List what was tried, and every candidate used everywhere, as it is predicted."""
    offered, scored, prices, weights = outcome.offered, outcome.scored, outcome.prices, outcome.weights
    if outcome.problem is None or offered is None or scored is None or prices is None or weights is None:
        return [], None
    of_uniform = list(zip(*costs(offered, prices, weights, outcome.search.batch), strict=True))
    dense_ms = of_uniform[0][0]

    def point(
        name: str, spec: str | None, sums: tuple[float, float], kept: tuple[float, float], render: Render | None
    ) -> dict[str, Any]:
        (ms, loss), (own, run) = sums, kept
        return {
            "name": name, "kind": "searched" if spec is None else "uniform", "spec": spec, "predicted_ms": float(ms),
            "predicted_speedup": float(dense_ms / ms), "predicted_loss": float(loss), "density": own,
            "run_density": run, "measured": None if render is None else measured(outcome.search, render),
        }  # fmt: skip

    found, chosen = [], None
    for number, trial in enumerate(outcome.trials):
        chosen = number if trial is outcome.chosen else chosen
        choice = trial.solution.choice
        sums = evaluate(outcome.problem, choice)
        found.append(point(f"searched {number + 1}", None, sums, densities(scored, choice), trial.render))
    for number, pattern in enumerate(offered.candidates):
        if number:
            kept = densities(offered, everywhere(offered, number))
            found.append(point(str(pattern), str(pattern), of_uniform[number], kept, outcome.uniform.get(number)))
    return found, chosen


def measured(search: Search, render: Render) -> dict[str, Any]:
    """Sum up the clips of a plan: mean, 95 % interval over prompts and worst of each metric, and every clip."""
    clips = render.metrics
    seeds = len(search.seeds)
    psnr = [_psnr(clip) for clip in clips]
    worst = int(np.argmin(psnr))
    return {
        "psnr_db": _stats(clips, _psnr, seeds, least_is_worst=True),
        "worst_prompt": worst // seeds,
        "worst_seed": search.seeds[worst % seeds],
        "ssim": _stats(clips, lambda clip: clip.ssim, seeds, least_is_worst=True),
        "flicker": _stats(clips, lambda clip: clip.flicker, seeds, least_is_worst=False),
        "warp_error": _stats(clips, lambda clip: clip.warp_error, seeds, least_is_worst=False),
        "lpips": _stats(clips, lambda clip: clip.lpips, seeds, least_is_worst=False),
        "identical": all(clip.identical for clip in clips),
        "seconds": float(np.mean(render.seconds)),
        "attention_seconds": render.attention_seconds,
        "passes": search.gate.margin_db(clips) >= 0.0,
        "clips": [
            {
                "prompt": number // seeds, "seed": search.seeds[number % seeds], "psnr_db": clip.psnr_db,
                "ssim": clip.ssim, "flicker": clip.flicker, "warp_error": clip.warp_error,
                "lpips": clip.lpips,
            }
            for number, clip in enumerate(clips)
        ],
    }  # fmt: skip


def _stats(
    clips: Sequence[Metrics], value: Callable[[Metrics], float | None], seeds: int, least_is_worst: bool
) -> dict[str, float] | None:
    """Sum up a metric; the interval is over prompts, each the mean of its seeds. None where a clip lacks it."""
    values = [one for clip in clips if (one := value(clip)) is not None]
    if len(values) < len(clips):
        return None
    found = interval(np.asarray(values).reshape(-1, seeds).mean(1))
    return {**found, "worst": min(values) if least_is_worst else max(values)}


def _psnr(clip: Metrics) -> float:
    return MOST_DB if clip.psnr_db is None else clip.psnr_db


def _dense(outcome: Outcome) -> dict[str, Any]:
    ms = 0.0 if outcome.problem is None else evaluate(outcome.problem, uniform(outcome.problem, 0))[0]
    dense: Render | None = outcome.dense
    return {
        "attention_ms": ms,
        "seconds": None if dense is None else float(np.mean(dense.seconds)),
        "attention_seconds": None if dense is None else dense.attention_seconds,
    }


def _yardsticks(outcome: Outcome) -> dict[str, Any]:
    return {
        name: {"psnr_db": found.psnr_db, "ssim": found.ssim, "flicker": found.flicker, "lpips": found.lpips}
        for name, found in outcome.yardsticks.items()
    }


def _map(outcome: Outcome) -> list[dict[str, Any]]:
    scored: Scored | None = outcome.scored
    if scored is None or outcome.chosen is None:
        return []
    found = []
    for u, (place, of_heads) in enumerate(zip(scored.places, outcome.chosen.solution.choice, strict=True)):
        heads = [
            {
                "pattern": str(scored.candidates[c]), "density": float(scored.density[u, h, c]),
                "recall": float(scored.recall[u, h, c]), "error": float(scored.error[u, h, c]),
            }
            for h, c in enumerate(of_heads) if scored.real[u, h]
        ]  # fmt: skip
        found.append({"transformer": place.transformer, "group": place.group, "layer": place.layer, "heads": heads})
    return found


def _sensitivity(outcome: Outcome) -> dict[str, Any]:
    scored = outcome.scored
    if not outcome.probed or scored is None or outcome.weights is None:
        return {"measured": False, "by_group": None, "by_layer": None}
    per_call = outcome.weights / (scored.calls / scored.calls.sum())
    of_group = np.array([place.group for place in scored.places])
    by_group = [
        float(per_call[of_group == group].mean()) if (of_group == group).any() else 0.0
        for group in range(len(outcome.search.groups))
    ]
    by_layer: dict[str, list[float]] = {}
    for name, layers in bands_of(scored.places):
        inside = [
            w for w, p in zip(per_call, scored.places, strict=True) if p.transformer == name and p.layer in layers
        ]
        by_layer.setdefault(name, []).extend([float(np.mean(inside))] * len(layers))
    return {"measured": True, "by_group": by_group, "by_layer": by_layer}


def _worst(outcome: Outcome) -> tuple[list[dict[str, Any]], dict[str, bytes]]:
    chosen = outcome.chosen
    if chosen is None or chosen.render is None or outcome.renders is None:
        return [], {}
    jobs, found = outcome.search.held_out_jobs, []
    pictures: dict[str, bytes] = {}
    ranked = sorted(range(len(jobs)), key=lambda number: _psnr(chosen.render.metrics[number]))  # type: ignore[union-attr]
    for rank, number in enumerate(ranked[:WORST]):
        dense, plan = outcome.renders.strips(chosen.plan, jobs[number])
        names = {"dense": f"worst-{rank}-dense", "plan": f"worst-{rank}-plan"}
        pictures |= {names["dense"]: dense, names["plan"]: plan}
        found.append({
            "prompt": jobs[number].prompt, "seed": jobs[number].seed,
            "psnr_db": chosen.render.metrics[number].psnr_db,
            "pictures": [[label, name] for label, name in names.items()],
        })  # fmt: skip
    return found, pictures
