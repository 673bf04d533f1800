"""Options that several commands of `dit-sparse` share."""

from __future__ import annotations

from typing import Annotated

import typer

PROMPT = "a striped red circle bouncing on a gradient blue and cyan background"  # in words of the bundled model

Model = Annotated[str, typer.Option("--model", "-m", help="bundled, a diffusers folder, or a hub id.")]
PlanSpecs = Annotated[
    list[str], typer.Option("--plan", "-p", help="Preset, pattern (topblocks:keep=0.2), plan file, hub id. Repeatable.")
]
Frames = Annotated[int | None, typer.Option(help="Frames of the clip. (default: the model's)")]
Height = Annotated[int | None, typer.Option(help="Height in pixels. (default: the model's)")]
Width = Annotated[int | None, typer.Option(help="Width in pixels. (default: the model's)")]
Steps = Annotated[int | None, typer.Option(help="Denoising steps. (default: the model's)")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N. (default: cuda if there)")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16, float16. (default: by device)")]
Backend = Annotated[str, typer.Option(help="Attention kernels: auto, triton, cpu, reference.")]
Monitor = Annotated[
    bool, typer.Option("--monitor", help="Measure recall and error of each sparse call, in one more run per plan.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")]
