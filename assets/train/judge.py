"""What training leaves beside the weights: sample sheets and measures.json, made by all devices together."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dit_sparse.assets.train import measure
from dit_sparse.assets.train.parts import TextToVideo, pipeline, write_json


@dataclass(frozen=True)
class Crew:
    """Who works beside this process, and on which device."""

    rank: int
    world: int
    device: torch.device


def join(collective: str) -> Crew:
    """Join the processes that torchrun started, or work alone; each has a GPU of its own where there are any.

    Started with CUDA_VISIBLE_DEVICES=$LOCAL_RANK, each sees its GPU as cuda:0, and graphs that one compiles are
    found by the others in the cache.
    """
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group(collective)
    return Crew(rank, world, device)


def judge(model: TextToVideo, crew: Crew, out: Path, heights: tuple[int, ...], steps: tuple[int, ...]) -> None:
    """Write sample sheets and measures.json, the work shared among the devices."""
    sizes = list(zip(heights, steps, strict=True))
    attention, errors, clips = [], [], []
    cases = [(height, sigma) for height in heights for sigma in (0.9, 0.6, 0.2)]
    with torch.autocast(crew.device.type, torch.bfloat16, enabled=crew.device.type == "cuda"):
        for height, sigma in cases[crew.rank :: crew.world]:
            latents, ids = measure.held_out(torch.arange(2, device=crew.device), height)
            attention.append(asdict(measure.attention(model, latents, ids, sigma)))
        levels = [(height, sigma) for height in heights for sigma in (0.95, 0.9, 0.8, 0.6, 0.4, 0.2)]
        for height, sigma in levels[crew.rank :: crew.world]:
            latents, ids = measure.held_out(torch.arange(16, device=crew.device), height)
            error = measure.denoising_error(model, latents, ids, sigma)
            swapped = measure.denoising_error(model, latents, ids.roll(1, 0), sigma)
            errors.append({"height": height, "sigma": sigma, "error": error, "error_with_wrong_captions": swapped})
        pipe, picked = pipeline(model), list(measure.PROMPTS[crew.rank :: crew.world])
        pipe.set_progress_bar_config(disable=True)
        for height, count in sizes:
            clips.append(measure.sample(pipe, picked, [0] * len(picked), height, count, guidance_scale=4.0))
    gathered: list[Any] = [(attention, errors, clips)]
    if crew.world > 1:
        gathered = [None] * crew.world
        dist.all_gather_object(gathered, (attention, errors, clips))
    if crew.rank:
        return
    for i, height in enumerate(heights):
        rows = [gathered[p % crew.world][2][i][p // crew.world] for p in range(len(measure.PROMPTS))]
        measure.sheet(torch.stack(rows)).save(out / f"samples-{height}.png")
    measures = {
        "attention": sorted((a for g in gathered for a in g[0]), key=lambda a: (a["height"], -a["sigma"])),
        "held_out": sorted((e for g in gathered for e in g[1]), key=lambda e: (e["height"], -e["sigma"])),
    }
    write_json(out / "measures.json", measures)
