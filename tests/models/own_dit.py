"""A diffusion transformer as its users write one: diffusers' attention classes, none of diffusers' models."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention import AttentionMixin, AttentionModuleMixin
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor, nn

from dit_sparse.grid import Grid

HEADS, WIDTH, CHANNELS, TEXT_TOKENS = 2, 32, 4, 20
GRID = Grid(3, 8, 12)
BATCH = 2


class OwnProcessor:
    """Attend to the tokens themselves, or to the text where it is given."""

    _attention_backend = None
    _parallel_config = None

    def __call__(self, attn: Any, hidden_states: Tensor, text: Tensor | None = None, mask: Any = None) -> Tensor:
        context = hidden_states if text is None else text
        q = attn.to_q(hidden_states).unflatten(-1, (attn.heads, -1))  # [B, S, H, D]
        k, v = attn.to_k(context).unflatten(-1, (attn.heads, -1)), attn.to_v(context).unflatten(-1, (attn.heads, -1))
        out = dispatch_attention_fn(
            q, k, v, attn_mask=mask, backend=self._attention_backend, parallel_config=self._parallel_config
        )
        return attn.to_out(out.flatten(2))


class OwnAttention(nn.Module, AttentionModuleMixin):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self.heads = HEADS
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.processor = OwnProcessor()

    def forward(self, hidden_states: Tensor, text: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        return self.processor(self, hidden_states, text, mask)


class OwnBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.self_attention, self.cross_attention = OwnAttention(), OwnAttention()

    def forward(self, x: Tensor, text: Tensor, mask: Tensor | None) -> Tensor:
        x = x + self.self_attention(self.norm(x), None, mask)
        return x + self.cross_attention(self.norm(x), text)


class OwnDiT(nn.Module, AttentionMixin):  # type: ignore[misc]
    """Denoise latents [B, C, T, H, W], one token each."""

    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        self.embed, self.out = nn.Linear(CHANNELS, WIDTH), nn.Linear(WIDTH, CHANNELS)
        self.blocks = nn.ModuleList(OwnBlock() for _ in range(layers))

    def forward(self, latents: Tensor, text: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.embed(latents.flatten(2).transpose(1, 2))
        for block in self.blocks:
            x = block(x, text, attention_mask)
        return self.out(x).transpose(1, 2).reshape(latents.shape)


def build() -> OwnDiT:
    """Make the model with weights that give attention some contrast, so that a pattern shows."""
    torch.manual_seed(0)
    model = OwnDiT().eval().requires_grad_(False)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.25 if parameter.dim() > 1 else 0.5)
    return model


def arguments(grid: Grid = GRID) -> dict[str, Any]:
    """Draw the arguments of forward, the same each time."""
    torch.manual_seed(1)
    return {"latents": torch.randn(BATCH, CHANNELS, *grid.shape), "text": torch.randn(BATCH, TEXT_TOKENS, WIDTH)}
