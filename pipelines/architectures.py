"""Published architectures with random weights: what a forward costs does not depend on the weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

DTYPE = torch.bfloat16
Draw = Callable[..., Tensor]  # sizes -> random tensor of DTYPE on the device


@dataclass(frozen=True)
class Architecture:
    """Name a transformer class of diffusers, its published config, and the arguments of one forward at one size."""

    model: str
    size: str
    config: dict[str, Any]
    arguments: Callable[[Draw, torch.device], dict[str, Any]]

    def build(self, device: torch.device) -> nn.Module:
        """Make the model on a device in bfloat16; peak memory is the weights alone."""
        import diffusers

        cls = getattr(diffusers, self.model)
        before = torch.get_default_dtype()
        torch.set_default_dtype(DTYPE)
        try:
            with torch.device(device):
                model: nn.Module = cls(**self.config)
        finally:
            torch.set_default_dtype(before)
        return model.eval().requires_grad_(False)

    def inputs(self, device: torch.device) -> dict[str, Any]:
        """Draw the arguments of forward."""
        return self.arguments(lambda *sizes: torch.randn(*sizes, device=device, dtype=DTYPE), device)


WAN_1B = {"num_attention_heads": 12, "num_layers": 30, "ffn_dim": 8960}
WAN_14B = {"num_attention_heads": 40, "num_layers": 40, "ffn_dim": 13824}


def _wan(frames: int, height: int, width: int) -> Callable[[Draw, torch.device], dict[str, Any]]:
    def arguments(draw: Draw, device: torch.device) -> dict[str, Any]:
        return {
            "hidden_states": draw(1, 16, frames, height, width),
            "timestep": torch.tensor([500], device=device),
            "encoder_hidden_states": draw(1, 512, 4096),
        }

    return arguments


def _hunyuan_video(draw: Draw, device: torch.device) -> dict[str, Any]:
    real_tokens = 60  # of 256: a prompt of a sentence or two, after the template is cut off
    return {
        "hidden_states": draw(1, 16, 33, 90, 160),
        "timestep": torch.tensor([500], device=device),
        "encoder_hidden_states": draw(1, 256, 4096),
        "encoder_attention_mask": (torch.arange(256, device=device) < real_tokens)[None],
        "pooled_projections": draw(1, 768),
        "guidance": torch.tensor([6000.0], device=device, dtype=DTYPE),
    }


def _cogvideox(draw: Draw, device: torch.device) -> dict[str, Any]:
    return {
        "hidden_states": draw(2, 13, 16, 60, 90),  # guidance doubles the batch
        "timestep": torch.tensor([500, 500], device=device),
        "encoder_hidden_states": draw(2, 226, 4096),
        "image_rotary_emb": (draw(17550, 64).float(), draw(17550, 64).float()),
    }


def _flux(draw: Draw, device: torch.device) -> dict[str, Any]:
    side = 128  # 2048 pixels / 16
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    ids = torch.stack([torch.zeros_like(rows), rows, columns], -1).flatten(0, 1)
    return {
        "hidden_states": draw(1, side * side, 64),
        "timestep": torch.tensor([0.5], device=device, dtype=DTYPE),
        "encoder_hidden_states": draw(1, 512, 4096),
        "pooled_projections": draw(1, 768),
        "guidance": torch.tensor([3.5], device=device, dtype=DTYPE),
        "img_ids": ids.to(device, DTYPE),
        "txt_ids": torch.zeros(512, 3, device=device, dtype=DTYPE),
    }


ARCHITECTURES: dict[str, Architecture] = {
    "wan2.1-1.3b-480p": Architecture("WanTransformer3DModel", "81 frames of 480x832", WAN_1B, _wan(21, 60, 104)),
    "wan2.1-1.3b-720p": Architecture("WanTransformer3DModel", "81 frames of 720x1280", WAN_1B, _wan(21, 90, 160)),
    "wan2.1-14b-720p": Architecture("WanTransformer3DModel", "81 frames of 720x1280", WAN_14B, _wan(21, 90, 160)),
    "hunyuanvideo-720p": Architecture(
        "HunyuanVideoTransformer3DModel", "129 frames of 720x1280", {"guidance_embeds": True}, _hunyuan_video
    ),
    "cogvideox-5b": Architecture(
        "CogVideoXTransformer3DModel", "49 frames of 480x720, two samples",
        {"num_attention_heads": 48, "num_layers": 42, "use_rotary_positional_embeddings": True}, _cogvideox,
    ),
    "flux.1-dev-2048": Architecture("FluxTransformer2DModel", "2048x2048", {"guidance_embeds": True}, _flux),
}  # fmt: skip
