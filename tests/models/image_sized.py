"""Tiny models: images whose sizes are in shapes or in Python numbers."""

from __future__ import annotations

import math
from typing import Any

import torch
from diffusers import QwenImagePipeline
from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina
from torch import Tensor

from dit_sparse.grid import Grid
from tests.models.case import TEXT, TEXT_WIDTH, Case, text, text_mask, timestep

REFERENCE = (4, 6)  # rows and columns of tokens of a reference image


def _sd3(latents: Tensor, text_lengths: list[int]) -> dict[str, Any]:
    batch = len(latents)
    return {
        "hidden_states": latents.squeeze(2), "timestep": timestep(batch), "encoder_hidden_states": text(batch),
        "pooled_projections": text(batch)[:, 0],
    }  # fmt: skip


def _qwen(latents: Tensor, text_lengths: list[int]) -> dict[str, Any]:
    batch, channels, _, height, width = latents.shape
    mask = text_mask(text_lengths).bool()
    return {
        "hidden_states": QwenImagePipeline._pack_latents(latents.squeeze(2), batch, channels, height, width),
        "timestep": timestep(batch) / 1000, "encoder_hidden_states": text(batch),
        "encoder_hidden_states_mask": None if mask.all() else mask,
        "img_shapes": [[(1, height // 2, width // 2)]] * batch,
    }  # fmt: skip


def _qwen_edit(latents: Tensor, text_lengths: list[int]) -> dict[str, Any]:
    made, batch = _qwen(latents, text_lengths), len(latents)
    reference = torch.randn(batch, math.prod(REFERENCE), made["hidden_states"].shape[2]).to(latents.device)
    shapes = [*made["img_shapes"][0], (1, *REFERENCE)]
    return {
        **made, "hidden_states": torch.cat([made["hidden_states"], reference], 1), "img_shapes": [shapes] * batch
    }  # fmt: skip


def _qwen_layered(latents: Tensor, text_lengths: list[int]) -> dict[str, Any]:
    from diffusers import QwenImageLayeredPipeline

    batch, channels, layers, height, width = latents.shape
    pack, tokens = QwenImageLayeredPipeline._pack_latents, (height // 2, width // 2)
    by_layer = latents.permute(0, 2, 1, 3, 4).contiguous()
    reference = torch.randn(batch, 1, channels, height, width).to(latents.device)
    packed = [
        pack(by_layer, batch, channels, height, width, layers),
        pack(reference, batch, channels, height, width, 1),
    ]
    return {
        "hidden_states": torch.cat(packed, 1), "timestep": timestep(batch) / 1000,
        "encoder_hidden_states": text(batch), "img_shapes": [[(1, *tokens)] * (layers + 1)] * batch,
        "additional_t_cond": torch.zeros(batch, dtype=torch.long),
    }  # fmt: skip


def _qwen_21(latents: Tensor, text_lengths: list[int]) -> dict[str, Any]:
    from diffusers.pipelines.qwenimage21 import QwenImage21Pipeline

    batch, channels, _, height, width = latents.shape
    slots, mask = torch.ones(batch, height * width // 4, dtype=torch.bool), text_mask(text_lengths).bool()
    return {
        "hidden_states": QwenImage21Pipeline._pack_latents(latents, batch, channels, height, width),
        "timestep": timestep(batch) / 1000, "encoder_hidden_states": text(batch),
        "encoder_hidden_states_mask": None if mask.all() else mask, "img_shapes": [[(1, height, width)]] * batch,
        "img_mask": torch.cat([torch.zeros(batch, TEXT, dtype=torch.bool), slots], 1),
    }  # fmt: skip


def _qwen_21_edit(latents: Tensor, text_lengths: list[int]) -> dict[str, Any]:
    made, batch, tokens = _qwen_21(latents, text_lengths), len(latents), math.prod(REFERENCE)
    reference = torch.randn(batch, tokens, latents.shape[1]).to(latents.device)
    mask = made["img_mask"].clone()
    mask[:, 2 : 2 + tokens // 4] = True  # the reference's slots are among the text tokens
    shapes = [(1, *REFERENCE), *made["img_shapes"][0]]
    return {
        **made, "hidden_states": torch.cat([reference, made["hidden_states"]], 1), "img_shapes": [shapes] * batch,
        "img_mask": mask,
    }  # fmt: skip


def _qwen_21_cached(latents: Tensor, text_lengths: list[int]) -> dict[str, Any]:
    from diffusers.models.transformers.transformer_qwenimage21 import QwenImage21KVCache

    cache = QwenImage21KVCache(QWEN21["num_layers"])
    for layer in range(QWEN21["num_layers"]):
        cache.get_layer(layer).store(*torch.randn(2, len(latents), TEXT, 2, 16))
    return {**_qwen_21(latents, text_lengths), "kv_cache": cache, "kv_cache_mode": "cached"}


def _z_image(latents: Tensor, text_lengths: list[int]) -> dict[str, Any]:
    captions = text(len(latents), 4 * TEXT)  # long enough for lengths that differ when rounded up to 32
    return {
        "x": list(latents.unbind(0)), "t": timestep(len(latents)) / 1000,
        "cap_feats": [one[: 4 * length] for one, length in zip(captions, text_lengths, strict=True)],
    }  # fmt: skip


def _z_image_omni(latents: Tensor, text_lengths: list[int]) -> dict[str, Any]:
    made, batch = _z_image(latents, text_lengths), len(latents)
    reference = torch.randn(batch, latents.shape[1], 1, 8, 10).to(latents.device)
    return {
        **made, "x": [[one, other] for one, other in zip(reference, made["x"], strict=True)],
        "cap_feats": [[caption[:3], caption[3:13], caption[13:18]] for caption in made["cap_feats"]],
        "siglip_feats": [[one, None] for one in torch.randn(batch, 3, 3, TEXT_WIDTH)],
        "image_noise_mask": [[0, 1]] * batch,
    }  # fmt: skip


def _hidream(latents: Tensor, text_lengths: list[int]) -> dict[str, Any]:
    batch = len(latents)
    return {
        "hidden_states": latents.squeeze(2), "timesteps": timestep(batch), "encoder_hidden_states_t5": text(batch),
        "encoder_hidden_states_llama3": torch.stack([text(batch), text(batch)]), "pooled_embeds": text(batch)[:, 0],
    }  # fmt: skip


def _lumina2(latents: Tensor, text_lengths: list[int]) -> dict[str, Any]:
    batch = len(latents)
    return {
        "hidden_states": latents.squeeze(2), "timestep": timestep(batch) / 1000, "encoder_hidden_states": text(batch),
        "encoder_attention_mask": text_mask(text_lengths),
    }  # fmt: skip


def _lumina_next(latents: Tensor, text_lengths: list[int]) -> dict[str, Any]:
    batch = len(latents)
    return {
        "hidden_states": latents.squeeze(2), "timestep": timestep(batch) / 1000, "encoder_hidden_states": text(batch),
        "encoder_mask": text_mask(text_lengths), "cross_attention_kwargs": {},
        "image_rotary_emb": get_2d_rotary_pos_embed_lumina(16, 24, 24),
    }  # fmt: skip


def _fibo_2(latents: Tensor, text_lengths: list[int]) -> dict[str, Any]:
    batch = len(latents)
    return {
        "hidden_states": latents.squeeze(2), "timestep": timestep(batch) / 1000,
        "encoder_hidden_states": torch.randn(batch, 2, TEXT, TEXT_WIDTH),
    }  # fmt: skip


def _fibo_2_edit(latents: Tensor, text_lengths: list[int]) -> dict[str, Any]:
    rows, columns = REFERENCE
    context = torch.randn(len(latents), latents.shape[1], 2 * rows, 2 * columns)
    return {**_fibo_2(latents, text_lengths), "context_latents": [context]}


PATCHED: dict[str, Any] = {"latents": (4, 1, 32, 36), "patch": (1, 2, 2), "usual": (16, 1, 128, 128)}
GRID = Grid(1, 16, 18)
EDITED = Grid(1, 16, 18, prefix=TEXT, suffix=math.prod(REFERENCE))
HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}
SD3 = {
    **HEADS, "sample_size": 36, "in_channels": 4, "out_channels": 4, "num_layers": 2, "caption_projection_dim": 32,
    "joint_attention_dim": TEXT_WIDTH, "pooled_projection_dim": TEXT_WIDTH, "pos_embed_max_size": 40,
}  # fmt: skip
SD35 = {**SD3, "dual_attention_layers": (0,), "qk_norm": "rms_norm"}
QWEN = {
    **HEADS, "in_channels": 16, "out_channels": 4, "num_layers": 2, "joint_attention_dim": TEXT_WIDTH,
    "axes_dims_rope": (4, 6, 6),
}  # fmt: skip
LAYERED = {"use_layer3d_rope": True, "use_additional_t_cond": True}
QWEN21: dict[str, Any] = {
    **HEADS, "in_channels": 4, "out_channels": 4, "num_layers": 2, "context_in_dim": TEXT_WIDTH,
    "axes_dims_rope": (4, 6, 6),
}  # fmt: skip
Z_IMAGE = {
    "in_channels": 4, "dim": 32, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2,
    "cap_feat_dim": TEXT_WIDTH, "axes_dims": [4, 6, 6], "axes_lens": [256, 64, 64],
}  # fmt: skip
HIDREAM = {
    **HEADS, "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 1, "num_single_layers": 1,
    "caption_channels": [TEXT_WIDTH, TEXT_WIDTH], "text_emb_dim": TEXT_WIDTH, "num_routed_experts": 2,
    "num_activated_experts": 2, "axes_dims_rope": (4, 6, 6), "max_resolution": (40, 40), "llama_layers": [0, 1],
}  # fmt: skip
LUMINA = {
    "sample_size": 36, "in_channels": 4, "hidden_size": 32, "num_layers": 2, "num_attention_heads": 2,
    "num_kv_heads": 1, "multiple_of": 16,
}  # fmt: skip
LUMINA2 = {
    **LUMINA, "num_refiner_layers": 1, "axes_dim_rope": (4, 6, 6), "axes_lens": (128, 64, 64),
    "cap_feat_dim": TEXT_WIDTH,
}  # fmt: skip
FIBO2 = {
    "in_channels": 4, "dim": 32, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 2, "cap_feat_dim": TEXT_WIDTH,
    "injection_layer_ids": (1,), "perceiver_num_layers": 1, "min_num_gist_tokens": 8, "max_num_gist_tokens": 16,
    "gist_step": 4, "gist_min_text_len": 8, "gist_max_text_len": 32, "axes_dims": (4, 6, 6), "axes_lens": (64, 64, 64),
}  # fmt: skip
GIST = 12  # tokens that 20 of text are turned into

Z_LATENTS: dict[str, Any] = {"latents": (4, 1, 32, 34), "patch": (1, 2, 2), "usual": (16, 1, 128, 128)}
CASES: list[Case] = [
    Case("SD3Transformer2DModel", SD3, inputs=_sd3, grid=Grid(1, 16, 18, suffix=TEXT), **PATCHED),
    Case("SD3Transformer2DModel", SD35, inputs=_sd3, grid=Grid(1, 16, 18, suffix=TEXT), form="3.5 medium", **PATCHED),
    Case("QwenImageTransformer2DModel", QWEN, inputs=_qwen, grid=Grid(1, 16, 18, TEXT), padded=True, **PATCHED),
    Case("QwenImageTransformer2DModel", QWEN, inputs=_qwen_edit, grid=EDITED, padded=True, form="edit", **PATCHED),
    Case(
        "QwenImageTransformer2DModel", {**QWEN, **LAYERED}, latents=(4, 3, 16, 20), patch=(1, 2, 2),
        inputs=_qwen_layered, grid=Grid(3, 8, 10, TEXT, suffix=80), usual=(16, 1, 128, 128), usual_config=LAYERED,
        form="layered",
    ),
    Case(
        "QwenImage21Transformer2DModel", QWEN21, latents=(4, 1, 16, 18), patch=(1, 1, 1), inputs=_qwen_21,
        grid=Grid(1, 16, 18, TEXT), usual=(64, 1, 64, 64), padded=True,
    ),
    Case(
        "QwenImage21Transformer2DModel", QWEN21, latents=(4, 1, 16, 18), patch=(1, 1, 1), inputs=_qwen_21_edit,
        grid=Grid(1, 16, 18, TEXT + 18), usual=(64, 1, 64, 64), form="edit",
    ),
    Case(
        "QwenImage21Transformer2DModel", QWEN21, latents=(4, 1, 16, 18), patch=(1, 1, 1), inputs=_qwen_21_cached,
        grid=Grid(1, 16, 18, TEXT), usual=(64, 1, 64, 64), padded=True, form="cached",
    ),
    Case("ZImageTransformer2DModel", Z_IMAGE, inputs=_z_image, grid=Grid(1, 16, 17, 0, 16), padded=True, **Z_LATENTS),
    Case(
        "ZImageTransformer2DModel", {**Z_IMAGE, "n_refiner_layers": 0}, inputs=_z_image,
        grid=Grid(1, 16, 17, suffix=16 + 96), form="joint layers", **Z_LATENTS,
    ),
    Case(
        "ZImageTransformer2DModel", {**Z_IMAGE, "n_refiner_layers": 0, "siglip_feat_dim": TEXT_WIDTH},
        inputs=_z_image_omni, grid=Grid(1, 16, 17, 96 + 32, 16 + 64), form="omni", **Z_LATENTS,
    ),
    Case(
        "HiDreamImageTransformer2DModel", HIDREAM, inputs=_hidream, grid=Grid(1, 16, 18, suffix=112 + 3 * TEXT),
        usual_config={"patch_size": 2}, **PATCHED,
    ),
    Case(
        "HiDreamImageTransformer2DModel", HIDREAM, latents=(4, 1, 32, 32), patch=(1, 2, 2), inputs=_hidream,
        grid=Grid(1, 16, 16, suffix=3 * TEXT), usual=(16, 1, 128, 128), usual_config={"patch_size": 2}, form="square",
    ),
    Case("Lumina2Transformer2DModel", LUMINA2, inputs=_lumina2, grid=GRID, **PATCHED),
    Case(
        "Lumina2Transformer2DModel", {**LUMINA2, "num_refiner_layers": 0}, inputs=_lumina2,
        grid=Grid(1, 16, 18, TEXT), form="joint layers", **PATCHED,
    ),
    Case("BriaFibo2Transformer2DModel", FIBO2, inputs=_fibo_2, grid=GRID, **PATCHED),
    Case(
        "BriaFibo2Transformer2DModel", {**FIBO2, "n_refiner_layers": 0}, inputs=_fibo_2_edit,
        grid=Grid(1, 16, 18, GIST, math.prod(REFERENCE)), form="edit", **PATCHED,
    ),
    Case(
        "LuminaNextDiT2DModel", {**LUMINA, "cross_attention_dim": TEXT_WIDTH}, inputs=_lumina_next, grid=GRID,
        **PATCHED,
    ),
]  # fmt: skip
