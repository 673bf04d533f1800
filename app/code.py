"""The Python that repeats a setting of the page: for a visitor to copy, run and change."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from dit_sparse.options import Options
from dit_sparse.pipelines.generate import ARGUMENTS, Job

FPS = 8


def code_of_run(report: Mapping[str, Any], name: str) -> str:
    """Return the Python that repeats one run of a comparison: "dense", or a plan's run name.

    Raises:
        KeyError: the report has no such run.
    """
    request = report["request"]
    job = Job(**{item.name: request[item.name] for item in fields(Job)})
    spec = None if name == "dense" else _run(report, name)["spec"]
    return setting_code(request["model"], request["device"], request["dtype"], job, spec, request["options"])


def plan_text(report: Mapping[str, Any], name: str) -> str:
    """Return the plan of a run as the text of a plan.json; raises as `code_of_run`."""
    return json.dumps(_run(report, name)["plan"], indent=2) + "\n"


def setting_code(
    model: str, device: str, dtype: str, job: Job, spec: str | None, options: Mapping[str, Any] | None = None
) -> str:
    """Return the Python for a setting.

    spec: what `enable` takes, as text; one that ends in .json is a file beside the script; None: dense.
    options: those of `enable`; what is its default is left out.
    """
    is_clip = job.frames is not None
    values = {argument: getattr(job, name) for name, argument in ARGUMENTS.items() if getattr(job, name) is not None}
    lines = ["import torch"]
    if model != "bundled":
        lines.append("from diffusers import DiffusionPipeline")
    if is_clip:
        lines.append("from diffusers.utils import export_to_video")
    ours = ["import dit_sparse as ds"] if spec is not None else []
    if model == "bundled":
        ours.append("from dit_sparse.pipelines.bundled import load_bundled")
    lines += ["", *ours] if ours else []
    lines += ["", _load(model, device, dtype)]
    if spec is not None:
        if spec.endswith(".json"):
            lines.append(f"# {spec!r}: the plan of this run, saved beside this script")
        lines.append(f"ds.enable({', '.join(['pipe', repr(spec), *_enable_options(options or {})])})")
    lines += ["result = pipe(", *(f"    {name}={value!r}," for name, value in values.items())]
    lines.append(f'    generator=torch.Generator("cpu").manual_seed({job.seed}),')
    if is_clip:
        lines += ['    output_type="np",', ")", f'export_to_video(result.frames[0], "clip.mp4", fps={FPS})']
    else:
        lines += [")", 'result.images[0].save("image.png")']
    if spec is not None:
        lines.append("print(ds.summary(pipe))")
    return "\n".join(lines) + "\n"


def _load(model: str, device: str, dtype: str) -> str:
    if model == "bundled":
        return f"pipe = load_bundled({device!r}, torch.{dtype})"
    return f"pipe = DiffusionPipeline.from_pretrained({model!r}, dtype=torch.{dtype}).to({device!r})"


def _enable_options(options: Mapping[str, Any]) -> list[str]:
    usual = {item.name: item.default for item in fields(Options)}
    return [f"{name}={value!r}" for name, value in options.items() if value != usual[name]]


def _run(report: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found: dict[str, Mapping[str, Any]] = {run["name"]: run for run in report["sparse"]}
    return found[name]
