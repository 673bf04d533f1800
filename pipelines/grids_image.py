"""Grid rules of image models: from the arguments of a transformer's forward to its token grid."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dit_sparse.grid import Grid

Z_MULTIPLE = 32  # tokens: Z-Image rounds captions and images up to it
QWEN_SLOT = 4  # latent tokens for one image slot of the language model


def grid_of_ids(ids: Tensor) -> Grid:
    """Return the grid of the first image of ids (image, row, column, ...), each [S, 3 or more] or [B, S, 3 or more].

    Only equality counts, for ids may begin anywhere, be scaled, and be rounded in 16 bits.

    Raises: ValueError where the ids are no grid in rows.
    """
    if ids.device.type == "meta":
        raise ValueError("position ids without values")
    image, row, column = (ids if ids.dim() == 2 else ids[0])[:, :3].detach().to("cpu", torch.float64).unbind(1)
    tokens = _run(image)
    width = _run(row[:tokens])
    if width == 0 or tokens % width:
        raise ValueError(f"position ids of {tokens} tokens with a first row of {width} are no grid")
    rows, columns = row[:tokens].view(-1, width), column[:tokens].view(-1, width)
    in_rows = (rows == rows[:, :1]).all() & (columns == columns[:1]).all()
    if not bool(in_rows & (columns[:, 1:] >= columns[:, :-1]).all()):  # rows that rounding made one start over
        raise ValueError("position ids are not those of a grid in rows")
    return Grid(1, tokens // width, width, suffix=len(image) - tokens)


def packed_image(config: Any, arguments: Mapping[str, Any]) -> Grid:
    """Read the values of `img_ids` [S, 3 or more]; reference images come after the image."""
    tokens, grid = arguments["hidden_states"].shape[1], grid_of_ids(arguments["img_ids"])
    if tokens != grid.tokens:
        raise ValueError(f"{tokens} image tokens, but position ids of {grid.tokens}")
    return grid


def flux2(config: Any, arguments: Mapping[str, Any]) -> Grid:
    """Read the values of `img_ids`; a cache of the reference images' keys puts those first, and is refused."""
    if arguments.get("kv_cache_mode") is not None:
        raise ValueError("keys and values of reference images in a cache")
    return packed_image(config, arguments)


def flux3(config: Any, arguments: Mapping[str, Any]) -> Grid:
    """Read the values of `img_ids`, and the tokens of reference images, which have an argument of their own."""
    grid, reference = packed_image(config, arguments), arguments.get("image_cond_hidden_states")
    return Grid(*grid.shape, suffix=0 if reference is None else reference.shape[1])


