"""Small pictures of a clip that is still being denoised: an estimate of its clean latents, decoded for one frame."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from dit_sparse.pipelines.generate import OnLatents, is_cuda, wait_for

Show = Callable[[NDArray[np.uint8]], None]  # takes RGB [H, W, 3]
MOST = 8  # pictures of one run, spread evenly over its steps: as many for dense as for sparse
MOST_SIDE = 256  # pixels
WINDOW_LATENTS = 3  # decoded for one frame: causal VAEs read the latents before it


def previews(pipe: Any, steps: int, show: Show) -> OnLatents | None:
    """Return what `generate` may call after each step to show pictures of the run, or None for an unknown pipeline.

    Known is a pipeline whose scheduler tells an estimate of the clean latents (`ESTIMATES`) and whose latents we can
    decode as it does (`DECODERS`). A wrong picture would be worse than none.
    """
    estimate, decode = ESTIMATES.get(type(pipe.scheduler).__name__), DECODERS.get(type(pipe).__name__)
    if estimate is None or decode is None:
        return None
    due = {-(-steps * number // (MOST + 1)) for number in range(1, MOST + 1)} - {steps}
    on_cuda = is_cuda(pipe)
    before: Tensor | None = None

    @torch.no_grad()
    def after_step(done: int, latents: Tensor) -> float:
        nonlocal before
        earlier, before = before, latents
        if done not in due:
            return 0.0
        wait_for(on_cuda)  # what was queued belongs to the run
        start = time.perf_counter()
        clean = estimate(pipe.scheduler, done, earlier, latents)
        if clean is not None:
            show(_small(decode(pipe, clean)))
        wait_for(on_cuda)
        return time.perf_counter() - start

    return after_step


def middle_frame(latent_frames: int, frames_per_latent: int) -> int:
    """Return which frame of the clip a picture shows: the last one of the middle latent."""
    return latent_frames // 2 * frames_per_latent


def _of_euler(scheduler: Any, done: int, earlier: Tensor | None, latents: Tensor) -> Tensor | None:
    """Follow the straight line of the last step to its end: v = dx / dsigma, x0 = x - sigma v.

    Paper: Scaling Rectified Flow Transformers for High-Resolution Image Synthesis (arXiv 2403.03206), section 2.
    """
    config, sigmas = scheduler.config, scheduler.sigmas
    if earlier is None or config.get("stochastic_sampling") or config.get("invert_sigmas"):
        return None
    was, now = float(sigmas[done - 1]), float(sigmas[done])
    if was == now:
        return None
    return latents.float() - now * (latents.float() - earlier.float()) / (now - was)


def _of_unipc(scheduler: Any, done: int, earlier: Tensor | None, latents: Tensor) -> Tensor | None:
    """Read the prediction of x0 that the scheduler itself keeps."""
    kept = scheduler.model_outputs[-1] if scheduler.config.predict_x0 else None
    return kept.float() if isinstance(kept, Tensor) and kept.shape == latents.shape else None


def _decode_wan(pipe: Any, latents: Tensor) -> Tensor:
    """Decode the middle frame of [B, C, T, h, w]: [3, H, W] in [0, 1]."""
    vae, middle = pipe.vae, latents.shape[2] // 2
    window = latents[:1, :, max(0, middle + 1 - WINDOW_LATENTS) : middle + 1].to(vae.device, vae.dtype)
    mean, std = (
        torch.tensor(values, dtype=window.dtype, device=window.device).view(1, -1, 1, 1, 1)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    pixels: Tensor = vae.decode(window * std + mean, return_dict=False)[0]
    return (pixels[0, :, -1].float() / 2 + 0.5).clamp(0, 1)


def _small(frame: Tensor) -> NDArray[np.uint8]:
    """Shrink [3, H, W] in [0, 1] to at most MOST_SIDE pixels a side, as RGB [H, W, 3]."""
    height, width = frame.shape[1:]
    shrink = min(1.0, MOST_SIDE / max(height, width))
    if shrink < 1.0:
        size = (max(1, round(height * shrink)), max(1, round(width * shrink)))
        frame = F.interpolate(frame[None], size, mode="area")[0]
    return (frame * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()


ESTIMATES: dict[str, Callable[[Any, int, Tensor | None, Tensor], Tensor | None]] = {
    "FlowMatchEulerDiscreteScheduler": _of_euler,
    "UniPCMultistepScheduler": _of_unipc,
}
DECODERS: dict[str, Callable[[Any, Tensor], Tensor]] = {"WanPipeline": _decode_wan}
