"""What a comparison's report says of one of its runs, as the objects that the page works with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from dit_sparse.grid import Grid
from dit_sparse.options import Options
from dit_sparse.pipelines.generate import Job
from dit_sparse.plan import Plan

Report = Mapping[str, Any]  # a report.json that follows search/report.schema.json
Run = Mapping[str, Any]  # an entry of its "sparse"


def run_of(report: Report, name: str) -> Run:
    """Return the run of a plan.

    Raises:
        ValueError: the report has no run of this name.
    """
    runs = {run["name"]: run for run in report["sparse"]}
    if name not in runs:
        raise ValueError(f"the comparison has no plan {name!r}; it has {', '.join(runs)}")
    found: Run = runs[name]
    return found


def plan_of(report: Report, name: str) -> Plan:
    """Return the plan of a run; raises as `run_of`."""
    return Plan.from_dict(run_of(report, name)["plan"], name)


def grid_of(report: Report) -> Grid:
    """Return the token grid of the clips.

    Raises:
        ValueError: the report does not know it.
    """
    sizes = report["grid"]
    if sizes is None:
        raise ValueError("the token grid of this comparison is not known: the model's configs do not tell it")
    return Grid(**{item.name: sizes[item.name] for item in fields(Grid)})


def job_of(report: Report) -> Job:
    """Return what was generated, every value filled in."""
    return Job(**{item.name: report["request"][item.name] for item in fields(Job)})


def options_of(report: Report) -> Options:
    """Return the options that plans ran under."""
    return Options(**report["request"]["options"])
