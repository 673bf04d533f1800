"""The image transformers that we know, one entry each, and those that have nothing to make sparse."""

from __future__ import annotations

from dit_sparse.grid import Grid
from dit_sparse.pipelines import grids_image
from dit_sparse.pipelines.models import Model

MEGAPIXEL = ("1024x1024", Grid(1, 64, 64))

IMAGE_MODELS: dict[str, Model] = {
    "FluxTransformer2DModel": Model(
        r"(single_)?transformer_blocks\.\d+\.attn", grids_image.packed_image, "prefix", "one", MEGAPIXEL,
        values=("img_ids",),
    ),
    "QwenImageTransformer2DModel": Model(
        r"transformer_blocks\.\d+\.attn", grids_image.qwen_image, "prefix", "two forwards", MEGAPIXEL,
        ("encoder_hidden_states_mask",),
    ),
    "SD3Transformer2DModel": Model(
        r"transformer_blocks\.\d+\.attn2?", grids_image.patched_image, "suffix", "doubled batch", MEGAPIXEL,
    ),
    "Flux2Transformer2DModel": Model(
        r"(single_)?transformer_blocks\.\d+\.attn", grids_image.flux2, "prefix", "one", MEGAPIXEL,
        values=("img_ids",),
        dense="reference images in a key-value cache, whose attention helper functions dispatch",
    ),
    "ZImageTransformer2DModel": Model(
        r"(noise_refiner|layers)\.\d+\.attention", grids_image.z_image, "suffix", "doubled batch", MEGAPIXEL,
        ("cap_feats",), dense="in omni mode the noise refiner, and batches of captions of different lengths",
    ),
    "ChromaTransformer2DModel": Model(
        r"(single_)?transformer_blocks\.\d+\.attn", grids_image.packed_image, "prefix", "two forwards", MEGAPIXEL,
        ("attention_mask",), values=("img_ids",),
    ),
    "Lumina2Transformer2DModel": Model(
        r"(noise_refiner|layers)\.\d+\.attn", grids_image.patched_image, "prefix", "two forwards", MEGAPIXEL,
        dense="batches of prompts of different lengths: each sample's image begins behind its own prompt",
    ),
    "HiDreamImageTransformer2DModel": Model(
        r"(double|single)_stream_blocks\.\d+\.block\.attn1", grids_image.hidream, "suffix", "doubled batch", MEGAPIXEL,
    ),
    "Flux3Transformer2DModel": Model(
        r"(mode_blocks\.image|single_transformer_blocks)\.\d+\.attn", grids_image.flux3, "prefix", "two forwards",
        MEGAPIXEL,
        values=("img_ids",),
    ),
    "QwenImage21Transformer2DModel": Model(
        r"transformer_blocks\.\d+\.attn", grids_image.qwen_image_21, "prefix", "two forwards", MEGAPIXEL,
        ("encoder_hidden_states_mask", "img_mask"),
        dense="calls of prompt and reference tokens; the first step with the flex processor's block mask",
    ),
    "LongCatImageTransformer2DModel": Model(
        r"(single_)?transformer_blocks\.\d+\.attn", grids_image.packed_image, "prefix", "two forwards", MEGAPIXEL,
        values=("img_ids",),
    ),
    "OvisImageTransformer2DModel": Model(
        r"(single_)?transformer_blocks\.\d+\.attn", grids_image.packed_image, "prefix", "two forwards", MEGAPIXEL,
        values=("img_ids",),
    ),
    "BriaTransformer2DModel": Model(
        r"(single_)?transformer_blocks\.\d+\.attn", grids_image.packed_image, "prefix", "doubled batch", MEGAPIXEL,
        values=("img_ids",),
    ),
    "BriaFiboTransformer2DModel": Model(
        r"(single_)?transformer_blocks\.\d+\.attn", grids_image.packed_image, "prefix", "doubled batch", MEGAPIXEL,
        ("joint_attention_kwargs",), values=("img_ids",),
    ),
    "BriaFibo2Transformer2DModel": Model(
        r"(noise_refiner|layers)\.\d+\.attention", grids_image.bria_fibo_2, "prefix", "two forwards", MEGAPIXEL,
        dense="batches of prompts with different numbers of gist tokens, which then stand at the end",
    ),
    "LuminaNextDiT2DModel": Model(
        r"layers\.\d+\.attn1", grids_image.patched_image, "cross", "doubled batch", MEGAPIXEL, ("encoder_mask",),
    ),
    "PixArtTransformer2DModel": Model(
        r"transformer_blocks\.\d+\.attn1", grids_image.patched_image, "cross", "doubled batch",
        MEGAPIXEL,
    ),
    "HunyuanImageTransformer2DModel": Model(
        r"(single_)?transformer_blocks\.\d+\.attn", grids_image.hunyuan_image, "suffix", "two forwards",
        ("2048x2048", Grid(1, 64, 64)), ("encoder_attention_mask", "encoder_attention_mask_2"),
    ),
    "CogView4Transformer2DModel": Model(
        r"transformer_blocks\.\d+\.attn1", grids_image.patched_image, "prefix", "two forwards",
        MEGAPIXEL,
    ),
    "CogView3PlusTransformer2DModel": Model(
        r"transformer_blocks\.\d+\.attn1", grids_image.patched_image, "prefix", "doubled batch",
        MEGAPIXEL,
    ),
    "AuraFlowTransformer2DModel": Model(
        r"(joint|single)_transformer_blocks\.\d+\.attn", grids_image.patched_image, "prefix", "doubled batch",
        MEGAPIXEL,
    ),
    "Krea2Transformer2DModel": Model(
        r"transformer_blocks\.\d+\.attn", grids_image.krea2, "prefix", "two forwards",
        MEGAPIXEL, ("encoder_attention_mask",), values=("position_ids",),
    ),
    "HunyuanDiT2DModel": Model(
        r"blocks\.\d+\.attn1", grids_image.patched_image, "cross", "doubled batch", MEGAPIXEL,
    ),
    "DiTTransformer2DModel": Model(
        r"transformer_blocks\.\d+\.attn1", grids_image.patched_image, "cross", "doubled batch",
        ("512x512", Grid(1, 32, 32)),
    ),
    "ErnieImageTransformer2DModel": Model(
        r"layers\.\d+\.self_attention", grids_image.patched_image, "suffix", "doubled batch",
        MEGAPIXEL, ("text_lens",),
    ),
    "GlmImageTransformer2DModel": Model(
        r"transformer_blocks\.\d+\.attn1", grids_image.glm_image, "prefix", "two forwards",
        MEGAPIXEL,
        dense="edits, whose reference images are cached keys; calls with attention_mask, added to the scores",
    ),
    "Ideogram4Transformer2DModel": Model(
        r"layers\.\d+\.attention", grids_image.ideogram4, "prefix", "one",
        ("2048x2048", Grid(1, 128, 128)), ("segment_ids",), values=("position_ids",),
    ),
    "JoyImageEditTransformer3DModel": Model(
        r"double_blocks\.\d+\.attn", grids_image.joyimage_edit, "suffix", "two forwards", MEGAPIXEL,
    ),
    "JoyImageEditPlusTransformer3DModel": Model(
        r"double_blocks\.\d+\.attn", grids_image.joyimage_edit_plus, "suffix", "doubled batch",
        MEGAPIXEL, ("encoder_hidden_states_mask", "shape_list"),
        dense="batches whose images differ in size",
    ),
    "NucleusMoEImageTransformer2DModel": Model(
        r"transformer_blocks\.\d+\.attn", grids_image.nucleus_image, "suffix", "two forwards",
        MEGAPIXEL, ("encoder_hidden_states_mask",),
    ),
    "PRXTransformer2DModel": Model(
        r"blocks\.\d+\.attention", grids_image.patched_image, "prefix", "doubled batch",
        ("512x512", Grid(1, 32, 32)), ("attention_mask",),
    ),
    "OmniGenTransformer2DModel": Model(
        r"layers\.\d+\.self_attn", grids_image.patched_image, "prefix", "doubled batch", MEGAPIXEL,
        ("attention_mask",),
    ),
}  # fmt: skip

IMAGE_REFUSED: dict[str, str] = {
    "SanaTransformer2DModel": "linear self-attention",
    "DreamLiteTransformer2DModel": "a part of a U-Net, never a pipeline's transformer",
    "Transformer2DModel": "a part of U-Nets, never a pipeline's transformer",
}
