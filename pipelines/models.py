"""The models we know: where their self-attention is, and which grid their tokens form. One line each."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from dit_sparse.grid import Grid


@dataclass(frozen=True)
class Model:
    """Describe one transformer class.

    layers: regex (fullmatch) of the module paths of its self-attention over video tokens; nothing else is touched.
    grid: (config, the bound arguments of `forward`) -> Grid; reads shapes and Python numbers only.
    text: where the text tokens are: "cross" in attention of its own, "prefix" or "suffix" in the same sequence.
    cfg: how guidance calls the model: "two forwards" (cond, uncond), "doubled batch" ([uncond, cond]), or "one".
    """

    layers: str
    grid: Callable[[Any, Mapping[str, Any]], Grid]
    text: Literal["cross", "prefix", "suffix"]
    cfg: Literal["two forwards", "doubled batch", "one"]


def model_of(transformer: nn.Module) -> Model | None:
    """Return what we know of a transformer, found by its class name or that of a base class; None if nothing."""
    known = (MODELS[cls.__name__] for cls in type(transformer).__mro__ if cls.__name__ in MODELS)
    return next(known, None)


def layer_names(transformer: nn.Module, model: Model) -> tuple[str, ...]:
    """Return the module paths of the self-attention layers, in the order in which a plan counts them."""
    return tuple(
        name
        for name, module in transformer.named_modules()
        if re.fullmatch(model.layers, name) and hasattr(module, "processor")
    )


def attention_module(transformer: nn.Module, name: str) -> Any:
    """Return an attention module of a transformer; what we use of it is `processor` and `heads`."""
    return transformer.get_submodule(name)


def unknown_model(class_names: list[str]) -> ValueError:
    """Build the error for a pipeline or model without known layers."""
    found = ", ".join(class_names) or "nothing"
    return ValueError(
        f"model without known layers: found {found}; known transformers are {', '.join(MODELS)}. "
        "A further model is one line in pipelines/models.py"
    )


def _wan_grid(config: Any, arguments: Mapping[str, Any]) -> Grid:
    frames, height, width = arguments["hidden_states"].shape[2:]  # [B, C, T, H, W]
    patch_frames, patch_height, patch_width = config.patch_size
    return Grid(frames // patch_frames, height // patch_height, width // patch_width)


def _cogvideox_grid(config: Any, arguments: Mapping[str, Any]) -> Grid:
    _, frames, _, height, width = arguments["hidden_states"].shape  # [B, T, C, H, W]
    patch, patch_frames = config.patch_size, config.patch_size_t or 1  # 1.0 has no patch over frames
    text_tokens = arguments["encoder_hidden_states"].shape[1]
    return Grid(frames // patch_frames, height // patch, width // patch, prefix=text_tokens)


MODELS: dict[str, Model] = {
    "WanTransformer3DModel": Model(r"blocks\.\d+\.attn1", _wan_grid, "cross", "two forwards"),
    "CogVideoXTransformer3DModel": Model(r"transformer_blocks\.\d+\.attn1", _cogvideox_grid, "prefix", "doubled batch"),
}
