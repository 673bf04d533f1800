"""Show what a window breaks: twins, objects behind bars, and cameras that pan away and come back.

python -m dit_sparse.assets.train.breaks --bundled assets/bundled --height 128 --steps 30 --clips 8 --out FOLDER \
  --plan neighborhood:window=0.3 --plan topblocks:keep=0.2
"""

from __future__ import annotations

import argparse
import statistics
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from diffusers import WanPipeline
from skimage.metrics import peak_signal_noise_ratio
from torch import Tensor

from dit_sparse.assets.train import measure, outlines, score
from dit_sparse.assets.train.clips import Scene, captions, scene
from dit_sparse.assets.train.parts import write_json
from dit_sparse.assets.train.verdict import EVERY, judge_clip
from dit_sparse.assets.train.words import BACKGROUNDS, CAMERAS
from dit_sparse.patterns import pattern_from_text
from dit_sparse.pipelines.enable import sparse, summary

FIRST_INDEX = 1000  # of held-out captions: score.py reports on the first 200
LOOKED_AT = 4000
DENSE = "dense"


def kinds(clips: Scene) -> dict[str, Tensor]:
    """Return which clips [B] show what asks for long memory or far keys, each kind without the others' effects."""
    static = clips.camera == list(CAMERAS).index("static")
    returns = clips.camera == list(CAMERAS).index("panning away and back")
    drawn = clips.background != list(BACKGROUNDS).index("plain")
    calm = ~clips.blink & ~clips.light
    return {
        "twins": clips.twin & static & ~clips.bar & calm,
        "behind a bar": clips.bar & static & ~clips.twin & (clips.count == 1) & calm,
        "away and back": returns & drawn & ~clips.bar & ~clips.twin & calm,
    }


def figure(kind: str, video: Tensor, clips: Scene, b: int) -> float:
    """Return how well a clip uint8 [T, H, W, 3] of caption `b` holds what its kind asks for, in 0..1.

    twins: overlap of the left object with the mirror image of the right one, mean over frames, 0 where one is missing.
    behind a bar: share of frames in which the object has the named outline (verdict.Verdict.held).
    away and back: share of the background of the first frame that the last frame shows within .15 in RGB, objects
        left out.
    """
    if kind == "behind a bar":
        return judge_clip(video, clips, b)[0].held
    owners, _ = outlines.owners(video[::EVERY], clips, b)
    if kind == "twins":
        left, right = outlines.clean(owners == 0, pieces=2)
        mirrored = right.flip(-1)
        either = (left | mirrored).sum(dim=(1, 2))
        return float(((left & mirrored).sum(dim=(1, 2)) / either.clamp(min=1)).mean())
    # what an object or a bar covers in the end says nothing; what nobody's colour covers is lost
    background = (owners[0] == outlines.BACKGROUND) & (owners[-1] >= outlines.BACKGROUND)
    gap = (video[0].float() - video[-1].float()).norm(dim=-1) / 255
    return float((gap < 0.15)[background].float().mean()) if background.any() else 0.0


def run(pipe: WanPipeline, plans: list[str], clips_a_kind: int, settings: score.Settings) -> tuple[Any, Tensor]:
    """Sample every kind densely and with every plan; return figures and the first clip of each as rows of a sheet."""
    every = scene(measure.HELD_OUT_SEED, FIRST_INDEX + torch.arange(LOOKED_AT))
    report: dict[str, Any] = {"settings": asdict(settings), "first_index": FIRST_INDEX, "kinds": {}}
    rows = []
    for kind, which in kinds(every).items():
        indices = (FIRST_INDEX + which.nonzero()[:clips_a_kind, 0]).tolist()
        clips = scene(measure.HELD_OUT_SEED, torch.tensor(indices))
        true = measure.true_videos(clips, settings.height)
        truth = [figure(kind, video, clips, b) for b, video in enumerate(true)]
        results: dict[str, Any] = {"truth": {"figure": truth, "mean": statistics.mean(truth)}}
        dense: list[Tensor] = []
        for plan in (DENSE, *plans):
            videos, density = _sample(pipe, plan, indices, settings)
            rows.append(videos[0])
            figures = [figure(kind, video, clips, b) for b, video in enumerate(videos)]
            results[plan] = {"figure": figures, "mean": statistics.mean(figures), "computed_density": density}
            if plan == DENSE:
                dense = videos
            else:
                pairs = zip(dense, videos, strict=True)
                results[plan]["psnr_db"] = statistics.mean(
                    float(peak_signal_noise_ratio(a.numpy(), b.numpy())) for a, b in pairs
                )
            print(f"{kind}, {plan}: {statistics.mean(figures):.3f}", flush=True)
        report["kinds"][kind] = {"indices": indices, "captions": captions(clips), "results": results}
    return report, torch.stack(rows)


def _sample(
    pipe: WanPipeline, plan: str, indices: list[int], settings: score.Settings
) -> tuple[list[Tensor], float | None]:
    """Return clips uint8 [T, H, W, 3] of the captions `indices` and the density computed, None for dense ones."""
    videos: list[Tensor] = []
    with nullcontext() if plan == DENSE else sparse(pipe, pattern_from_text(plan), min_tokens=0):
        for i in range(0, len(indices), settings.batch):
            videos += score.sample(pipe, indices[i : i + settings.batch], settings)
        return videos, None if plan == DENSE else summary(pipe).computed_density


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    score.add_source(source)
    parser.add_argument("--plan", action="append", required=True, help="pattern as text; may be given again")
    parser.add_argument("--clips", type=int, default=8, help="of each kind")
    score.add_sampling(parser)
    parser.add_argument("--out", type=Path, required=True, help="folder for breaks.json and the sheet")
    options = parser.parse_args()

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pipe = score.load(options.bundled, options.trained, device)
    if device.type == "cuda":
        pipe.to(torch.bfloat16)  # as load_bundled does: the kernels want it
    sizes = (options.clips, options.height, options.steps, options.guidance, options.seed, options.batch)
    report, rows = run(pipe, options.plan, options.clips, score.Settings(*sizes))
    options.out.mkdir(parents=True, exist_ok=True)
    measure.sheet(rows).save(options.out / f"breaks-{options.height}.png")
    write_json(options.out / "breaks.json", report)


if __name__ == "__main__":
    main()
