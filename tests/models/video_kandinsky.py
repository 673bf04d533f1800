"""Tiny models: Kandinsky 5 and 6, and MiniMax-H3."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dit_sparse.grid import Grid
from tests.models.case import TEXT, TEXT_WIDTH, Case, text, text_mask, timestep

AUDIO = 10  # tokens


def _channels_last(latents: Tensor) -> Tensor:
    return latents.permute(0, 2, 3, 4, 1).contiguous()


def _positions(shape: tuple[int, ...]) -> tuple[Tensor, ...]:
    return tuple(map(torch.arange, shape))


def _kandinsky5(latents: Tensor, text_lengths: list[int]) -> dict[str, Any]:
    batch = len(latents)
    frames, height, width = latents.shape[2:]
    return {
        "hidden_states": _channels_last(latents),
        "encoder_hidden_states": text(batch),
        "timestep": timestep(batch),
        "pooled_projections": text(batch)[:, 0],
        "visual_rope_pos": _positions((frames, height // 2, width // 2)),
        "text_rope_pos": torch.arange(TEXT),
    }


def _kandinsky6(latents: Tensor, text_lengths: list[int]) -> dict[str, Any]:
    batch = len(latents)
    return {
        "hidden_states": _channels_last(latents),
        "encoder_hidden_states": text(batch),
        "pooled_projections": text(batch)[:, 0],
        "timestep": timestep(batch),
        "audio_hidden_states": torch.randn(batch, AUDIO, 4),
        "encoder_attention_mask": text_mask(text_lengths).bool(),
    }


def _kandinsky6_image(latents: Tensor, text_lengths: list[int]) -> dict[str, Any]:
    """Put the image behind the video as a frame at time 0, and generate no audio."""
    arguments = _kandinsky6(latents, text_lengths)
    frames, height, width = latents.shape[2:]
    times, rows, columns = _positions((frames, height // 2, width // 2))
    image = torch.randn(len(latents), 1, height, width, latents.shape[1]).to(latents.device)
    return {
        **arguments,
        "hidden_states": torch.cat([arguments["hidden_states"], image], 1),
        "audio_hidden_states": None,
        "visual_rope_pos": (torch.cat([times, times[:1]]), rows, columns),
        "visual_token_type_ids": (torch.arange(frames + 1) == frames).long().expand(len(latents), -1),
    }


def _minimax_h3(latents: Tensor, text_lengths: list[int]) -> dict[str, Any]:
    """Pack text, one keyframe, audio and the video, in this order."""
    batch, channels, frames, height, width = latents.shape
    rows = latents.reshape(batch, channels, frames, height // 2, 2, width // 2, 2).permute(0, 2, 3, 5, 1, 4, 6)
    packed = rows.reshape(batch, -1, 4 * channels)
    keyframe = height * width // 4
    video = frames * keyframe
    parts = torch.tensor([TEXT, keyframe, AUDIO, video])
    text_part, keyframe_part, audio_part, video_part = torch.arange(int(parts.sum())).split(parts.tolist())

    times, y, x = (sizes.double() for sizes in _positions((frames, height // 2, width // 2)))
    of_text = torch.stack([torch.arange(TEXT).double(), torch.zeros(TEXT), torch.zeros(TEXT)], 1)
    of_audio = torch.stack([TEXT + torch.arange(AUDIO).double(), torch.zeros(AUDIO), torch.zeros(AUDIO)], 1)
    of_keyframe = torch.cartesian_prod(times[:1] + TEXT, y, x)
    of_video = torch.cartesian_prod(times * 5 / 3 + TEXT, y, x)
    return {
        "hidden_states": torch.cat([torch.randn(batch, keyframe, 4 * channels).to(packed.device), packed], 1),
        "audio_hidden_states": torch.randn(batch, AUDIO, 4),
        "encoder_hidden_states": text(batch),
        "timestep": torch.tensor([0.5, 0.0]),
        "timestep_indices": torch.tensor([0, 1, 0, 0]).repeat_interleave(parts),
        "token_tags": torch.tensor([1, 0, 2, 0]).repeat_interleave(parts),
        "position_ids": torch.cat([of_text, of_keyframe, of_audio, of_video]),
        "video_indices": torch.cat([keyframe_part, video_part]),
        "audio_indices": audio_part,
        "text_indices": text_part,
    }


KANDINSKY6 = {
    "in_visual_dim": 4, "out_visual_dim": 4, "in_text_dim": TEXT_WIDTH, "in_text_dim2": TEXT_WIDTH, "time_dim": 16,
    "model_dim": 32, "ff_dim": 32, "num_text_blocks": 1, "num_visual_blocks": 2, "axes_dims": (4, 6, 6),
    "visual_cond": False, "in_audio_dim": 4, "out_audio_dim": 4,
}  # fmt: skip

CASES: list[Case] = [
    Case(
        "Kandinsky5Transformer3DModel",
        {
            "in_visual_dim": 4, "out_visual_dim": 4, "in_text_dim": TEXT_WIDTH, "in_text_dim2": TEXT_WIDTH,
            "time_dim": 16, "model_dim": 32, "ff_dim": 32, "num_text_blocks": 1, "num_visual_blocks": 1,
            "axes_dims": (4, 6, 6),
        },
        latents=(4, 3, 16, 24), patch=(1, 2, 2), inputs=_kandinsky5, grid=Grid(3, 8, 12), usual=(16, 31, 64, 96),
    ),
    Case(
        "Kandinsky6Transformer3DModel", {**KANDINSKY6, "ca_rope": True, "cross_gates": True, "fix_modulation": True},
        latents=(4, 3, 16, 24), patch=(1, 2, 2), inputs=_kandinsky6, grid=Grid(3, 8, 12), usual=(16, 31, 64, 96),
    ),
    Case(
        "Kandinsky6Transformer3DModel", {**KANDINSKY6, "visual_token_type_num_embeddings": 2},
        latents=(4, 3, 16, 24), patch=(1, 2, 2), inputs=_kandinsky6_image, grid=Grid(3, 8, 12, suffix=96),
        usual=(16, 31, 64, 96), form="image to video",
    ),
    Case(
        "MiniMaxH3Transformer3DModel",
        {
            "num_attention_heads": 2, "attention_head_dim": 16, "hidden_size": 32, "num_layers": 2,
            "num_refiner_layers": 1, "ffn_dim": 32, "in_channels": 4, "audio_in_channels": 4, "text_dim": TEXT_WIDTH,
            "freq_dim": 16, "time_embed_hidden_dim": 16, "time_embed_dim": 16, "rope_freq_dim": 2,
        },
        latents=(4, 3, 16, 24), patch=(1, 2, 2), inputs=_minimax_h3, grid=Grid(3, 8, 12, prefix=TEXT + 96 + AUDIO),
        usual=(24, 37, 48, 84),
    ),
]  # fmt: skip
