"""Sample held-out captions from trained weights and count what comes out right (verdict.py), on one device or several.

python -m dit_sparse.assets.train.score --bundled assets/bundled --captions 200 --height 128 --steps 30 --out FOLDER
torchrun --nproc-per-node 4 -m dit_sparse.assets.train.score --trained OUT --out FOLDER
python -m dit_sparse.assets.train.score --truth --height 64 --out FOLDER
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import time
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from diffusers import WanPipeline
from torch import Tensor

from dit_sparse.assets.train import measure
from dit_sparse.assets.train.clips import Scene, captions, scene
from dit_sparse.assets.train.judge import Crew, join
from dit_sparse.assets.train.parts import pipeline, read_trained, write_json
from dit_sparse.assets.train.verdict import CHECKS, Verdict, aggregate, judge_clip
from dit_sparse.assets.train.words import COLOURS, MOTIONS, SHAPES
from dit_sparse.pipelines.bundled import bundled_folder
from dit_sparse.pipelines.pixel_vae import PixelVAE

SHEET_CLIPS = 12
RIGHT = "right captions"
Judged = dict[str, list[Verdict]]  # which captions a clip was held against -> verdicts


@dataclass(frozen=True)
class Settings:
    """How samples are made: square clips of `height` pixels; prompt i starts from the noise of seed and i alone."""

    captions: int
    height: int
    steps: int
    guidance: float
    seed: int
    batch: int


def sample(pipe: WanPipeline, indices: list[int], settings: Settings) -> Tensor:
    """Generate the held-out captions `indices` in one call: uint8 [B, T, H, W, 3]."""
    prompts = captions(scene(measure.HELD_OUT_SEED, torch.tensor(indices)))
    seeds = [settings.seed * 1_000_003 + i for i in indices]
    return measure.sample(pipe, prompts, seeds, settings.height, settings.steps, settings.guidance)


def judge_sample(video: Tensor, index: int, count: int) -> Judged:
    """Judge the sample of held-out caption `index` of `count`, also against the next caption: the floor."""
    clips = scene(measure.HELD_OUT_SEED, torch.arange(count))
    return {
        RIGHT: judge_clip(video, clips, index),
        "shuffled captions": judge_clip(video, clips, (index + 1) % count),
    }


def judge_truth(height: int, index: int, count: int) -> Judged:
    """Judge the true clip of held-out caption `index`, also with one word of every object changed."""
    one = scene(measure.HELD_OUT_SEED, torch.tensor([index]))
    video = measure.true_videos(one, height)[0]
    random = torch.Generator().manual_seed(index)
    wrong = {
        f"wrong {what}": judge_clip(video, misnamed(one, what, random), 0) for what in ("colour", "shape", "motion")
    }
    return {**judge_sample(video, index, count), **wrong}


def misnamed(clips: Scene, what: str, random: torch.Generator) -> Scene:
    """Return clips whose captions name a wrong colour, shape or motion for every object.

    A wrong colour is nowhere in its clip; a wrong motion of a drifting, growing or shrinking object is another of
    these kinds, so that its direction stays a matter of the caption.
    """
    size = clips.colour.shape
    if what == "colour":
        used = torch.cat([clips.colour, clips.background_colours, clips.bar_colour[:, None]], dim=1)
        weights = torch.ones(size[0], len(COLOURS)).scatter_(1, used, 0.0)
        return replace(clips, colour=torch.multinomial(weights, size[1], generator=random))
    if what == "shape":
        step = torch.randint(1, len(SHAPES), size, generator=random)
        return replace(clips, shape=(clips.shape + step) % len(SHAPES))
    if what == "motion":
        names = list(MOTIONS)
        drifts, trends = [n for n in names if n.startswith("drifting")], ["growing", "shrinking"]
        others = [n for n in names if n not in drifts + trends]
        table = torch.zeros(len(names), len(names))
        for kind in (drifts, trends, others):
            rows = [names.index(name) for name in kind]
            table[torch.tensor(rows)[:, None], torch.tensor(rows)] = 1.0
        weights = table.fill_diagonal_(0.0)[clips.motion.flatten()]
        return replace(clips, motion=torch.multinomial(weights, 1, generator=random).reshape(size))
    raise ValueError(f"what must be colour, shape or motion, got {what!r}")


def summary(judged: dict[int, Judged]) -> dict[str, Any]:
    """Return the scores of clips by the captions that they were held against."""
    names = list(next(iter(judged.values()))) if judged else []
    return {name: asdict(aggregate([judged[i][name] for i in sorted(judged)])) for name in names}


def load(bundled: Path | None, trained: Path | None, device: torch.device) -> WanPipeline:
    """Load a diffusers folder, or the files that training left, in fp32."""
    if trained is not None:
        pipe = pipeline(read_trained(trained).eval())
    else:
        assert bundled is not None
        pipe = WanPipeline.from_pretrained(bundled_folder(bundled), vae=PixelVAE())
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def run(pipe: WanPipeline | None, settings: Settings, crew: Crew, workers: int, out: Path) -> dict[str, Any]:
    """Sample and judge this process's share, gather all shares, write the sheet; return what score.json holds."""
    count, started = settings.captions, time.perf_counter()
    batches = [list(range(i, min(i + settings.batch, count))) for i in range(0, count, settings.batch)]
    first: dict[int, Tensor] = {}
    samples: dict[int, Future[Judged]] = {}
    with _pool(workers) as pool:
        truth = {i: pool.submit(judge_truth, settings.height, i, count) for i in range(crew.rank, count, crew.world)}
        for indices in batches[crew.rank :: crew.world] if pipe is not None else []:
            with torch.autocast(crew.device.type, torch.bfloat16, enabled=crew.device.type == "cuda"):
                videos = sample(pipe, indices, settings)
            for i, video in zip(indices, videos, strict=True):
                samples[i] = pool.submit(judge_sample, video, i, count)
                if i < SHEET_CLIPS:
                    first[i] = video
            print(f"rank {crew.rank}: captions to {indices[-1]}, {time.perf_counter() - started:.0f} s", flush=True)
        mine = ({i: f.result() for i, f in samples.items()}, {i: f.result() for i, f in truth.items()}, first)
    shares: list[Any] = [mine]
    if crew.world > 1:
        shares = [None] * crew.world
        dist.all_gather_object(shares, mine)
    sampled, true, rows = ({k: v for share in shares for k, v in share[part].items()} for part in range(3))
    if rows and crew.rank == 0:
        measure.sheet(torch.stack([rows[i] for i in sorted(rows)])).save(out / f"score-{settings.height}.png")
    texts = captions(scene(measure.HELD_OUT_SEED, torch.arange(count)))
    return {
        "settings": asdict(settings) | {"held_out_seed": measure.HELD_OUT_SEED, "gpus": crew.world},
        "seconds": round(time.perf_counter() - started, 1),
        "chance": CHECKS,
        "samples": summary(sampled),
        "truth": summary(true),
        "clips": [
            {"index": i, "caption": texts[i], "verdicts": [asdict(v) for v in judged[RIGHT]]}
            for i, judged in sorted((sampled or true).items())
        ],
    }


