"""What a test case of a model is: a tiny config, and how its forward is called for given latents."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from dit_sparse.grid import Grid


@dataclass(frozen=True)
class Case:
    """Describe one transformer class, or one form of it, small enough for a test of milliseconds.

    model: class name in diffusers. config: of the tiny model. latents: (channels, frames, height, width) of one
        sample. patch: latents along (frames, height, width) that make one token.
    inputs: (latents [B, C, T, H, W], text_lengths [B]) -> keyword arguments of forward. The text has TEXT tokens for
        each sample, drawn from torch's generator, of which text_lengths[b] are real where the model takes a mask.
    grid: what the self-attention of the first layer sees for unpadded text, tokens beyond the grid counted.
    usual: latents (channels, frames, height, width) at the size that the model table names; usual_config: what the
        published model's config has other than the class's defaults.
    padded: the forward takes a mask of padded text. form: tells apart several cases of one class.
    used: the part of an output that the pipeline reads.
    alone: a patch of latents reaches only its own token before the first attention layer.
    """

    model: str
    config: Mapping[str, Any]
    latents: tuple[int, int, int, int]
    patch: tuple[int, int, int]
    inputs: Callable[[Tensor, list[int]], dict[str, Any]]
    grid: Grid
    usual: tuple[int, int, int, int]
    usual_config: Mapping[str, Any] = field(default_factory=dict)
    padded: bool = False
    form: str = ""
    used: Callable[[Tensor], Tensor] = lambda output: output
    alone: bool = True

    def __str__(self) -> str:
        return f"{self.model}-{self.form}" if self.form else self.model

    @property
    def exists(self) -> bool:
        """Say whether the installed diffusers has this class."""
        return hasattr(diffusers, self.model)

    def build(self) -> nn.Module:
        """Make the tiny model with weights that give attention some contrast, so that a pattern shows."""
        torch.manual_seed(0)
        model: nn.Module = getattr(diffusers, self.model)(**self.config).eval().requires_grad_(False)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.15 if parameter.dim() > 1 else 0.5)
        return model

    def draw(self, batch: int, seed: int) -> Tensor:
        """Draw fresh latents [batch, C, T, H, W]."""
        return torch.randn(batch, *self.latents, generator=torch.Generator().manual_seed(seed))

    def arguments(self, latents: Tensor, text_lengths: list[int] | None = None, seed: int = 0) -> dict[str, Any]:
        """Return the arguments of forward; the text is the same for the same seed."""
        torch.manual_seed(seed)
        return self.inputs(latents, text_lengths or [TEXT] * len(latents))


TEXT = 20  # tokens of a prompt
TEXT_WIDTH = 16  # channels of its embedding, where a config lets us choose
TIME = 500.0  # of the noise schedule


def tensors_of(output: Any) -> list[Tensor]:
    """Return the tensors of a forward's output, however it packs them."""
    if isinstance(output, Tensor):
        return [output]
    return [tensor for part in output if part is not None for tensor in tensors_of(part)]


def text(batch: int, tokens: int = TEXT, width: int = TEXT_WIDTH) -> Tensor:
    """Draw text embeddings [batch, tokens, width]."""
    return torch.randn(batch, tokens, width)


def text_mask(lengths: list[int], tokens: int = TEXT) -> Tensor:
    """Return the tokenizer's mask, int64 [B, tokens]: real tokens first."""
    return (torch.arange(tokens) < torch.tensor(lengths)[:, None]).long()


def timestep(batch: int) -> Tensor:
    """Return one timestep for each sample, fp32 [batch]."""
    return torch.full((batch,), TIME)
