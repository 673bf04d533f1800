"""Made-up comparisons with random figures, valid by the schema."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

from dit_sparse.search.report import validate

STORED = Path(__file__).parents[2] / "assets" / "demo"


def made_report(runs: int, seed: int | None = None) -> dict[str, Any]:
    """Return the stored comparison with so many plans of random seconds, speed-ups and metrics."""
    draw = random.Random(random.randrange(2**32) if seed is None else seed)
    report: dict[str, Any] = json.loads((STORED / "report.json").read_text(encoding="utf-8"))
    first = report["sparse"][0]
    report["sparse"] = []
    for number in range(runs):
        run, seconds = copy.deepcopy(first), draw.uniform(5, 60)
        run |= {"name": f"plan-{number}", "seconds": seconds, "speedup": report["dense"]["seconds"] / seconds}
        run |= {"attention_speedup": draw.uniform(0.5, 4), "spec": f"topblocks:keep=0.{number + 1}"}
        run["metrics"] = {**run["metrics"], "psnr_db": draw.uniform(10, 50), "identical": False}
        report["sparse"].append(run)
    validate(report)
    return report


def monitored(steps: int, layers: int, heads: int, draw: random.Random) -> dict[str, Any]:
    """Return what a monitored run measured: two branches in each step but the first."""
    calls = [
        {
            "name": f"blocks.{layer}",
            "calls": [
                {
                    "step": step,
                    "heads": list(range(heads)),
                    "recall": [draw.random() for _ in range(heads)],
                    "error": [draw.uniform(0, 2) for _ in range(heads)],
                }
                for step in range(1, steps)
                for _ in range(2)
            ],
        }
        for layer in range(layers)
    ]
    values = [value for layer in calls for call in layer["calls"] for value in call["recall"]]
    return {
        "recall": sum(values) / len(values),
        "lowest_recall": min(values),
        "lowest_at": ["blocks.0", 1, 0],
        "error": 0.5,
        "layers": calls,
    }