@contextmanager
def _pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    # Fresh processes: a forked one would inherit the GPU's context.
    fresh = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=fresh, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        yield pool


def _print(report: dict[str, Any]) -> None:
    for what in ("samples", "truth"):
        for against, score in report[what].items():
            print(
                f"\n{what}, {against}: {score['clips']} clips, overlap {score['overlap']:.3f}, held {score['held']:.1%}"
            )
            for group in ("overall", "single"):
                cells = [
                    f"{n} {r['right']}/{r['judged']} {r['share']:.1%}" for n, r in score[group].items() if r["judged"]
                ]
                print(f"  {group}: " + ", ".join(cells))


def add_source(source: argparse._MutuallyExclusiveGroup) -> None:
    """Add the two ways to name weights, for `load`."""
    source.add_argument("--bundled", type=Path, help="diffusers folder, such as assets/bundled")
    source.add_argument("--trained", type=Path, help="folder with weights-*.safetensors")


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """Add the options of `Settings` beside the number of captions."""
    parser.add_argument("--height", type=int, default=128)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=8, help="prompts a call")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    add_source(source)
    source.add_argument("--truth", action="store_true", help="judge the true clips alone")
    parser.add_argument("--captions", type=int, default=200, help="at least 2: each clip is held against the next, too")
    add_sampling(parser)
    parser.add_argument("--workers", type=int, default=None, help="judging processes (default: up to 8)")
    parser.add_argument("--out", type=Path, required=True, help="folder for score.json and the sheet")
    options = parser.parse_args()
    if options.captions < 2:
        parser.error(f"--captions must be at least 2, got {options.captions}: the floor takes another clip's caption")
    crew = join("gloo")
    rank, world, device = crew.rank, crew.world, crew.device
    settings = Settings(options.captions, options.height, options.steps, options.guidance, options.seed, options.batch)
    workers = options.workers or max(1, min(8, (os.cpu_count() or 1) // world - 1))
    options.out.mkdir(parents=True, exist_ok=True)
    pipe = None if options.truth else load(options.bundled, options.trained, device)
    report = run(pipe, settings, crew, workers, options.out)
    if rank == 0:
        write_json(options.out / "score.json", report)
        _print(report)
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
