"""Tiny models: further forms of Wan, and the classes made after it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dit_sparse.grid import Grid
from tests.models.case import TEXT_WIDTH, TIME, Case, text, timestep

LATENTS, PATCH, GRID = (4, 3, 16, 24), (1, 2, 2), Grid(3, 8, 12)
TINY = {
    "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4, "text_dim": TEXT_WIDTH,
    "freq_dim": 16, "ffn_dim": 32, "num_layers": 2,
}  # fmt: skip
IMAGE = {"image_dim": TEXT_WIDTH, "added_kv_proj_dim": 32}
WITH_IMAGE_TEXT = 512  # where cross-attention has image tokens too, it takes the last 512 for the text


def _wan(latents: Tensor, text_lengths: list[int]) -> dict[str, Any]:
    batch = len(latents)
    return {"hidden_states": latents, "timestep": timestep(batch), "encoder_hidden_states": text(batch)}


def _wan_image(latents: Tensor, text_lengths: list[int]) -> dict[str, Any]:
    batch = len(latents)
    return {
        "hidden_states": latents,
        "timestep": timestep(batch),
        "encoder_hidden_states": text(batch, WITH_IMAGE_TEXT),
        "encoder_hidden_states_image": text(batch, 5),
    }


def _wan_ti2v(latents: Tensor, text_lengths: list[int]) -> dict[str, Any]:
    batch, _, frames, height, width = latents.shape
    times = torch.full((batch, frames, height // 2, width // 2), TIME)
    times[:, 0] = 0.0  # the given image is the first frame
    return {**_wan(latents, text_lengths), "timestep": times.flatten(1)}


def _vace(latents: Tensor, text_lengths: list[int]) -> dict[str, Any]:
    control = torch.randn(len(latents), 6, *latents.shape[2:], device=latents.device)
    return {**_wan(latents, text_lengths), "control_hidden_states": control}


def _animate(latents: Tensor, text_lengths: list[int]) -> dict[str, Any]:
    batch, channels, frames, height, width = latents.shape
    reference = torch.randn(batch, channels, 1, height, width, device=latents.device)
    return {
        **_wan_image(torch.cat([reference, latents], 2), text_lengths),
        "pose_hidden_states": torch.randn(batch, 4, frames, height, width, device=latents.device),
        "face_pixel_values": torch.rand(batch, 3, 4 * (frames - 1) + 1, 16, 16),
    }


def _diffusion_forcing(latents: Tensor, text_lengths: list[int]) -> dict[str, Any]:
    batch, _, frames, _, _ = latents.shape
    times = torch.linspace(0.0, TIME, frames).expand(batch, -1)  # the first frames are ahead
    return {**_wan(latents, text_lengths), "timestep": times, "enable_diffusion_forcing": True}


def _anyflow(latents: Tensor, text_lengths: list[int]) -> dict[str, Any]:
    batch, _, frames, _, _ = latents.shape
    return {
        "hidden_states": latents.transpose(1, 2),
        "timestep": torch.full((batch, frames), TIME),
        "r_timestep": torch.full((batch, frames), TIME / 2),
        "encoder_hidden_states": text(batch),
    }


CASES = [
    Case(
        "WanTransformer3DModel", TINY, latents=LATENTS, patch=PATCH, inputs=_wan, grid=GRID, usual=(16, 21, 60, 104),
    ),
    Case(
        "WanTransformer3DModel", {**TINY, **IMAGE}, latents=LATENTS, patch=PATCH, inputs=_wan_image, grid=GRID,
        usual=(36, 21, 60, 104), form="image-to-video",
    ),
    Case(
        "WanTransformer3DModel", TINY, latents=LATENTS, patch=PATCH, inputs=_wan_ti2v, grid=GRID,
        usual=(48, 21, 60, 104), form="2.2 5B, timesteps of tokens",
    ),
    Case(
        "WanVACETransformer3DModel", {**TINY, "vace_layers": [0, 1], "vace_in_channels": 6}, latents=LATENTS,
        patch=PATCH, inputs=_vace, grid=GRID, usual=(16, 21, 60, 104),
    ),
    Case(
        "WanAnimateTransformer3DModel",
        {
            **TINY, **IMAGE, "in_channels": 12, "latent_channels": 4, "motion_encoder_size": 16,
            "motion_encoder_channel_sizes": {"4": 8, "8": 8, "16": 8}, "motion_style_dim": 8, "motion_dim": 4,
            "motion_encoder_dim": 16, "face_encoder_hidden_dim": 16, "face_encoder_num_heads": 2,
            "inject_face_latents_blocks": 2,
        },
        latents=(12, 3, 16, 24), patch=PATCH, inputs=_animate, grid=Grid(3, 8, 12, prefix=96), usual=(36, 20, 90, 160),
    ),
    Case(
        "SkyReelsV2Transformer3DModel", TINY, latents=LATENTS, patch=PATCH, inputs=_wan, grid=GRID,
        usual=(16, 25, 68, 120),
    ),
    Case(
        "SkyReelsV2Transformer3DModel", TINY, latents=LATENTS, patch=PATCH, inputs=_diffusion_forcing, grid=GRID,
        usual=(16, 25, 68, 120), form="diffusion forcing",
    ),
    Case(
        "ChronoEditTransformer3DModel", {**TINY, **IMAGE}, latents=LATENTS, patch=PATCH, inputs=_wan_image, grid=GRID,
        usual=(36, 21, 60, 104),
    ),
    Case(
        "AnyFlowTransformer3DModel", TINY, latents=LATENTS, patch=PATCH, inputs=_anyflow, grid=GRID,
        usual=(16, 21, 60, 104),
    ),
]  # fmt: skip
