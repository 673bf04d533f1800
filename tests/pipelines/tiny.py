"""Tiny random-weight pipelines, built from configs alone: nothing is downloaded."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    AutoencoderKLWan,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    FlowMatchEulerDiscreteScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel, UMT5Config, UMT5EncoderModel

WORDS = ("<pad>", "</s>", "<unk>", "a", "red", "ball", "on", "blue", "rolls", "left", "sky", "dog")
PROMPT = "a red ball rolls left on blue sky"
TEXT = {"vocab_size": 32, "d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 4}
TEXT_TOKENS = 12  # of CogVideoX, in front of the video tokens


def wan(*, layers: int = 2, experts: int = 1, expand_timesteps: bool = False) -> WanPipeline:
    """Build a Wan 2.1 pipeline; experts=2 the form of Wan 2.2 A14B, expand_timesteps that of Wan 2.2 5B."""
    torch.manual_seed(0)
    transformers = [
        WanTransformer3DModel(
            num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, text_dim=32, freq_dim=32,
            ffn_dim=32, num_layers=layers, rope_max_seq_len=32,
        )
        for _ in range(experts)
    ]  # fmt: skip
    pipe = WanPipeline(
        tokenizer=_tokenizer(),
        text_encoder=UMT5EncoderModel(UMT5Config(**TEXT)),
        vae=AutoencoderKLWan(
            base_dim=3, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
            latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        transformer=transformers[0],
        transformer_2=transformers[1] if experts == 2 else None,
        boundary_ratio=0.875 if experts == 2 else None,
        expand_timesteps=expand_timesteps,
    )  # fmt: skip
    return _ready(pipe)


def cogvideox(*, layers: int = 2, patch_size_t: int | None = None) -> CogVideoXPipeline:
    """Build a CogVideoX 1.0 pipeline; patch_size_t=2 the form of 1.5."""
    torch.manual_seed(0)
    pipe = CogVideoXPipeline(
        tokenizer=_tokenizer(),
        text_encoder=T5EncoderModel(T5Config(**TEXT)),
        vae=AutoencoderKLCogVideoX(
            down_block_types=("CogVideoXDownBlock3D",) * 4, up_block_types=("CogVideoXUpBlock3D",) * 4,
            block_out_channels=(4, 4, 4, 4), latent_channels=4, layers_per_block=1, norm_num_groups=2,
            sample_height=128, sample_width=128,
        ),
        transformer=CogVideoXTransformer3DModel(
            num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=16,
            text_embed_dim=32, num_layers=layers, sample_width=16, sample_height=16, sample_frames=13,
            patch_size_t=patch_size_t, max_text_seq_length=TEXT_TOKENS, use_rotary_positional_embeddings=True,
        ),
        scheduler=CogVideoXDDIMScheduler(),
    )  # fmt: skip
    return _ready(pipe)


PIPELINES = {"wan": wan, "cogvideox": cogvideox}
# 128x128 pixels, 13 frames: latents 4x16x16, grid 4x8x8, two blocks of 128 tokens
SIZE = {"height": 128, "width": 128, "num_frames": 13}


def generate(pipe: Any, *, steps: int = 3, guidance: float = 4.0, seed: int = 0, **size: int) -> torch.Tensor:
    """Return the latents of one short run."""
    return pipe(
        PROMPT, num_inference_steps=steps, guidance_scale=guidance, generator=torch.Generator().manual_seed(seed),
        output_type="latent", max_sequence_length=TEXT_TOKENS, **{**SIZE, **size},
    ).frames  # fmt: skip


def _tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({word: place for place, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=64
    )


def _ready(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    for name, component in pipe.components.items():
        if not isinstance(component, torch.nn.Module):
            continue
        component.eval()
        for parameter in component.parameters() if name.startswith("transformer") else ():
            # fresh weights give attention so flat that no pattern would change the output
            torch.nn.init.normal_(parameter, std=0.15 if parameter.dim() > 1 else 0.5)
    return pipe
