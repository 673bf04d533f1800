"""Tiny models: Flux and its relatives, whose latents the pipeline packs and gives position ids."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import BriaFiboPipeline, BriaPipeline, ChromaPipeline, Flux2Pipeline, FluxPipeline, OvisImagePipeline
from diffusers.pipelines.longcat_image.pipeline_longcat_image import LongCatImagePipeline, prepare_pos_ids
from torch import Tensor

from dit_sparse.grid import Grid
from tests.models.case import TEXT, TEXT_WIDTH, Case, text, text_mask, timestep

REFERENCE = (8, 10)  # rows and columns of latents of a reference image
REFERENCE_TOKENS = 20  # of patches of 2x2
TINY: dict[str, Any] = {
    "in_channels": 16, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2,
    "joint_attention_dim": TEXT_WIDTH, "axes_dims_rope": (4, 6, 6),
}  # fmt: skip


def _packed(pipeline: Any, latents: Tensor) -> tuple[Tensor, Tensor]:
    """Return what the pipeline's own functions make of latents [B, C, 1, H, W]: tokens and their position ids."""
    batch, channels, _, height, width = latents.shape
    ids = pipeline._prepare_latent_image_ids(batch, height // 2, width // 2, "cpu", torch.float32)
    return pipeline._pack_latents(latents.squeeze(2), batch, channels, height, width), ids


def _common(latents: Tensor, tokens: Tensor, ids: Tensor) -> dict[str, Any]:
    batch = len(latents)
    return {
        "hidden_states": tokens, "timestep": timestep(batch) / 1000, "encoder_hidden_states": text(batch),
        "txt_ids": torch.zeros(TEXT, 3), "img_ids": ids,
    }  # fmt: skip


def _flux(latents: Tensor, text_lengths: list[int]) -> dict[str, Any]:
    batch = len(latents)
    made = _common(latents, *_packed(FluxPipeline, latents))
    return {**made, "pooled_projections": text(batch)[:, 0], "guidance": timestep(batch)}


def _kontext(latents: Tensor, text_lengths: list[int]) -> dict[str, Any]:
    made = _flux(latents, text_lengths)
    reference = torch.randn(*latents.shape[:3], *REFERENCE).to(latents.device)
    tokens, ids = _packed(FluxPipeline, reference)
    ids[:, 0] = 1
    joined = {"hidden_states": [made["hidden_states"], tokens], "img_ids": [made["img_ids"], ids]}
    return {**made, "hidden_states": torch.cat(joined["hidden_states"], 1), "img_ids": torch.cat(joined["img_ids"])}


def _flux2(latents: Tensor, text_lengths: list[int]) -> dict[str, Any]:
    batch = len(latents)
    patched = Flux2Pipeline._patchify_latents(latents.squeeze(2))
    ids = Flux2Pipeline._prepare_latent_ids(torch.empty(patched.shape))
    made = _common(latents, Flux2Pipeline._pack_latents(patched), ids)
    return {**made, "txt_ids": Flux2Pipeline._prepare_text_ids(text(batch)), "guidance": timestep(batch)}


def _flux2_edit(latents: Tensor, text_lengths: list[int]) -> dict[str, Any]:
    made, batch = _flux2(latents, text_lengths), len(latents)
    reference = Flux2Pipeline._patchify_latents(torch.randn(batch, latents.shape[1], *REFERENCE))
    ids = Flux2Pipeline._prepare_image_ids([reference[:1]]).repeat(batch, 1, 1)
    tokens = Flux2Pipeline._pack_latents(reference).to(latents.device)
    return {
        **made,
        "hidden_states": torch.cat([made["hidden_states"], tokens], 1),
        "img_ids": torch.cat([made["img_ids"], ids], 1),
    }


def _flux3(latents: Tensor, text_lengths: list[int]) -> dict[str, Any]:
    from diffusers.modular_pipelines.flux3.before_denoise import _prepare_image_ids

    ids = _prepare_image_ids(*latents.shape[3:], image_rope_scale=0.5)
    made = _common(latents, latents.squeeze(2).flatten(2).transpose(1, 2), ids)
    return {**made, "txt_ids": torch.zeros(TEXT, 4)}


def _flux3_edit(latents: Tensor, text_lengths: list[int]) -> dict[str, Any]:
    from diffusers.modular_pipelines.flux3.before_denoise import _prepare_image_ids

    made, reference = _flux3(latents, text_lengths), torch.randn(len(latents), latents.shape[1], *REFERENCE)
    ids = _prepare_image_ids(*REFERENCE, image_rope_scale=0.5, l_coord=-1)
    return {**made, "image_cond_hidden_states": reference.flatten(2).transpose(1, 2), "image_cond_ids": ids}


def _chroma(latents: Tensor, text_lengths: list[int]) -> dict[str, Any]:
    return _common(latents, *_packed(ChromaPipeline, latents))


def _chroma_masked(latents: Tensor, text_lengths: list[int]) -> dict[str, Any]:
    made = _chroma(latents, text_lengths)
    image = torch.ones(made["hidden_states"].shape[:2], dtype=torch.bool)
    return {**made, "attention_mask": torch.cat([text_mask(text_lengths).bool(), image], 1)}


def _chroma_biased(latents: Tensor, text_lengths: list[int]) -> dict[str, Any]:
    made = _chroma_masked(latents, text_lengths)  # the stock pipeline's mask is of the embeddings' dtype
    return {**made, "attention_mask": made["attention_mask"].float()}


def _longcat(latents: Tensor, text_lengths: list[int]) -> dict[str, Any]:
    batch, channels, _, height, width = latents.shape
    place: dict[str, Any] = {"type": "image", "start": (TEXT, TEXT)}
    ids = prepare_pos_ids(modality_id=1, height=height // 2, width=width // 2, **place)
    tokens = LongCatImagePipeline._pack_latents(latents.squeeze(2), batch, channels, height, width)
    return _common(latents, tokens, ids)


def _longcat_edit(latents: Tensor, text_lengths: list[int]) -> dict[str, Any]:
    made, batch, channels = _longcat(latents, text_lengths), *latents.shape[:2]
    height, width = latents.shape[3:]
    ids = made["img_ids"].clone().double()
    ids[:, 0] = 2
    reference = torch.randn(batch, channels, height, width).to(latents.device)
    tokens = LongCatImagePipeline._pack_latents(reference, batch, channels, height, width)
    return {
        **made,
        "hidden_states": torch.cat([made["hidden_states"], tokens], 1),
        "img_ids": torch.cat([made["img_ids"], ids]),
    }


def _ovis(latents: Tensor, text_lengths: list[int]) -> dict[str, Any]:
    return _common(latents, *_packed(OvisImagePipeline, latents))


def _bria(latents: Tensor, text_lengths: list[int]) -> dict[str, Any]:
    return _common(latents, *_packed(BriaPipeline, latents))


def _bria_fibo(latents: Tensor, text_lengths: list[int]) -> dict[str, Any]:
    batch, channels, _, height, width = latents.shape
    ids = BriaFiboPipeline._prepare_latent_image_ids(batch, height, width, "cpu", torch.float32)
    tokens = BriaFiboPipeline._pack_latents_no_patch(latents.squeeze(2), batch, channels, height, width)
    made = {**_common(latents, tokens, ids), "text_encoder_layers": [text(batch), text(batch)]}
    if min(text_lengths) == TEXT:
        return made
    image = torch.ones(tokens.shape[:2], dtype=torch.bool)
    mask = torch.cat([text_mask(text_lengths).bool(), image], 1)[:, None, None]
    return {**made, "joint_attention_kwargs": {"attention_mask": mask}}


def _bria_fibo_edit(latents: Tensor, text_lengths: list[int]) -> dict[str, Any]:
    batch, channels = latents.shape[:2]
    ids = BriaFiboPipeline._prepare_latent_image_ids(batch, *REFERENCE, "cpu", torch.float32)
    ids[:, 0] = 1
    reference = torch.randn(batch, channels, *REFERENCE).to(latents.device)
    tokens = BriaFiboPipeline._pack_latents_no_patch(reference, batch, channels, *REFERENCE)
    made = _bria_fibo(latents, text_lengths)
    edited = {
        **made,
        "hidden_states": torch.cat([made["hidden_states"], tokens], 1),
        "img_ids": torch.cat([made["img_ids"], ids]),
    }
    if "joint_attention_kwargs" in made:
        mask = torch.nn.functional.pad(made["joint_attention_kwargs"]["attention_mask"], (0, len(ids)), value=True)
        edited["joint_attention_kwargs"] = {"attention_mask": mask}
    return edited


PACKED: dict[str, Any] = {"latents": (4, 1, 32, 36), "patch": (1, 2, 2), "usual": (16, 1, 128, 128)}
ROWS: dict[str, Any] = {"latents": (16, 1, 16, 18), "patch": (1, 1, 1), "usual": (48, 1, 64, 64)}
GRID = Grid(1, 16, 18, prefix=TEXT)
EDITED = Grid(1, 16, 18, prefix=TEXT, suffix=REFERENCE_TOKENS)
FLUX = {**TINY, "pooled_projection_dim": TEXT_WIDTH, "guidance_embeds": True}
FLUX2 = {**TINY, "timestep_guidance_channels": 16, "axes_dims_rope": (4, 4, 4, 4)}
FLUX3 = {**TINY, "cond_in_channels": 16, "timestep_channels": 16, "axes_dims_rope": (4, 4, 4, 4)}
CHROMA = {
    **TINY, "approximator_num_channels": 16, "approximator_hidden_dim": 32, "approximator_layers": 1,
}  # fmt: skip
LONGCAT = {**TINY, "pooled_projection_dim": TEXT_WIDTH}
FIBO = {**TINY, "text_encoder_dim": TEXT_WIDTH, "joint_attention_dim": TEXT_WIDTH}

CASES: list[Case] = [
    Case("FluxTransformer2DModel", FLUX, inputs=_flux, grid=GRID, **PACKED),
    Case("FluxTransformer2DModel", FLUX, inputs=_kontext, grid=EDITED, form="Kontext", **PACKED),
    Case("Flux2Transformer2DModel", FLUX2, inputs=_flux2, grid=GRID, **PACKED),
    Case("Flux2Transformer2DModel", FLUX2, inputs=_flux2_edit, grid=EDITED, form="edit", **PACKED),
    Case("Flux3Transformer2DModel", FLUX3, inputs=_flux3, grid=Grid(1, 16, 18), **ROWS),
    Case("Flux3Transformer2DModel", FLUX3, inputs=_flux3_edit, grid=Grid(1, 16, 18), form="edit", **ROWS),
    Case(
        "Flux3Transformer2DModel", {**FLUX3, "num_layers": 0}, inputs=_flux3_edit,
        grid=Grid(1, 16, 18, prefix=TEXT, suffix=REFERENCE[0] * REFERENCE[1]), form="joint blocks", **ROWS,
    ),
    Case("ChromaTransformer2DModel", CHROMA, inputs=_chroma, grid=GRID, **PACKED),
    Case("ChromaTransformer2DModel", CHROMA, inputs=_chroma_masked, grid=GRID, padded=True, form="mask", **PACKED),
    Case("ChromaTransformer2DModel", CHROMA, inputs=_chroma_biased, grid=GRID, padded=True, form="bias", **PACKED),
    Case("LongCatImageTransformer2DModel", LONGCAT, inputs=_longcat, grid=GRID, **PACKED),
    Case(
        "LongCatImageTransformer2DModel", LONGCAT, inputs=_longcat_edit,
        grid=Grid(1, 16, 18, prefix=TEXT, suffix=16 * 18), form="edit", **PACKED,
    ),
    Case("OvisImageTransformer2DModel", {**TINY, "out_channels": 16}, inputs=_ovis, grid=GRID, **PACKED),
    Case("BriaTransformer2DModel", TINY, inputs=_bria, grid=GRID, **PACKED),
    Case("BriaFiboTransformer2DModel", FIBO, inputs=_bria_fibo, grid=GRID, padded=True, **ROWS),
    Case(
        "BriaFiboTransformer2DModel", FIBO, inputs=_bria_fibo_edit,
        grid=Grid(1, 16, 18, prefix=TEXT, suffix=REFERENCE[0] * REFERENCE[1]), padded=True, form="edit", **ROWS,
    ),
]  # fmt: skip
