"""A plan as a folder to share: plan.json and a model card that says what it is and what was measured."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dit_sparse.hub import CARD
from dit_sparse.nearest import did_you_mean
from dit_sparse.plan import FILE_NAME, Plan
from dit_sparse.search.plans import rule_lines
from dit_sparse.search.staging import check_writable, staged

MEASURED = ("base_model", "gpu", "prompts", "seeds", "gate", "rows")
UNVERIFIED = "unverified"


def write_plan_folder(folder: Path, plan: Plan, measured: Mapping[str, Any] | None = None) -> tuple[Path, ...]:
    """Write plan.json and README.md, both or neither, replacing older ones; return their paths.

    measured: any of base_model (hub id), gpu, prompts and seeds (a number or a list), gate (verdict of the quality
    gate; "unverified" without one) and rows, one mapping of columns to values for each run.

    Raises:
        ValueError: an unknown key of `measured`, rows that are no mappings, or a folder that cannot be written.
    """
    found = dict(measured or {})
    for key in found:
        if key not in MEASURED:
            raise ValueError(f"measured has no {key!r}{did_you_mean(key, MEASURED)}; known: {', '.join(MEASURED)}")
    if not all(isinstance(row, Mapping) for row in found.get("rows", ())):
        raise ValueError(f"rows of measured must be mappings of columns to values, got {found['rows']!r:.80}")
    text = model_card(plan, found)
    check_writable(folder)
    with staged(folder) as staging:
        plan.save(staging)
        (staging / CARD).write_text(text, encoding="utf-8")
    return folder / FILE_NAME, folder / CARD


def model_card(plan: Plan, measured: Mapping[str, Any]) -> str:
    """Return the model card of a plan, in Markdown with YAML front matter; `measured` as in `write_plan_folder`."""
    base = measured.get("base_model")
    patterns = sorted({rule.pattern.name for rule in plan.rules})
    front = ["library_name: diffusers", "license: apache-2.0"]
    front += [f"base_model: {json.dumps(base)}"] if base else []
    front += ["tags:", *(f"- {tag}" for tag in ("dit-sparse", "sparse-attention", *patterns))]
    told = {key: value for key, value in plan.provenance.items() if value is not None}
    made_for = "any transformer that dit-sparse knows" if plan.model is None else str(plan.model)
    lines = [
        *("---", *front, "---", "", f"# {_line(plan.name)}", ""),
        "A plan for dit-sparse: which sparse attention runs in which steps, layers "
        f"and heads of a diffusion transformer. It holds no weights. Made for {made_for}.",
        *("", "## Use", "", "```python"),
        "import dit_sparse as ds",
        "from diffusers import DiffusionPipeline",
        f'pipe = DiffusionPipeline.from_pretrained({json.dumps(base or "the model that the plan is for")}).to("cuda")',
        'ds.enable(pipe, "this folder, or its user/repo on the hub")',
        *("```", "", "## Rules", "", "The first rule that covers a call counts; what none covers is dense.", ""),
        *(f"- {rule}" for rule in rule_lines(plan)),
        *("", "## Measured", "", *_measured(measured)),
        *("", "## Where it comes from", ""),
        *([f"- {_line(key)}: {_line(value)}" for key, value in told.items()] or ["Not told."]),
        *("", "## Limits", ""),
        "- Seconds depend on the GPU and the size of the clip, what a clip loses also on prompt and seed.",
        "- On another token grid the shares of axes and steps carry over, what was measured does not.",
    ]
    if plan.model is not None and plan.model.config is not None:
        lines.append("- A fine-tune of the model has the same config: the plan loads there, unmeasured.")
    return "\n".join(lines) + "\n"


def _measured(measured: Mapping[str, Any]) -> list[str]:
    told = [f"- {what}: {_counted(measured[what])}" for what in ("gpu", "prompts", "seeds") if what in measured]
    lines = [f"- quality gate: {_line(measured.get('gate', UNVERIFIED))}", *told]
    rows = measured.get("rows") or ()
    if not rows:
        return [*lines, "- nothing was measured with this plan"]
    columns = list(dict.fromkeys(column for row in rows for column in row))
    table = [[_cell(column) for column in columns], ["---"] * len(columns)]
    table += [[_cell(row.get(column, "–")) for column in columns] for row in rows]
    return [*lines, "", *(f"| {' | '.join(cells)} |" for cells in table)]


def _counted(value: Any) -> str:
    return _line("; ".join(map(str, value)) if isinstance(value, (list, tuple)) else value)


def _cell(value: Any) -> str:
    return _line(value).replace("|", "\\|")


def _line(value: Any) -> str:
    """Return a value as one line of text: JSON where it is nested."""
    text = json.dumps(value) if isinstance(value, (Mapping, list, tuple, bool)) else str(value)
    return " ".join(text.split())
