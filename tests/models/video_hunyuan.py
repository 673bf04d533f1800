"""Tiny models: the HunyuanVideo family."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from dit_sparse.grid import Grid
from tests.models.case import TEXT, TEXT_WIDTH, Case, text, text_mask, timestep


def hunyuan_video(latents: Tensor, text_lengths: list[int]) -> dict[str, Any]:
    """Return the arguments of HunyuanVideo; Framepack's are these and more."""
    batch = len(latents)
    return {
        "hidden_states": latents,
        "timestep": timestep(batch),
        "encoder_hidden_states": text(batch),
        "encoder_attention_mask": text_mask(text_lengths),
        "pooled_projections": text(batch)[:, 0],
        "guidance": timestep(batch),
    }


def _hunyuan_video_15(latents: Tensor, text_lengths: list[int]) -> dict[str, Any]:
    batch, half = len(latents), TEXT // 2
    return {
        "hidden_states": latents,
        "timestep": timestep(batch),
        "encoder_hidden_states": text(batch, half),
        "encoder_attention_mask": text_mask([max(1, length - half) for length in text_lengths], half).bool(),
        "encoder_hidden_states_2": text(batch, half),
        "encoder_attention_mask_2": text_mask([min(half, length) for length in text_lengths], half).bool(),
        "image_embeds": text(batch, 3),
    }


CASES = [
    Case(
        "HunyuanVideoTransformer3DModel",
        {
            "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 1,
            "num_single_layers": 1, "num_refiner_layers": 1, "text_embed_dim": TEXT_WIDTH,
            "pooled_projection_dim": TEXT_WIDTH, "rope_axes_dim": (4, 6, 6),
        },
        latents=(4, 3, 16, 24), patch=(1, 2, 2), inputs=hunyuan_video, grid=Grid(3, 8, 12, suffix=TEXT),
        usual=(16, 33, 90, 160), padded=True,
    ),
    Case(
        "HunyuanVideo15Transformer3DModel",
        {
            "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2,
            "num_refiner_layers": 1, "text_embed_dim": TEXT_WIDTH, "text_embed_2_dim": TEXT_WIDTH,
            "image_embed_dim": TEXT_WIDTH, "rope_axes_dim": (4, 6, 6), "patch_size": 1, "patch_size_t": 1,
        },
        latents=(4, 3, 8, 12), patch=(1, 1, 1), inputs=_hunyuan_video_15, grid=Grid(3, 8, 12, suffix=TEXT + 3),
        usual=(65, 31, 30, 52), padded=True,
    ),
]  # fmt: skip
