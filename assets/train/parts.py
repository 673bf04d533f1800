"""The parts of the bundled pipeline, fresh or from the files that training left."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast

from dit_sparse.assets.train.words import PAD, UNKNOWN, vocabulary
from dit_sparse.pipelines.pixel_vae import PixelVAE

TEXT_DIM = 256
CONTEXT_TOKENS = 512  # WanPipeline pads prompts to this length unless told otherwise
SAMPLING_SHIFT = 8.0
COUNTERS = "counters.json"  # beside weights: how far training is


def new_transformer() -> WanTransformer3DModel:
    """Build the 13.3 M parameter transformer: 6 layers of 6 heads x 64, one token per 2 frames of 4x4 pixels."""
    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=6,
        attention_head_dim=64,
        in_channels=24,
        out_channels=24,
        text_dim=TEXT_DIM,
        freq_dim=256,
        ffn_dim=1024,
        num_layers=6,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=256,
    )


def new_text_encoder() -> CLIPTextModel:
    """Build the causal two-layer text encoder, trained along with the transformer."""
    config = CLIPTextConfig(
        vocab_size=len(vocabulary()),
        hidden_size=TEXT_DIM,
        intermediate_size=2 * TEXT_DIM,
        projection_dim=TEXT_DIM,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT_TOKENS,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
    )
    return CLIPTextModel(config)


def new_tokenizer() -> PreTrainedTokenizerFast:
    """Build the tokenizer: one token a word, none for punctuation other than the comma."""
    tokenizer = Tokenizer(models.WordLevel(vocabulary(), unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Lowercase(), normalizers.Replace(Regex(r"[^\p{L}\p{N},]+"), " ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token=UNKNOWN, pad_token=PAD, model_max_length=CONTEXT_TOKENS
    )


class TextToVideo(nn.Module):
    """Transformer and text encoder as one module to train; the context is what WanPipeline would pass."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer = new_transformer()
        self.text_encoder = new_text_encoder()

    def forward(self, latents: Tensor, timestep: Tensor, ids: Tensor, context_tokens: int) -> Tensor:
        """Predict the velocity of latents [B, 24, T, h, w] at timestep [B] in 0..1000 for captions ids [B, L]."""
        # Padding stands to the right and attention is causal, so the encoder needs no mask.
        states = self.text_encoder(input_ids=ids).last_hidden_state * (ids > 0)[:, :, None]
        context = nn.functional.pad(states, (0, 0, 0, context_tokens - ids.shape[1]))
        return self.transformer(latents, timestep, context, return_dict=False)[0]


def pipeline(model: TextToVideo) -> WanPipeline:
    """Put the trained modules into a stock WanPipeline."""
    return WanPipeline(
        tokenizer=new_tokenizer(),
        text_encoder=model.text_encoder,
        vae=PixelVAE(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SAMPLING_SHIFT),
        transformer=model.transformer,
    )


def write_shards(state: dict[str, Tensor], folder: Path, shard_bytes: int = 15 << 20) -> list[Path]:
    """Write `state` as bf16 safetensors files of at most `shard_bytes` (a single larger tensor excepted)."""
    shards: list[dict[str, Tensor]] = [{}]
    used_bytes = 0
    for name, value in state.items():
        value = value.detach().to("cpu", torch.bfloat16).contiguous()
        size_bytes = value.numel() * value.element_size()
        if shards[-1] and used_bytes + size_bytes > shard_bytes:
            shards.append({})
            used_bytes = 0
        shards[-1][name] = value
        used_bytes += size_bytes
    paths = [folder / f"weights-{i}.safetensors" for i in range(len(shards))]
    for shard, path in zip(shards, paths, strict=True):
        beside = path.with_suffix(".part")
        save_file(shard, beside)
        beside.replace(path)
    return paths


def write_json(path: Path, value: object) -> None:
    """Write a JSON file beside and rename it: there is never half a file."""
    beside = path.with_suffix(".part")
    beside.write_text(json.dumps(value, indent=1) + "\n")
    beside.replace(path)


def read_trained(folder: Path) -> TextToVideo:
    """Build the model in fp32 from what `write_shards` or `save_pretrained` left in `folder`."""
    model = TextToVideo()
    if (folder / "model_index.json").exists():
        model.transformer = WanTransformer3DModel.from_pretrained(folder / "transformer", torch_dtype=torch.float32)
        model.text_encoder = CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float32)
        return model
    state: dict[str, Tensor] = {}
    paths = sorted(folder.glob("weights-*.safetensors"))
    if not paths:
        raise FileNotFoundError(f"no weights-*.safetensors in {folder}: train first, see docs/bundled-model.md")
    for path in paths:
        state.update(load_file(path))
    model.load_state_dict({name: value.float() for name, value in state.items()})
    return model