def patched_image(config: Any, arguments: Mapping[str, Any]) -> Grid:
    """Read latents [B, C, H, W] and one patch size."""
    height, width = arguments["hidden_states"].shape[2:]
    return Grid(1, height // config.patch_size, width // config.patch_size)


def bria_fibo_2(config: Any, arguments: Mapping[str, Any]) -> Grid:
    """Read latents [B, C, H, W] and those of the images to edit, which come after the image."""
    grid, patch = patched_image(config, arguments), config.patch_size
    context = (latents.shape[2:] for latents in arguments.get("context_latents") or [])
    return Grid(*grid.shape, suffix=sum((height // patch) * (width // patch) for height, width in context))


def qwen_image(config: Any, arguments: Mapping[str, Any]) -> Grid:
    """Read `img_shapes`, (frames, height, width) of a sample's images: the one to make first, references after it.

    Layered models make all images but the last, which are frames then.
    """
    shapes = _shapes_of_one_sample(arguments["img_shapes"])
    made = len(shapes) - 1 if config.use_layer3d_rope else 1
    if len(set(shapes[:made])) != 1:
        raise ValueError(f"layers of different sizes: {shapes[:made]}")
    frames, height, width = shapes[0]
    return Grid(made * frames, height, width, suffix=sum(map(math.prod, shapes[made:])))


def qwen_image_21(config: Any, arguments: Mapping[str, Any]) -> Grid:
    """Read `img_shapes`, references first, and the length of `img_mask`: text tokens and slots for the images."""
    shapes = _shapes_of_one_sample(arguments["img_shapes"])
    references, slots = sum(map(math.prod, shapes[:-1])), sum(map(math.prod, shapes)) // QWEN_SLOT
    return Grid(*shapes[-1], prefix=arguments["img_mask"].shape[1] - slots + references)


def z_image(config: Any, arguments: Mapping[str, Any]) -> Grid:
    """Read the latents [C, F, H, W] of each sample: [image | caption].

    In omni mode a sample has a list of images, and of captions: [captions | references, image | vision features].
    Then all samples must have the same sizes, for the image stands behind the captions.
    """
    samples, captions = arguments["x"], arguments["cap_feats"]
    patch, patch_frames = arguments.get("patch_size", 2), arguments.get("f_patch_size", 1)
    omni = isinstance(samples[0], list)
    if omni:
        features = arguments.get("siglip_feats") or [None] * len(samples)
        sizes = [tuple(map(_nested_shape, one)) for one in zip(samples, captions, features, strict=True)]
    else:
        sizes = [tuple(sample.shape) for sample in samples]
    if len(set(sizes)) != 1:
        raise ValueError("samples of different sizes in one batch")

    def grid(latents: Tensor) -> Grid:
        frames, height, width = latents.shape[1:]
        return Grid(frames // patch_frames, height // patch, width // patch)

    if not omni:
        return grid(samples[0])
    before = [Z_MULTIPLE if latents is None else grid(latents).tokens for latents in samples[0][:-1]]
    before += [len(caption) for caption in captions[0]]
    return Grid(*grid(samples[0][-1]).shape, prefix=sum(-(-tokens // Z_MULTIPLE) * Z_MULTIPLE for tokens in before))


def hidream(config: Any, arguments: Mapping[str, Any]) -> Grid:
    """Read latents [B, C, H, W], or of packed ones `img_sizes`, (height, width) in tokens, where it holds numbers."""
    if arguments["hidden_states"].dim() == 4:
        return patched_image(config, arguments)
    sizes = arguments["img_sizes"]
    if isinstance(sizes, Tensor) or len(set(map(tuple, sizes))) != 1:
        raise ValueError("sizes of packed images that are on a device, or differ")
    return Grid(1, *sizes[0])


def hunyuan_image(config: Any, arguments: Mapping[str, Any]) -> Grid:
    """Read latents [B, C, H, W] and a patch of two sizes; the refiner has [B, C, T, H, W] and three."""
    sizes = arguments["hidden_states"].shape[2:]
    *frames, height, width = (size // patch for size, patch in zip(sizes, config.patch_size, strict=True))
    return Grid(frames[0] if frames else 1, height, width)


def glm_image(config: Any, arguments: Mapping[str, Any]) -> Grid:
    """Read latents [B, C, H, W]; an edit, whose keys come from a cache too, has no grid."""
    caches = arguments.get("kv_caches")
    if caches is not None and caches[0].mode is not None:
        raise ValueError(f"keys of reference images are cached (mode {caches[0].mode!r})")
    return patched_image(config, arguments)


def krea2(config: Any, arguments: Mapping[str, Any]) -> Grid:
    """Read packed latents [B, tokens, C], and the values of position_ids [text + tokens, 3]."""
    ids, tokens = arguments["position_ids"], arguments["hidden_states"].shape[1]
    return grid_of_ids(ids[len(ids) - tokens :])


def ideogram4(config: Any, arguments: Mapping[str, Any]) -> Grid:
    """Read the values of position_ids [B, text + tokens, 3]: image tokens come last, and share a first id."""
    ids = arguments["position_ids"].cpu()
    text = int((ids[0, :, 0] != ids[0, -1, 0]).sum())  # a text of n tokens counts from 0 to n - 1
    image = ids[:, text:]
    if not bool((image == image[:1]).all()):
        raise ValueError("position ids of images that differ in size, or in where they begin")
    return grid_of_ids(image)


def joyimage_edit(config: Any, arguments: Mapping[str, Any]) -> Grid:
    """Read latents [B, C, T, H, W], or [B, images, C, T, H, W]: the model moves the last, its target, to the front."""
    latents = arguments["hidden_states"]
    references = latents.shape[1] - 1 if latents.dim() == 6 else 0
    frames, height, width = (size // patch for size, patch in zip(latents.shape[-3:], config.patch_size, strict=True))
    return Grid(frames, height, width, suffix=references * frames * height * width)


def joyimage_edit_plus(config: Any, arguments: Mapping[str, Any]) -> Grid:
    """Read shape_list: the target of each sample, then its references, padded to hidden_states [B, tokens, ...]."""
    targets = {tuple(shapes[0]) for shapes in arguments["shape_list"]}
    if len(targets) != 1:
        raise ValueError(f"all images of a batch must have one size, got {sorted(targets)}")
    target = Grid(*targets.pop())
    return Grid(*target.shape, suffix=arguments["hidden_states"].shape[1] - target.video_tokens)


def nucleus_image(config: Any, arguments: Mapping[str, Any]) -> Grid:
    """Read img_shapes: (frames, height, width), or a list of it for each sample, of which the model takes the first."""
    shapes = arguments["img_shapes"]
    return Grid(*(shapes[0] if isinstance(shapes, list) else shapes))


def _run(values: Tensor) -> int:
    """Return how many values from the first on are equal to it."""
    other = (values != values[:1]).nonzero()
    return int(other[0]) if len(other) else len(values)


def _shapes_of_one_sample(samples: Any) -> list[tuple[int, int, int]]:
    """Return the image shapes of the first sample; a sample may be one shape, or a list of them."""
    lists = [tuple(sample) if isinstance(sample, list) else (sample,) for sample in samples]
    if len({tuple(map(tuple, shapes)) for shapes in lists}) != 1:
        raise ValueError("samples of different sizes in one batch")
    return [(frames, height, width) for frames, height, width in lists[0]]


def _nested_shape(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(map(_nested_shape, value))
    return None if value is None else tuple(value.shape)
