"""What a model's configs alone tell: layers, heads, and the token grid of a clip size. No weights are read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch

from dit_sparse.grid import Grid
from dit_sparse.pipelines.generate import default_device, known_transformers
from dit_sparse.pipelines.model_table import MODELS, model_of, no_known_model
from dit_sparse.pipelines.models import attention_module, head_dim_of, heads_of, layer_names

TEMPORAL = ("scale_factor_temporal", "temporal_compression_ratio")
WAN_SIZE = (81, 480, 832)  # frames, height, width
SPATIAL = ("scale_factor_spatial", "spatial_compression_ratio")
# what the pipelines' check_inputs ask of height and width in so many words, whatever their configs are
ASKED_PIXELS = {"WanPipeline": 16, "HunyuanVideoPipeline": 16, "LTXPipeline": 32, "CogVideoXPipeline": 8}


@dataclass(frozen=True)
class Shape:
    """Describe one transformer of a pipeline."""

    component: str
    transformer: str
    layers: int
    heads: int
    head_dim: int
    parameters: int


def shapes_of(pipe: Any) -> list[Shape]:
    """Describe the transformers that a loaded pipeline has.

    Raises:
        ValueError: none of them is in the model table.
    """
    return [_shape(name, module) for name, module in known_transformers(pipe).items()]


def inspect_model(model: str, frames: int | None, height: int | None, width: int | None) -> dict[str, Any]:
    """Describe a model (`bundled`, folder or hub id) and its grid at a clip size, as JSON values.

    A size that is None is the bundled model's own for this machine, or Wan's 81 frames of 480x832 pixels.

    Raises:
        ValueError: no transformer of the pipeline is in the model table, or a size that gives no grid.
        OSError: no such folder or hub id.
    """
    modules, vae_config = read_configs(model)
    usual = WAN_SIZE
    if model == "bundled":
        from dit_sparse.pipelines.bundled import defaults

        own = defaults(default_device())
        usual = (own.num_frames, own.height, own.width)
    size = [given or value for given, value in zip((frames, height, width), usual, strict=True)]
    grid = expected_grid(next(iter(modules.values())), vae_config, *size)
    shapes = [asdict(_shape(name, module)) for name, module in modules.items()]
    return {"transformers": shapes, "grid": None if grid is None else {**asdict(grid), "tokens": grid.tokens}}


def read_configs(model: str) -> tuple[dict[str, torch.nn.Module], Mapping[str, Any]]:
    """Build a pipeline's known transformers without memory, from configs alone.

    Returns the transformers on the meta device and the VAE's config (empty where there is none); raises as
    `inspect_model`.
    """
    import diffusers

    if model == "bundled":
        from dit_sparse.pipelines.bundled import bundled_folder
        from dit_sparse.pipelines.pixel_vae import PixelVAE

        model, vae_class = str(bundled_folder()), PixelVAE
    else:
        vae_class = None
    index = diffusers.DiffusionPipeline.load_config(model)
    parts = {name: part[1] for name, part in index.items() if isinstance(part, (list, tuple)) and part[1]}
    known = {}
    with torch.device("meta"):
        for name, class_name in parts.items():
            if class_name in MODELS:
                cls = getattr(diffusers, class_name)
                known[name] = cls.from_config(cls.load_config(model, subfolder=name))
        if not known:
            raise no_known_model(sorted(parts.values()))
        vae_class = vae_class or getattr(diffusers, parts.get("vae", ""), None)
        if vae_class is None:
            return known, {}
        config = vae_class.load_config(model, subfolder="vae") if "vae" in parts else {}
        return known, vae_class.from_config(config).config


def expected_grid(
    transformer: torch.nn.Module, vae_config: Mapping[str, Any], frames: int, height: int, width: int
) -> Grid | None:
    """Return the token grid that a clip of this size in pixels will have, or None where the configs do not tell.

    The grid of a run comes from the transformer's own arguments; this one serves to check and to inform beforehand.

    Raises:
        ValueError: the size gives no whole grid.
    """
    model, steps = model_of(transformer), _latent_steps(transformer, vae_config)
    if model is None or steps is None:
        return None
    (temporal, spatial), patch = steps
    latent = ((frames - 1) // temporal + 1, height // spatial, width // spatial)
    axes = [size // step for size, step in zip(latent, patch, strict=True)]
    if min(axes) < 1:
        raise ValueError(
            f"a clip of {frames} frames, {height}x{width} pixels is smaller than one patch: the VAE divides by "
            f"{temporal}x{spatial}x{spatial}, patches hold {'x'.join(map(str, patch))} latents"
        )
    text_tokens = cast(Any, transformer).config.get("max_text_seq_length") or 0
    prefix, suffix = (text_tokens if model.text == place else 0 for place in ("prefix", "suffix"))
    return Grid(axes[0], axes[1], axes[2], prefix, suffix)


def size_steps(pipe: Any) -> tuple[int, int, int] | None:
    """Return what frames - 1, height and width of a clip must be multiples of, or None where the configs do not tell.

    Frames: of the VAE's factor. Pixels: of the VAE's factor times the patch, and of what the pipeline's `check_inputs`
    asks for.
    """
    if getattr(pipe, "vae", None) is None:
        return None
    steps = _latent_steps(next(iter(known_transformers(pipe).values())), pipe.vae.config)
    if steps is None:
        return None
    (temporal, spatial), patch = steps
    asked = ASKED_PIXELS.get(type(pipe).__name__, 1)
    return temporal, math.lcm(spatial * patch[1], asked), math.lcm(spatial * patch[2], asked)


def _latent_steps(
    transformer: torch.nn.Module, vae_config: Mapping[str, Any]
) -> tuple[tuple[int, int], tuple[int, int, int]] | None:
    """Return the VAE's factors in time and space, and the patch of latents (frames, rows, columns) that a token is."""
    config = dict(cast(Any, transformer).config)
    temporal, spatial = _first(vae_config, TEMPORAL), _first(vae_config, SPATIAL)
    if spatial is None and "block_out_channels" in vae_config:
        spatial = 2 ** (len(vae_config["block_out_channels"]) - 1)
    if temporal is None or spatial is None or "patch_size" not in config:
        return None
    patch = config["patch_size"]
    if isinstance(patch, int):
        patch = (config.get("patch_size_t") or 1, patch, patch)
    return (temporal, spatial), (patch[0], patch[1], patch[2])


def _shape(name: str, module: torch.nn.Module) -> Shape:
    model = model_of(module)
    assert model is not None
    paths = layer_names(module, model)
    first = attention_module(module, paths[0])
    parameters = sum(parameter.numel() for parameter in module.parameters())
    return Shape(name, type(module).__name__, len(paths), heads_of(first), head_dim_of(first), parameters)


def _first(config: Mapping[str, Any], names: tuple[str, ...]) -> int | None:
    return next((config[name] for name in names if config.get(name)), None)
