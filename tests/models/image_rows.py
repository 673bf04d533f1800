"""Tiny models: images, latents in rows and columns."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dit_sparse.grid import Grid
from tests.models.case import TEXT, TEXT_WIDTH, TIME, Case, text, text_mask, timestep

HEADS = {"num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "num_layers": 2}
LATENTS = (4, 1, 32, 36)
PATCH = (1, 2, 2)
IMAGE = Grid(1, 16, 18)
AT_1024 = (16, 1, 128, 128)


def _image(latents: Tensor) -> Tensor:
    return latents[:, :, 0]


def _pixart(latents: Tensor, text_lengths: list[int]) -> dict[str, Any]:
    batch = len(latents)
    return {
        "hidden_states": _image(latents), "timestep": timestep(batch), "encoder_hidden_states": text(batch),
        "encoder_attention_mask": text_mask(text_lengths),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }  # fmt: skip


def _hunyuan_image(latents: Tensor, text_lengths: list[int]) -> dict[str, Any]:
    batch = len(latents)
    return {
        "hidden_states": _image(latents), "timestep": timestep(batch), "encoder_hidden_states": text(batch),
        "encoder_attention_mask": text_mask(text_lengths),
    }  # fmt: skip


def _hunyuan_image_two_encoders(latents: Tensor, text_lengths: list[int]) -> dict[str, Any]:
    batch, half = len(latents), TEXT // 2
    return {
        "hidden_states": _image(latents), "timestep": timestep(batch), "encoder_hidden_states": text(batch, half),
        "encoder_attention_mask": text_mask([max(1, length - half) for length in text_lengths], half),
        "encoder_hidden_states_2": text(batch, half),
        "encoder_attention_mask_2": text_mask([min(half, length) for length in text_lengths], half),
    }  # fmt: skip


def _hunyuan_image_refiner(latents: Tensor, text_lengths: list[int]) -> dict[str, Any]:
    batch = len(latents)
    return {
        **_hunyuan_image(latents, text_lengths), "hidden_states": latents, "guidance": timestep(batch),
    }  # fmt: skip


def _cogview(latents: Tensor, text_lengths: list[int]) -> dict[str, Any]:
    batch, size = len(latents), torch.tensor([[256.0, 288.0]])
    return {
        "hidden_states": _image(latents), "timestep": timestep(batch), "encoder_hidden_states": text(batch),
        "original_size": size.repeat(batch, 1), "target_size": size.repeat(batch, 1),
        "crop_coords": torch.zeros(batch, 2),
    }  # fmt: skip


def _glm_image(latents: Tensor, text_lengths: list[int]) -> dict[str, Any]:
    arguments = _cogview(latents, text_lengths)
    del arguments["original_size"]
    tokens = latents.shape[3] * latents.shape[4] // 4
    return {
        **arguments, "prior_token_id": torch.randint(0, 8, (len(latents), tokens)),
        "prior_token_drop": torch.zeros(len(latents), tokens, dtype=torch.bool),
    }  # fmt: skip


def _auraflow(latents: Tensor, text_lengths: list[int]) -> dict[str, Any]:
    batch = len(latents)
    return {
        "hidden_states": _image(latents), "timestep": timestep(batch) / 1000, "encoder_hidden_states": text(batch)
    }  # fmt: skip


def _hunyuan_dit(latents: Tensor, text_lengths: list[int]) -> dict[str, Any]:
    batch = len(latents)
    angles = torch.randn(latents.shape[3] * latents.shape[4] // 4, 16)
    return {
        "hidden_states": _image(latents), "timestep": timestep(batch), "encoder_hidden_states": text(batch),
        "text_embedding_mask": text_mask(text_lengths), "encoder_hidden_states_t5": text(batch, 4, 8),
        "text_embedding_mask_t5": text_mask([4] * batch, 4),
        "image_meta_size": torch.full((batch, 6), 256.0), "style": torch.zeros(batch, dtype=torch.long),
        "image_rotary_emb": (angles.cos(), angles.sin()),
    }  # fmt: skip


def _dit(latents: Tensor, text_lengths: list[int]) -> dict[str, Any]:
    batch = len(latents)
    return {
        "hidden_states": _image(latents), "timestep": torch.full((batch,), int(TIME)),
        "class_labels": torch.arange(batch),
    }  # fmt: skip


def _ernie_image(latents: Tensor, text_lengths: list[int]) -> dict[str, Any]:
    batch = len(latents)
    return {
        "hidden_states": _image(latents), "timestep": timestep(batch), "text_bth": text(batch),
        "text_lens": torch.tensor(text_lengths),
    }  # fmt: skip


def _prx(latents: Tensor, text_lengths: list[int]) -> dict[str, Any]:
    batch = len(latents)
    return {
        "hidden_states": _image(latents), "timestep": timestep(batch) / 1000, "encoder_hidden_states": text(batch),
        "attention_mask": text_mask(text_lengths).bool(),
    }  # fmt: skip


def _prx_left(latents: Tensor, text_lengths: list[int]) -> dict[str, Any]:
    arguments = _prx(latents, text_lengths)
    return {**arguments, "attention_mask": arguments["attention_mask"].flip(1)}


HUNYUAN_IMAGE = {
    "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 1,
    "num_single_layers": 1, "num_refiner_layers": 1, "text_embed_dim": TEXT_WIDTH, "rope_axes_dim": (8, 8),
}  # fmt: skip
COGVIEW = {**HEADS, "out_channels": 4, "text_embed_dim": TEXT_WIDTH, "time_embed_dim": 16, "condition_dim": 8}
WITH_TEXT = Grid(1, 16, 18, prefix=TEXT)
PRX = {
    "in_channels": 4, "context_in_dim": TEXT_WIDTH, "hidden_size": 32, "num_heads": 2, "depth": 2, "axes_dim": [8, 8],
}  # fmt: skip


def _omnigen(latents: Tensor, text_lengths: list[int]) -> dict[str, Any]:
    (batch, _, _, height, width), text_tokens = latents.shape, TEXT + 1  # the last one is the timestep
    tokens = text_tokens + (height // 2) * (width // 2)
    sees = torch.ones(batch, tokens, tokens).tril()
    sees[:, text_tokens:] = 1
    for sees_of_sample, length in zip(sees, text_lengths, strict=True):
        sees_of_sample[TEXT - length :, : TEXT - length] = 0  # padded in front
    return {
        "hidden_states": latents[:, :, 0],
        "timestep": timestep(batch),
        "input_ids": torch.randint(1, 32, (batch, TEXT)),
        "input_img_latents": [],
        "input_image_sizes": {},
        "attention_mask": sees,
        "position_ids": torch.arange(tokens).expand(batch, -1),
    }


CASES = [
    Case(
        "PixArtTransformer2DModel",
        {**HEADS, "sample_size": 32, "cross_attention_dim": 32, "caption_channels": TEXT_WIDTH},
        latents=LATENTS, patch=PATCH, inputs=_pixart, grid=IMAGE, usual=AT_1024,
    ),
    Case(
        "HunyuanImageTransformer2DModel", HUNYUAN_IMAGE, latents=(4, 1, 16, 18), patch=(1, 1, 1),
        inputs=_hunyuan_image, grid=Grid(1, 16, 18, suffix=TEXT), usual=(64, 1, 64, 64), padded=True,
    ),
    Case(
        "HunyuanImageTransformer2DModel", {**HUNYUAN_IMAGE, "text_embed_2_dim": TEXT_WIDTH}, latents=(4, 1, 16, 18),
        patch=(1, 1, 1), inputs=_hunyuan_image_two_encoders, grid=Grid(1, 16, 18, suffix=TEXT), usual=(64, 1, 64, 64),
        padded=True, form="two text encoders",
    ),
    Case(
        "HunyuanImageTransformer2DModel",
        {**HUNYUAN_IMAGE, "patch_size": (1, 1, 1), "rope_axes_dim": (4, 6, 6), "guidance_embeds": True},
        latents=(4, 1, 16, 18), patch=(1, 1, 1), inputs=_hunyuan_image_refiner, grid=Grid(1, 16, 18, suffix=TEXT),
        usual=(64, 1, 64, 64), usual_config={"patch_size": (1, 1, 1)}, padded=True, form="refiner",
    ),
    Case(
        "CogView4Transformer2DModel", COGVIEW, latents=LATENTS, patch=PATCH, inputs=_cogview, grid=WITH_TEXT,
        usual=AT_1024,
    ),
    Case(
        "CogView3PlusTransformer2DModel", {**COGVIEW, "pos_embed_max_size": 32}, latents=LATENTS, patch=PATCH,
        inputs=_cogview, grid=WITH_TEXT, usual=AT_1024,
    ),
    Case(
        "GlmImageTransformer2DModel", {**COGVIEW, "prior_vq_quantizer_codebook_size": 8}, latents=LATENTS, patch=PATCH,
        inputs=_glm_image, grid=WITH_TEXT, usual=AT_1024,
    ),
    Case(
        "AuraFlowTransformer2DModel",
        {
            "in_channels": 4, "num_mmdit_layers": 1, "num_single_dit_layers": 1, "attention_head_dim": 16,
            "num_attention_heads": 2, "joint_attention_dim": TEXT_WIDTH, "caption_projection_dim": 32,
        },
        latents=LATENTS, patch=PATCH, inputs=_auraflow, grid=Grid(1, 16, 18, prefix=8 + TEXT), usual=(4, 1, 128, 128),
    ),
    Case(
        "HunyuanDiT2DModel",
        {
            "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "patch_size": 2, "hidden_size": 32,
            "num_layers": 2, "cross_attention_dim": TEXT_WIDTH, "cross_attention_dim_t5": 8,
            "pooled_projection_dim": 8, "text_len": TEXT, "text_len_t5": 4,
        },
        latents=LATENTS, patch=PATCH, inputs=_hunyuan_dit, grid=IMAGE, usual=(4, 1, 128, 128),
        usual_config={"patch_size": 2},
    ),
    Case(
        "DiTTransformer2DModel", {**HEADS, "sample_size": 32, "norm_num_groups": 2, "num_embeds_ada_norm": 4},
        latents=(4, 1, 32, 32), patch=PATCH, inputs=_dit, grid=Grid(1, 16, 16), usual=(4, 1, 64, 64),
    ),
    Case(
        "ErnieImageTransformer2DModel",
        {
            "hidden_size": 32, "num_attention_heads": 2, "num_layers": 2, "ffn_hidden_size": 32, "in_channels": 4,
            "out_channels": 4, "text_in_dim": TEXT_WIDTH, "rope_axes_dim": (4, 6, 6),
        },
        latents=(4, 1, 16, 18), patch=(1, 1, 1), inputs=_ernie_image, grid=Grid(1, 16, 18, suffix=TEXT),
        usual=(128, 1, 64, 64), padded=True,
    ),
    Case(
        "PRXTransformer2DModel", PRX, latents=LATENTS, patch=PATCH, inputs=_prx, grid=WITH_TEXT,
        usual=(16, 1, 64, 64), padded=True,
    ),
    Case(
        "PRXTransformer2DModel", PRX, latents=LATENTS, patch=PATCH, inputs=_prx_left, grid=WITH_TEXT,
        usual=(16, 1, 64, 64), padded=True, form="padded in front",
    ),
    Case(
        "OmniGenTransformer2DModel",
        {
            "hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 32,
            "num_layers": 2, "vocab_size": 32, "pad_token_id": 0, "time_step_dim": 16,
            "rope_scaling": {"short_factor": [1.0] * 8, "long_factor": [1.0] * 8},
        },
        latents=LATENTS, patch=PATCH, inputs=_omnigen, grid=Grid(1, 16, 18, prefix=TEXT + 1), usual=(4, 1, 128, 128),
        padded=True,
    ),
]  # fmt: skip
