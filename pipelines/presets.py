"""Presets by model: the plan that a search made for this very model and kind of machine, where one ships."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from pathlib import Path

import torch

from dit_sparse.plan import FILE_NAME, ModelBinding, Plan
from dit_sparse.spec import PRESETS

FOLDER = Path(__file__).resolve().parent.parent / "assets" / "plans"  # MACHINE/MODEL/PRESET/plan.json
MACHINES = ("cuda", "cpu")


def for_model(plan: Plan, models: Iterable[ModelBinding]) -> Plan:
    """Return the shipped plan of this name for these transformers if `plan` is a preset and there is one; else `plan`.

    Shipped plans are bound to a transformer's class, layers, heads and config; every transformer must be that one.
    They were searched at the size of clip that a machine like this one is asked for, with what calls cost there.
    """
    if plan != PRESETS.get(plan.name):
        return plan
    found = {shipped_plans(FOLDER / machine()).get((plan.name, model)) for model in models}
    only = found.pop() if len(found) == 1 else None
    return plan if only is None else only


def machine() -> str:
    """Return which of MACHINES this is; not where a pipeline is, which may be moved when sparse attention is on."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@functools.cache
def shipped_plans(folder: Path) -> dict[tuple[str, ModelBinding], Plan]:
    """Read the plans in a folder of one machine, by the preset that they stand for and the model they are bound to.

    Raises: ValueError for a plan that is broken or bound to no config.
    """
    found = {}
    for path in sorted(folder.glob(f"*/*/{FILE_NAME}")):
        plan = Plan.load(path)
        if path.parent.name not in PRESETS or plan.model is None or plan.model.config is None:
            raise ValueError(
                f"{path} must be named after a preset ({', '.join(PRESETS)}) and bound to a model's config"
            )
        found[path.parent.name, plan.model] = plan
    return found
