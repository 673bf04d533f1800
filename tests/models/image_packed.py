"""Tiny models: images whose pipelines pack the latents, with references, or with positions in a tensor."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import diffusers
import torch
from torch import Tensor

from dit_sparse.grid import Grid
from tests.models.case import TEXT, TEXT_WIDTH, Case, text, text_mask, timestep

CPU = torch.device("cpu")  # of position ids, whose values are read
LATENTS = (4, 1, 32, 36)
PATCH = (1, 2, 2)


def _krea2(latents: Tensor, text_lengths: list[int]) -> dict[str, Any]:
    pipe = diffusers.Krea2Pipeline
    batch, channels, _, height, width = latents.shape
    return {
        "hidden_states": pipe._pack_latents(SimpleNamespace(patch_size=2), latents, batch, channels, height, width),
        "encoder_hidden_states": torch.randn(batch, TEXT, 2, TEXT_WIDTH),
        "timestep": timestep(batch) / 1000,
        "position_ids": pipe.prepare_position_ids(TEXT, height // 2, width // 2, CPU),
        "encoder_attention_mask": text_mask(text_lengths).bool(),
    }


def _krea2_template(latents: Tensor, text_lengths: list[int]) -> dict[str, Any]:
    """Pad before the last 5 tokens, which the pipeline's template adds after the padded prompt."""
    arguments = _krea2(latents, text_lengths)
    prompt = text_mask([length - 5 for length in text_lengths], TEXT - 5).bool()
    mask = torch.cat([prompt, torch.ones(len(latents), 5, dtype=torch.bool)], 1)
    return {**arguments, "encoder_attention_mask": mask}


