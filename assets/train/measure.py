"""Judge trained weights: sample sheets, held-out denoising error, and how concentrated the attention is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from diffusers import WanPipeline
from PIL import Image
from torch import Tensor
from torch.overrides import TorchFunctionMode

from dit_sparse.assets.train.clips import CLIP_FRAMES, Scene, caption_ids, scene
from dit_sparse.assets.train.parts import TextToVideo
from dit_sparse.assets.train.render import render
from dit_sparse.pipelines.pixel_vae import pack

HELD_OUT_SEED = 2  # training draws from seed 1
LATENT_STD = 0.5
MASS = 0.95  # of the softmax, in all measures of where attention goes
PROMPTS = (
    "a red circle bouncing on a white background",
    "a striped blue star spinning on a gradient yellow and red background",
    "a dotted green square drifting right on a plain black background",
    "a yellow triangle still and a purple circle circling on a checkered gray and white background, "
    "camera panning left",
    "a shaded orange heart swinging on a cloudy blue and white background, camera zooming in",
    "a cyan flower pulsing on a brown background, behind a white vertical bar",
    "two mirrored pink moons circling on a gradient purple and black background",
    "a spinning white cross on a striped green and yellow background, camera panning away and back",
)


@dataclass(frozen=True)
class Attention:
    """Share of keys that hold 95 % of the softmax mass of sampled queries, at one size and noise level."""

    height: int
    sigma: float
    by_head: list[list[float]]  # [layers][heads], mean over queries
    query_quantiles: list[list[float]]  # [layers][5 %, 50 %, 95 %], over queries and heads


def to_latents(pixels: Tensor) -> Tensor:
    """Turn pixels [B, 3, F, H, W] into the latents [B, 24, T, H/2, W/2] that the transformer sees."""
    return pack(pixels, temporal=2, spatial=2) / LATENT_STD


def held_out(index: Tensor, height: int, frames: int = CLIP_FRAMES) -> tuple[Tensor, Tensor]:
    """Return latents and caption ids of held-out clips `index` [B] at a square size."""
    clips = scene(HELD_OUT_SEED, index)
    return to_latents(render(clips, frames, height, height)), caption_ids(clips)


@torch.no_grad()
def denoising_error(
    model: TextToVideo, latents: Tensor, ids: Tensor, sigma: float, seed: int = 0, context_tokens: int = 64
) -> float:
    """Return the mean squared error of the predicted velocity at noise level `sigma` in (0, 1)."""
    # The noise is drawn on the CPU so that every device judges the same inputs.
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(seed)).to(latents)
    noisy = (1 - sigma) * latents + sigma * noise
    timestep = torch.full((len(latents),), sigma * 1000.0, device=latents.device)
    predicted = model(noisy, timestep, ids, context_tokens)
    return F.mse_loss(predicted.float(), (noise - latents).float()).item()


@torch.no_grad()
def attention(model: TextToVideo, latents: Tensor, ids: Tensor, sigma: float, queries: int = 256) -> Attention:
    """Measure one forward of `model` on `latents` [B, 24, T, h, w] noised to `sigma`."""
    spy = AttentionSpy(latents[0, 0].numel() // 4, partial(_share, queries=queries))
    with spy:
        denoising_error(model, latents, ids, sigma)
    quantiles = torch.tensor([0.05, 0.5, 0.95])
    return Attention(
        height=latents.shape[-1] * 2,
        sigma=sigma,
        by_head=[shares.mean(dim=(0, 2)).tolist() for shares in spy.found],
        query_quantiles=[shares.flatten().quantile(quantiles).tolist() for shares in spy.found],
    )


class AttentionSpy(TorchFunctionMode):
    """Keep what `look(query, key)`, both [B, H, S, D], returns for every self-attention call over S = `tokens`."""

    def __init__(self, tokens: int, look: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.tokens, self.look = tokens, look
        self.found: list[Tensor] = []

    def __torch_function__(self, func: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None) -> object:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            query = kwargs["query"] if "query" in kwargs else args[0]
            key = kwargs["key"] if "key" in kwargs else args[1]
            if query.shape[-2] == key.shape[-2] == self.tokens:
                self.found.append(self.look(query, key))
        return func(*args, **kwargs)


def count_for_mass(share: Tensor) -> Tensor:
    """Count the largest entries of `share` [..., n], which sums to 1, that make up MASS: int64 [...], at least 1."""
    return (share.sort(dim=-1, descending=True).values.cumsum(dim=-1) < MASS).sum(dim=-1) + 1


def _share(query: Tensor, key: Tensor, queries: int) -> Tensor:
    """Return the share of keys behind MASS for `queries` random rows, fp32 [B, H, queries]."""
    tokens = query.shape[-2]
    picked = torch.randperm(tokens, generator=torch.Generator().manual_seed(0))[:queries].to(query.device)
    scores = query[:, :, picked].float() @ key.float().transpose(-1, -2) * query.shape[-1] ** -0.5
    return (count_for_mass(scores.softmax(dim=-1)) / tokens).cpu()


def sample(
    pipe: WanPipeline, prompts: list[str], seeds: list[int], height: int, steps: int, guidance_scale: float
) -> Tensor:
    """Generate one clip a prompt through the stock pipeline, each from the noise of its seed: uint8 [B, T, H, W, 3]."""
    video = pipe(
        prompts,
        height=height,
        width=height,
        num_frames=CLIP_FRAMES,
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        max_sequence_length=64,
        output_type="pt",
    ).frames
    return (video.float().permute(0, 1, 3, 4, 2) * 255).round().to(torch.uint8).cpu()


def true_videos(clips: Scene, height: int) -> Tensor:
    """Return clips as the generator draws them at a square size: uint8 [B, T, H, W, 3]."""
    pixels = render(clips, CLIP_FRAMES, height, height)
    return ((pixels.permute(0, 2, 3, 4, 1) + 1) * 127.5).round().to(torch.uint8)


def sheet(videos: Tensor, every: int = 4, tile: int = 96) -> Image.Image:
    """Lay out uint8 videos [B, T, H, W, 3]: one row a clip, every fourth frame."""
    rows = videos[:, ::every].permute(0, 2, 1, 3, 4).flatten(2, 3).flatten(0, 1)
    columns = len(range(0, videos.shape[1], every))
    return Image.fromarray(rows.numpy()).resize((columns * tile, len(videos) * tile), Image.Resampling.BICUBIC)
