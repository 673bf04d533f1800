"""Tiny models: LTX, Mochi, Allegro, EasyAnimate; and those of Cosmos, Kandinsky, MiniMax."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import LTXPipeline
from diffusers.pipelines.ltx.pipeline_ltx_condition import LTXConditionPipeline
from diffusers.pipelines.ltx.pipeline_ltx_i2v_long_multi_prompt import build_video_coords_for_window
from torch import Tensor

from dit_sparse.grid import Grid
from tests.models.case import TEXT, TEXT_WIDTH, Case, text, text_mask, timestep

CONDITIONS = 96  # tokens of a keyframe of LTX at the tiny size


def _sizes(latents: Tensor) -> dict[str, Any]:
    frames, height, width = latents.shape[2:]
    return {"num_frames": frames, "height": height, "width": width}


def _ltx(latents: Tensor, text_lengths: list[int]) -> dict[str, Any]:
    batch = len(latents)
    return {
        "hidden_states": LTXPipeline._pack_latents(latents),
        "encoder_hidden_states": text(batch),
        "timestep": timestep(batch),
        "encoder_attention_mask": text_mask(text_lengths),
        "rope_interpolation_scale": (8 / 25, 32, 32),
        **_sizes(latents),
    }


def _ltx_condition(latents: Tensor, text_lengths: list[int]) -> dict[str, Any]:
    """Put a keyframe for the end in front, as the pipeline does; it tells coordinates and no sizes."""
    batch = len(latents)
    frames, height, width = latents.shape[2:]

    def coordinates(frames: int, first: int) -> Tensor:
        ids = LTXConditionPipeline._prepare_video_ids(batch, frames, height, width)
        return LTXConditionPipeline._scale_video_ids(ids, frame_index=first)

    packed = LTXConditionPipeline._pack_latents(latents)
    video_coords = torch.cat([coordinates(1, 8 * frames), coordinates(frames, 0)], 2).float()
    video_coords[:, 0] /= 25
    return {
        "hidden_states": torch.cat([_noise_like(packed, height * width), packed], 1),
        "encoder_hidden_states": text(batch),
        "timestep": timestep(batch),
        "encoder_attention_mask": text_mask(text_lengths),
        "video_coords": video_coords,
    }


def _ltx_window(latents: Tensor, text_lengths: list[int]) -> dict[str, Any]:
    """Put frames of the window before, of a guide and a reference behind, as the pipeline of long prompts does."""
    batch, _, frames, height, width = latents.shape
    more = {"overlap_len": 1, "guiding_len": frames - 1, "negative_len": 1}
    behind = torch.randn(batch, latents.shape[1], sum(more.values()), height, width).to(latents.device)
    window = torch.cat([latents, behind], 2)
    packed = LTXConditionPipeline._pack_latents(window)
    coordinates = build_video_coords_for_window(
        latents=torch.empty(window.shape), **more, rope_interpolation_scale=torch.tensor((8, 32, 32)), frame_rate=25
    )
    return {
        "hidden_states": packed,
        "encoder_hidden_states": text(batch),
        "timestep": timestep(batch),
        "encoder_attention_mask": text_mask(text_lengths),
        "video_coords": coordinates,
    }


def _ltx2(latents: Tensor, text_lengths: list[int]) -> dict[str, Any]:
    batch = len(latents)
    return {
        "hidden_states": LTXPipeline._pack_latents(latents),
        "audio_hidden_states": torch.randn(batch, 9, 4),
        "encoder_hidden_states": text(batch),
        "audio_encoder_hidden_states": text(batch),
        "timestep": timestep(batch),
        "encoder_attention_mask": text_mask(text_lengths),
        "audio_encoder_attention_mask": text_mask(text_lengths),
        "audio_num_frames": 9,
        **_sizes(latents),
    }


def _ltx2_keyframes(latents: Tensor, text_lengths: list[int]) -> dict[str, Any]:
    """Put the tokens of keyframes behind the video, with the coordinates of all."""
    arguments = _ltx2(latents, text_lengths)
    packed = torch.cat([arguments["hidden_states"], _noise_like(arguments["hidden_states"], 50)], 1)
    coordinates = torch.rand(len(latents), 3, packed.shape[1], 2) * 100
    return {**arguments, "hidden_states": packed, "video_coords": coordinates}


def _noise_like(packed: Tensor, tokens: int) -> Tensor:
    return torch.randn(len(packed), tokens, packed.shape[2]).to(packed.device)


def _mochi(latents: Tensor, text_lengths: list[int]) -> dict[str, Any]:
    batch = len(latents)
    return {
        "hidden_states": latents,
        "encoder_hidden_states": text(batch),
        "timestep": timestep(batch),
        "encoder_attention_mask": text_mask(text_lengths).bool(),
    }


def _mochi_short(latents: Tensor, text_lengths: list[int]) -> dict[str, Any]:
    """Give each sample a prompt of its own length; the model drops the padding itself."""
    return _mochi(latents, [TEXT - 7 + 3 * sample for sample in range(len(latents))])


def _allegro(latents: Tensor, text_lengths: list[int]) -> dict[str, Any]:
    batch, tokens = len(latents), [size // patch for size, patch in zip(latents.shape[2:], (1, 2, 2), strict=True)]
    positions = torch.cartesian_prod(*map(torch.arange, tokens)).T[:, None]
    angles = [torch.randn(size, 2) for size in tokens]
    return {
        "hidden_states": latents,
        "encoder_hidden_states": text(batch),
        "timestep": timestep(batch),
        "encoder_attention_mask": text_mask(text_lengths),
        "image_rotary_emb": ([(a.cos().repeat(1, 2), a.sin().repeat(1, 2)) for a in angles], tuple(positions)),
    }


def _easy_animate(latents: Tensor, text_lengths: list[int]) -> dict[str, Any]:
    batch = len(latents)
    return {"hidden_states": latents, "timestep": timestep(batch), "encoder_hidden_states": text(batch)}


def _easy_animate_control(latents: Tensor, text_lengths: list[int]) -> dict[str, Any]:
    arguments = _easy_animate(latents, text_lengths)
    return {**arguments, "control_latents": latents.roll(1, 0), "encoder_hidden_states_t5": text(len(latents), 5)}


LTX = {
    "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2,
    "cross_attention_dim": 32, "caption_channels": TEXT_WIDTH,
}  # fmt: skip
LTX2 = {
    **LTX, "audio_in_channels": 4, "audio_out_channels": 4, "audio_num_attention_heads": 2,
    "audio_attention_head_dim": 8, "audio_cross_attention_dim": 16,
}  # fmt: skip
MOCHI = {
    "in_channels": 4, "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2, "text_embed_dim": TEXT_WIDTH,
    "pooled_projection_dim": 24, "time_embed_dim": 16,
}  # fmt: skip
EASY_ANIMATE = {
    "in_channels": 4, "out_channels": 4, "patch_size": 2, "num_attention_heads": 2, "attention_head_dim": 16,
    "num_layers": 2, "mmdit_layers": 1, "time_embed_dim": 16, "text_embed_dim": TEXT_WIDTH,
}  # fmt: skip

CASES: list[Case] = [
    Case(
        "LTXVideoTransformer3DModel", LTX, latents=(4, 3, 8, 12), patch=(1, 1, 1), inputs=_ltx, grid=Grid(3, 8, 12),
        usual=(128, 21, 16, 22),
    ),
    Case(
        "LTXVideoTransformer3DModel", LTX, latents=(4, 3, 8, 12), patch=(1, 1, 1), inputs=_ltx_condition,
        grid=Grid(3, 8, 12, prefix=CONDITIONS), usual=(128, 21, 16, 22), form="conditions",
    ),
    Case(
        "LTXVideoTransformer3DModel", LTX, latents=(4, 3, 8, 12), patch=(1, 1, 1), inputs=_ltx_window,
        grid=Grid(3, 8, 12, suffix=4 * 96), usual=(128, 21, 16, 22), form="window of a long clip",
    ),
    Case(
        "LTX2VideoTransformer3DModel", LTX2, latents=(4, 3, 8, 12), patch=(1, 1, 1), inputs=_ltx2, grid=Grid(3, 8, 12),
        usual=(128, 16, 16, 24),
    ),
    Case(
        "LTX2VideoTransformer3DModel", {**LTX2, "gated_attn": True, "perturbed_attn": True, "rope_type": "split"},
        latents=(4, 3, 8, 12), patch=(1, 1, 1), inputs=_ltx2_keyframes, grid=Grid(3, 8, 12, suffix=50),
        usual=(128, 16, 16, 24), form="keyframes",
    ),
    Case(
        "MochiTransformer3DModel", MOCHI, latents=(4, 3, 16, 24), patch=(1, 2, 2), inputs=_mochi,
        grid=Grid(3, 8, 12, suffix=TEXT), usual=(12, 4, 60, 106),
    ),
    Case(
        "MochiTransformer3DModel", MOCHI, latents=(4, 3, 16, 24), patch=(1, 2, 2), inputs=_mochi_short,
        grid=Grid(3, 8, 12, suffix=TEXT - 7), usual=(12, 4, 60, 106), form="padded text",
    ),
    Case(
        "AllegroTransformer3DModel",
        {
            "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 2,
            "cross_attention_dim": 24, "caption_channels": TEXT_WIDTH, "sample_height": 16, "sample_width": 24,
        },
        latents=(4, 3, 16, 24), patch=(1, 2, 2), inputs=_allegro, grid=Grid(3, 8, 12), usual=(4, 22, 90, 160),
    ),
    Case(
        "EasyAnimateTransformer3DModel", EASY_ANIMATE, latents=(4, 3, 16, 24), patch=(1, 2, 2), inputs=_easy_animate,
        grid=Grid(3, 8, 12, prefix=TEXT), usual=(16, 13, 64, 64), usual_config={"patch_size": 2},
    ),
    Case(
        "EasyAnimateTransformer3DModel", {**EASY_ANIMATE, "in_channels": 8, "text_embed_dim_t5": TEXT_WIDTH},
        latents=(4, 3, 16, 24), patch=(1, 2, 2), inputs=_easy_animate_control,
        grid=Grid(3, 8, 12, prefix=TEXT + 5), usual=(16, 13, 64, 64), usual_config={"patch_size": 2}, form="control",
    ),
]  # fmt: skip
