"""How concentrated the bundled model's attention is, per layer, head and sampling step, beside released models'.

python -m dit_sparse.assets.train.attention --bundled assets/bundled --height 128 --out docs/bundled-attention.json \
  --real docs/measurements/released-attention.json --picture docs/media/bundled-attention.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from dit_sparse.assets.train import measure
from dit_sparse.assets.train.parts import SAMPLING_SHIFT, TextToVideo, read_trained, write_json

Shares = np.ndarray  # share of the keys that hold 95 % of the softmax mass; 0..1


def sampling_levels(steps: int) -> list[float]:
    """Return the noise levels at which the pipeline calls the transformer, from high to low."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=SAMPLING_SHIFT)
    scheduler.set_timesteps(steps)
    return [float(sigma) for sigma in scheduler.sigmas[:steps]]


def shares(model: TextToVideo, height: int, steps: int, every: int, clips: int, device: torch.device) -> dict[str, Any]:
    """Measure every `every`-th of `steps` sampling steps on held-out clips noised to their levels.

    Clips go one by one, so 16 GiB are enough at 17,408 tokens. `by_step` is [steps measured][layers][heads].
    """
    numbers = list(range(0, steps, every))
    levels = sampling_levels(steps)
    by_step = []
    for number in numbers:
        of_clips = []
        for index in range(clips):
            latents, ids = measure.held_out(torch.tensor([index], device=device), height)
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                of_clips.append(measure.attention(model, latents, ids, levels[number]).by_head)
        by_step.append(np.mean(of_clips, axis=0).round(5).tolist())
    tokens = latents[0, 0].numel() // 4
    return {"tokens": tokens, "of_steps": steps, "steps": numbers, "clips": clips, "queries": 256, "by_step": by_step}


def summary(by_head: Shares) -> str:
    """Return the cells of a table row: mean, and 5 / 50 / 95 % quantiles over all heads."""
    low, middle, high = np.quantile(by_head, (0.05, 0.5, 0.95))
    return f"{by_head.mean():.3f} | {low:.3f} / {middle:.3f} / {high:.3f}"


def table(measured: dict[str, Any], real: dict[str, Any]) -> str:
    """Return Markdown: the bundled model and each released one, means over steps, one row a model."""
    lines = ["| model | mean | 5 / 50 / 95 % quantile over heads |", "|---|---|---|"]
    lines.append(f"| **bundled, {measured['tokens']:,} tokens** | {summary(np.mean(measured['by_step'], axis=0))} |")
    for name, model in real["models"].items():
        lines.append(f"| {name} | {summary(np.array(model['kept95_layer_head']))} |")
    return "\n".join(lines)


def draw(measured: dict[str, Any], real: dict[str, Any], path: Path) -> None:
    """Draw the bundled model's heads and those of Wan 2.1 1.3B, sorted heads of all models, and shares over steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 7), layout="constrained")
    ours, theirs = figure.subplots(2, 2)
    bundled = np.mean(measured["by_step"], axis=0)
    wan = np.array(real["models"]["wan2.1-t2v-1.3b"]["kept95_layer_head"])
    titles = (f"bundled, {measured['tokens']:,} tokens", "Wan 2.1 T2V 1.3B")
    for axes, image, title in zip(ours, (bundled, wan), titles, strict=True):
        shown = axes.imshow(image, vmin=0, vmax=1, aspect="auto", cmap="viridis")
        axes.set(title=title, xlabel="head", ylabel="layer")
    figure.colorbar(shown, ax=ours, label="share of keys for 95 % of the mass")
    by_rank, by_step = theirs
    by_step.plot(
        [number / measured["of_steps"] for number in measured["steps"]],
        [np.mean(step) for step in measured["by_step"]], color="black", linewidth=2.5, label="bundled",
    )  # fmt: skip
    everything = [("bundled", bundled, None)]
    everything += [(n, np.array(m["kept95_layer_head"]), m["kept95_step"]) for n, m in real["models"].items()]
    for name, heads, steps in everything:
        strong = {"color": "black", "linewidth": 2.5} if name == "bundled" else {"linewidth": 1.0}
        ranked = np.sort(heads.flatten())
        by_rank.plot(np.linspace(0, 1, len(ranked)), ranked, label=name, **strong)
        if steps is not None:
            by_step.plot(np.linspace(0, 1, len(steps)), steps, linewidth=1.0, label=name)
    by_rank.set(xlabel="share of heads", ylabel="share of keys", title="heads in order, mean over steps")
    by_step.set(xlabel="share of sampling steps", ylabel="share of keys", title="mean over heads")
    by_rank.legend(fontsize=8)
    figure.savefig(path, dpi=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--bundled", type=Path, help="folder of the pipeline, or of trained shards")
    source.add_argument("--measured", type=Path, help="JSON that --out wrote: only print and draw it")
    parser.add_argument("--height", type=int, default=128)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--every", type=int, default=3)
    parser.add_argument("--clips", type=int, default=2)
    parser.add_argument("--out", type=Path, help="JSON to write")
    parser.add_argument("--real", type=Path, help="JSON of released models' shares: prints a table")
    parser.add_argument("--picture", type=Path, help="PNG to draw; needs --real and matplotlib")
    options = parser.parse_args()
    if options.picture and not options.real:
        parser.error("--picture compares with released models: give their shares with --real")

    if options.measured:
        measured = json.loads(options.measured.read_text())
    else:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model = read_trained(options.bundled).to(device).eval()
        measured = shares(model, options.height, options.steps, options.every, options.clips, device)
    if options.out:
        write_json(options.out, measured)
    if options.real:
        real = json.loads(options.real.read_text())
        print(table(measured, real))
        if options.picture:
            draw(measured, real, options.picture)


if __name__ == "__main__":
    main()
