"""Tiny models: the Cosmos family."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dit_sparse.grid import Grid
from tests.models.case import TEXT, TEXT_WIDTH, TIME, Case, text, text_mask, timestep


def _cosmos(latents: Tensor, text_lengths: list[int]) -> dict[str, Any]:
    batch = len(latents)
    return {
        "hidden_states": latents,
        "timestep": timestep(batch),
        "encoder_hidden_states": text(batch),
        "attention_mask": text_mask(text_lengths).bool(),
        "fps": 24,
    }


def _cosmos2(latents: Tensor, text_lengths: list[int]) -> dict[str, Any]:
    """Tell a time for each frame and which are conditions, as video to world does."""
    batch, _, frames, height, width = latents.shape
    times = torch.full((batch, 1, frames, 1, 1), TIME)
    conditions = torch.zeros(batch, 1, frames, height, width, device=latents.device)
    return {**_cosmos(latents, text_lengths), "timestep": times, "condition_mask": conditions}


def _cosmos25(latents: Tensor, text_lengths: list[int]) -> dict[str, Any]:
    """Give text and image context as a pair; the processor masks neither."""
    batch = len(latents)
    arguments = {**_cosmos2(latents, text_lengths), "encoder_hidden_states": (text(batch), text(batch, 6))}
    return {name: value for name, value in arguments.items() if name != "attention_mask"}


def _cosmos3(latents: Tensor, text_lengths: list[int]) -> dict[str, Any]:
    """Pack one sample: the model has no batch."""
    one = latents[:1]
    frames, height, width = (-(-size // patch) for size, patch in zip(one.shape[2:], (1, 2, 2), strict=True))
    video = frames * height * width
    place = torch.arange(TEXT, TEXT + video)
    text_positions = torch.arange(TEXT)[None].expand(3, -1)
    video_positions = torch.cartesian_prod(*map(torch.arange, (frames, height, width))).T
    return {
        "input_ids": torch.randint(32, (TEXT,)),
        "text_indexes": torch.arange(TEXT),
        "position_ids": torch.cat([text_positions, video_positions + torch.tensor([[100], [0], [0]])], 1),
        "und_len": TEXT,
        "sequence_length": TEXT + video,
        "vision_tokens": [one],
        "vision_token_shapes": [(frames, height, width)],
        "vision_sequence_indexes": place,
        "vision_mse_loss_indexes": place,
        "vision_timesteps": torch.full((video,), TIME),
        "vision_noisy_frame_indexes": [torch.arange(frames)],
    }


COSMOS = {
    "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2,
    "text_embed_dim": TEXT_WIDTH, "adaln_lora_dim": 4, "max_size": (4, 32, 32), "concat_padding_mask": False,
}  # fmt: skip
COSMOS2 = {**COSMOS, "in_channels": 5, "extra_pos_embed_type": None}

CASES: list[Case] = [
    Case(
        "CosmosTransformer3DModel", COSMOS, latents=(4, 3, 16, 24), patch=(1, 2, 2), inputs=_cosmos,
        grid=Grid(3, 8, 12), usual=(16, 24, 88, 160),
    ),
    Case(
        "CosmosTransformer3DModel", COSMOS2, latents=(4, 3, 16, 24), patch=(1, 2, 2), inputs=_cosmos2,
        grid=Grid(3, 8, 12), usual=(16, 24, 88, 160), form="2",
    ),
    Case(
        "CosmosTransformer3DModel",
        {
            **COSMOS2, "use_crossattn_projection": True, "crossattn_proj_in_channels": TEXT_WIDTH,
            "encoder_hidden_states_channels": 32, "text_embed_dim": 32, "img_context_dim_in": TEXT_WIDTH,
            "img_context_num_tokens": 6, "img_context_dim_out": 32,
        },
        latents=(4, 3, 16, 24), patch=(1, 2, 2), inputs=_cosmos25, grid=Grid(3, 8, 12), usual=(16, 24, 88, 160),
        form="2.5",
    ),
    Case(
        "Cosmos3OmniTransformer",
        {
            "hidden_size": 32, "head_dim": 16, "num_attention_heads": 4, "num_key_value_heads": 2,
            "num_hidden_layers": 2, "intermediate_size": 32, "latent_channel": 4, "patch_latent_dim": 16,
            "vocab_size": 32, "rope_axes_dim": (4, 2, 2),
        },
        latents=(4, 3, 16, 24), patch=(1, 2, 2), inputs=_cosmos3, grid=Grid(3, 8, 12, prefix=TEXT),
        usual=(48, 48, 45, 80),
    ),
]  # fmt: skip
