"""Tiny models: CogVideoX and ConsisID, Wan's image-to-video forms, and models with history in front."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from torch import Tensor

from dit_sparse.grid import Grid
from tests.models import video_hunyuan, video_wan
from tests.models.case import TEXT, TEXT_WIDTH, Case, text, text_mask, timestep

HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}
COGVIDEOX = {
    **HEADS, "num_layers": 2, "in_channels": 4, "out_channels": 4, "text_embed_dim": TEXT_WIDTH, "time_embed_dim": 16,
    "max_text_seq_length": TEXT, "sample_width": 24, "sample_height": 16, "sample_frames": 9,
}  # fmt: skip
HUNYUAN = {
    **HEADS, "in_channels": 4, "out_channels": 4, "num_layers": 1, "text_embed_dim": TEXT_WIDTH,
    "rope_axes_dim": (4, 6, 6),
}  # fmt: skip


def past(latents: Tensor, frames: int) -> Tensor:
    """Draw latents of earlier frames, of the size of the present ones: [B, C, frames, H, W]."""
    batch, channels, _, height, width = latents.shape
    return torch.randn(batch, channels, frames, height, width, device=latents.device)


def _cogvideox(latents: Tensor, text_lengths: list[int]) -> dict[str, Any]:
    batch = len(latents)
    return {
        "hidden_states": latents.transpose(1, 2),
        "encoder_hidden_states": text(batch),
        "timestep": timestep(batch),
    }


def _cogvideox_15(latents: Tensor, text_lengths: list[int]) -> dict[str, Any]:
    frames, height, width = (size // 2 for size in latents.shape[2:])
    rotary = get_3d_rotary_pos_embed(
        16, None, (height, width), frames, grid_type="slice", max_size=(height, width)
    )  # each [frames * height * width, head_dim]
    return {**_cogvideox(latents, text_lengths), "image_rotary_emb": rotary, "ofs": torch.full((1,), 2.0)}


def _consisid(latents: Tensor, text_lengths: list[int]) -> dict[str, Any]:
    batch = len(latents)
    faces = {"id_cond": torch.randn(batch, TEXT_WIDTH), "id_vit_hidden": [text(batch, 6), text(batch, 6)]}
    return {**_cogvideox(latents, text_lengths), **faces}


def _helios(latents: Tensor, text_lengths: list[int]) -> dict[str, Any]:
    batch, frames = len(latents), latents.shape[2]
    return {
        "hidden_states": latents,
        "timestep": timestep(batch),
        "encoder_hidden_states": text(batch),
        "indices_hidden_states": torch.arange(9, 9 + frames)[None],
        "indices_latents_history_short": torch.tensor([[0, 8]]),
        "indices_latents_history_mid": torch.arange(6, 8)[None],
        "indices_latents_history_long": torch.arange(1, 6)[None],
        "latents_history_short": past(latents, 2),
        "latents_history_mid": past(latents, 2),
        "latents_history_long": past(latents, 5),
    }


def _framepack(latents: Tensor, text_lengths: list[int]) -> dict[str, Any]:
    batch, frames = len(latents), latents.shape[2]
    return {
        **video_hunyuan.hunyuan_video(latents, text_lengths),
        "image_embeds": text(batch, 5),
        "indices_latents": torch.arange(1, 1 + frames),
        "latents_clean": past(latents, 2),
        "indices_latents_clean": torch.tensor([0, 1 + frames]),
        "latents_history_2x": past(latents, 2),
        "indices_latents_history_2x": torch.arange(2 + frames, 4 + frames),
        "latents_history_4x": past(latents, 5),
        "indices_latents_history_4x": torch.arange(4 + frames, 9 + frames),
    }


def _motif(latents: Tensor, text_lengths: list[int]) -> dict[str, Any]:
    batch = len(latents)
    return {
        "hidden_states": latents,
        "timestep": timestep(batch),
        "encoder_hidden_states": text(batch),
        "encoder_attention_mask": text_mask(text_lengths).bool(),
    }


def _motif_i2v(latents: Tensor, text_lengths: list[int]) -> dict[str, Any]:
    return {**_motif(latents, text_lengths), "image_embeds": text(len(latents), 5)}


CASES: list[Case] = [
    Case(
        "CogVideoXTransformer3DModel", COGVIDEOX, latents=(4, 3, 16, 24), patch=(1, 2, 2), inputs=_cogvideox,
        grid=Grid(3, 8, 12, prefix=TEXT), usual=(16, 13, 60, 90),
    ),
    Case(
        "CogVideoXTransformer3DModel",
        {
            **COGVIDEOX, "in_channels": 8, "patch_size_t": 2, "ofs_embed_dim": 16, "patch_bias": False,
            "use_rotary_positional_embeddings": True,
        },
        latents=(8, 6, 16, 24), patch=(2, 2, 2), inputs=_cogvideox_15, grid=Grid(3, 8, 12, prefix=TEXT),
        usual=(32, 26, 60, 90), usual_config={"patch_size_t": 2}, form="1.5 image-to-video, patch over frames",
    ),
    Case(
        "ConsisIDTransformer3DModel",
        {
            **COGVIDEOX, "is_train_face": True, "cross_attn_interval": 1, "cross_attn_dim_head": 8,
            "cross_attn_num_heads": 2, "LFE_id_dim": TEXT_WIDTH, "LFE_vit_dim": TEXT_WIDTH, "LFE_depth": 2,
            "LFE_dim_head": 8, "LFE_num_heads": 2, "LFE_num_id_token": 2, "LFE_num_querie": 4, "LFE_output_dim": 21,
            "LFE_num_scale": 2,
        },
        latents=(4, 3, 16, 24), patch=(1, 2, 2), inputs=_consisid, grid=Grid(3, 8, 12, prefix=TEXT),
        usual=(32, 13, 60, 90),
    ),
    Case(
        "HeliosTransformer3DModel",
        {**video_wan.TINY, "rope_dim": (4, 6, 6), "is_amplify_history": True},
        latents=(4, 3, 16, 24), patch=(1, 2, 2), inputs=_helios, grid=Grid(3, 8, 12, prefix=2 * 96 + 4 * 6 + 2 * 6),
        usual=(16, 9, 48, 80),
    ),
    Case(
        "HunyuanVideoFramepackTransformer3DModel",
        {
            **HUNYUAN, "num_single_layers": 1, "num_refiner_layers": 1, "pooled_projection_dim": TEXT_WIDTH,
            "has_image_proj": True, "image_proj_dim": TEXT_WIDTH, "has_clean_x_embedder": True,
        },
        latents=(4, 3, 20, 24), patch=(1, 2, 2), inputs=_framepack, padded=True, usual=(16, 9, 90, 160),
        grid=Grid(3, 10, 12, prefix=2 * 120 + 5 * 6 + 2 * 3 * 3, suffix=5 + TEXT),
    ),
    Case(
        "MotifVideoTransformer3DModel",
        {
            **HUNYUAN, "num_single_layers": 2, "num_decoder_layers": 1, "enable_text_cross_attention_dual": True,
            "enable_text_cross_attention_single": True,
        },
        latents=(4, 3, 16, 24), patch=(1, 2, 2), inputs=_motif, padded=True, usual=(33, 31, 92, 160),
        grid=Grid(3, 8, 12, suffix=TEXT),
    ),
    Case(
        "MotifVideoTransformer3DModel",
        {**HUNYUAN, "num_single_layers": 1, "image_embed_dim": TEXT_WIDTH},
        latents=(4, 3, 16, 24), patch=(1, 2, 2), inputs=_motif_i2v, padded=True, usual=(33, 31, 92, 160),
        grid=Grid(3, 8, 12, suffix=5 + TEXT), form="image-to-video",
    ),
]  # fmt: skip