def _ideogram4(latents: Tensor, text_lengths: list[int]) -> dict[str, Any]:
    batch, channels, _, height, width = latents.shape
    packed = latents.reshape(batch, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 3, 5, 1)
    packed = packed.reshape(batch, height * width // 4, 4 * channels)
    position_ids, segment_ids, indicator = diffusers.Ideogram4Pipeline._prepare_ids(
        text_lengths, height // 2, width // 2, TEXT, CPU
    )
    return {
        "hidden_states": torch.cat([packed.new_zeros(batch, TEXT, 4 * channels), packed], 1),
        "timestep": timestep(batch) / 1000,
        "encoder_hidden_states": torch.cat([text(batch), torch.zeros(batch, packed.shape[1], TEXT_WIDTH)], 1),
        "position_ids": position_ids, "segment_ids": segment_ids, "indicator": indicator,
    }  # fmt: skip


def _ideogram4_unconditional(latents: Tensor, text_lengths: list[int]) -> dict[str, Any]:
    arguments = _ideogram4(latents, [TEXT] * len(latents))
    names = ("hidden_states", "encoder_hidden_states", "position_ids", "segment_ids", "indicator")
    return {**arguments, **{name: arguments[name][:, TEXT:] for name in names}}


def _joyimage_edit(latents: Tensor, text_lengths: list[int]) -> dict[str, Any]:
    batch = len(latents)
    return {
        "hidden_states": latents[:, None], "timestep": timestep(batch), "encoder_hidden_states": text(batch)
    }  # fmt: skip


def _joyimage_edit_reference(latents: Tensor, text_lengths: list[int]) -> dict[str, Any]:
    arguments = _joyimage_edit(latents, text_lengths)
    reference = torch.randn_like(latents)
    return {**arguments, "hidden_states": torch.stack([reference, latents], 1)}


def _patches(latents: Tensor) -> Tensor:
    """[B, C, 1, H, W] -> [B, tokens, C, 1, 2, 2]."""
    batch, channels, _, height, width = latents.shape
    patches = latents.reshape(batch, channels, 1, 1, height // 2, 2, width // 2, 2)
    return patches.permute(0, 2, 4, 6, 1, 3, 5, 7).reshape(batch, -1, channels, 1, 2, 2)


def _joyimage_edit_plus(latents: Tensor, text_lengths: list[int]) -> dict[str, Any]:
    batch, _, _, height, width = latents.shape
    reference = torch.randn_like(latents)[..., :8, :12]
    shapes = [(1, height // 2, width // 2), (1, 4, 6)]
    return {
        "hidden_states": torch.cat([_patches(latents), _patches(reference)], 1), "timestep": timestep(batch),
        "encoder_hidden_states": text(batch), "encoder_hidden_states_mask": text_mask(text_lengths),
        "shape_list": [shapes] * batch,
    }  # fmt: skip


def _joyimage_edit_plus_ragged(latents: Tensor, text_lengths: list[int]) -> dict[str, Any]:
    """Give the samples references of different sizes: the smaller one's tokens are padded, in front of the text."""
    arguments = _joyimage_edit_plus(latents, text_lengths)
    target, reference = arguments["shape_list"][0]
    shapes = [[target, (1, 4, 3) if sample % 2 else reference] for sample in range(len(latents))]
    return {**arguments, "shape_list": shapes}


def _nucleus(latents: Tensor, text_lengths: list[int]) -> dict[str, Any]:
    batch, channels, _, height, width = latents.shape
    pack = diffusers.NucleusMoEImagePipeline._pack_latents
    return {
        "hidden_states": pack(latents, batch, channels, height, width, 2), "timestep": timestep(batch) / 1000,
        "img_shapes": [(1, height // 2, width // 2)] * batch,
        "encoder_hidden_states": text(batch), "encoder_hidden_states_mask": text_mask(text_lengths),
    }  # fmt: skip


KREA2 = {
    "in_channels": 16, "num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2, "num_key_value_heads": 1,
    "intermediate_size": 32, "timestep_embed_dim": 16, "text_hidden_dim": TEXT_WIDTH, "num_text_layers": 2,
    "text_num_attention_heads": 2, "text_num_key_value_heads": 2, "text_intermediate_size": 32,
    "axes_dims_rope": (4, 6, 6),
}  # fmt: skip
IDEOGRAM4 = {
    "in_channels": 16, "num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2, "intermediate_size": 32,
    "adaln_dim": 16, "llm_features_dim": TEXT_WIDTH, "mrope_section": (4, 2, 2),
}  # fmt: skip
JOYIMAGE = {
    "in_channels": 4, "hidden_size": 32, "num_attention_heads": 2, "text_dim": TEXT_WIDTH, "num_layers": 2,
    "rope_dim_list": [4, 6, 6],
}  # fmt: skip
NUCLEUS = {
    "in_channels": 16, "out_channels": 4, "num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 4,
    "num_key_value_heads": 2, "joint_attention_dim": TEXT_WIDTH, "axes_dims_rope": (4, 6, 6), "moe_enabled": False,
    "mlp_ratio": 6.0,
}  # fmt: skip
AT_1024 = (16, 1, 128, 128)

CASES = [
    Case(
        "Krea2Transformer2DModel", KREA2, latents=LATENTS, patch=PATCH, inputs=_krea2,
        grid=Grid(1, 16, 18, prefix=TEXT), usual=AT_1024, padded=True,
    ),
    Case(
        "Krea2Transformer2DModel", KREA2, latents=LATENTS, patch=PATCH, inputs=_krea2_template,
        grid=Grid(1, 16, 18, prefix=TEXT), usual=AT_1024, padded=True, form="padded inside",
    ),
    Case(
        "Ideogram4Transformer2DModel", IDEOGRAM4, latents=LATENTS, patch=PATCH, inputs=_ideogram4,
        grid=Grid(1, 16, 18, prefix=TEXT), usual=(32, 1, 256, 256), padded=True, used=lambda out: out[:, TEXT:],
    ),
    Case(
        "Ideogram4Transformer2DModel", IDEOGRAM4, latents=LATENTS, patch=PATCH, inputs=_ideogram4_unconditional,
        grid=Grid(1, 16, 18), usual=(32, 1, 256, 256), form="unconditional",
    ),
    Case(
        "JoyImageEditTransformer3DModel", JOYIMAGE, latents=LATENTS, patch=PATCH, inputs=_joyimage_edit,
        grid=Grid(1, 16, 18, suffix=TEXT), usual=AT_1024,
    ),
    Case(
        "JoyImageEditTransformer3DModel", JOYIMAGE, latents=LATENTS, patch=PATCH, inputs=_joyimage_edit_reference,
        grid=Grid(1, 16, 18, suffix=16 * 18 + TEXT), usual=AT_1024, form="reference",
    ),
    Case(
        "JoyImageEditPlusTransformer3DModel", JOYIMAGE, latents=LATENTS, patch=PATCH, inputs=_joyimage_edit_plus,
        grid=Grid(1, 16, 18, suffix=4 * 6 + TEXT), usual=AT_1024, padded=True,
    ),
    Case(
        "JoyImageEditPlusTransformer3DModel", JOYIMAGE, latents=LATENTS, patch=PATCH,
        inputs=_joyimage_edit_plus_ragged, grid=Grid(1, 16, 18, suffix=4 * 6 + TEXT), usual=AT_1024, padded=True,
        form="references of two sizes",
    ),
    Case(
        "NucleusMoEImageTransformer2DModel", NUCLEUS, latents=LATENTS, patch=PATCH, inputs=_nucleus,
        grid=Grid(1, 16, 18, suffix=TEXT), usual=AT_1024, padded=True,
    ),
]  # fmt: skip
