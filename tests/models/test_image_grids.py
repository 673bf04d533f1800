"""Grids of image models: position ids are read right, and what is no one grid is refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from dit_sparse.grid import Grid
from dit_sparse.pipelines import grids_image


def position_ids(height: int, width: int, image: int = 0, start: float = 0.0, scale: float = 1.0) -> Tensor:
    """Return (image, row, column) of each token, [height * width, 3]."""
    axes = torch.tensor([float(image)]), *(start + scale * torch.arange(size) for size in (height, width))
    return torch.cartesian_prod(*axes)


@pytest.mark.parametrize(
    "ids",
    [
        position_ids(3, 5),
        position_ids(3, 5)[None].expand(2, -1, -1),  # Flux.2 repeats them for each sample
        position_ids(3, 5, image=1, start=512.0),  # LongCat begins behind the text
        position_ids(3, 5, scale=0.5),  # Flux.3
        torch.nn.functional.pad(position_ids(3, 5), (0, 1)),  # a fourth axis
    ],
)
def test_ids_may_begin_anywhere(ids: Tensor) -> None:
    assert grids_image.grid_of_ids(ids) == Grid(1, 3, 5)


def test_other_images_are_the_suffix() -> None:
    ids = torch.cat([position_ids(3, 5), position_ids(3, 5, image=1), position_ids(2, 2, image=2)])
    assert grids_image.grid_of_ids(ids) == Grid(1, 3, 5, suffix=15 + 4)


@pytest.mark.parametrize(("height", "width"), [(1, 4), (4, 1), (300, 7), (7, 300)])
def test_ids_in_16_bits(height: int, width: int) -> None:
    """Beyond 256 rows or columns bfloat16 gives neighbours the same number."""
    assert grids_image.grid_of_ids(position_ids(height, width).bfloat16()) == Grid(1, height, width)


@pytest.mark.parametrize(
    "ids",
    [
        position_ids(3, 5)[:-1],  # a row too short
        position_ids(3, 5)[torch.randperm(15, generator=torch.Generator().manual_seed(0))],
        position_ids(3, 5)[:, [0, 2, 1]].view(3, 5, 3)[:, [0, 0, 1, 2, 3]].flatten(0, 1),  # columns first
        torch.cat([position_ids(1, 5)] * 3),  # rows that became one
        position_ids(3, 5).to("meta"),
    ],
)
def test_ids_that_are_no_grid(ids: Tensor) -> None:
    with pytest.raises(ValueError, match="position ids"):
        grids_image.grid_of_ids(ids)


def qwen(**arguments: Any) -> Grid:
    return grids_image.qwen_image(SimpleNamespace(use_layer3d_rope=False), arguments)


def test_qwen_shapes_may_come_without_lists() -> None:
    """The ControlNet pipelines give one shape for each sample."""
    assert qwen(img_shapes=[(1, 4, 6)] * 2) == qwen(img_shapes=[[(1, 4, 6)]] * 2) == Grid(1, 4, 6)


def test_samples_of_different_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="different sizes"):
        qwen(img_shapes=[[(1, 4, 6)], [(1, 6, 4)]])
    caption, wide, high = torch.zeros(5, 3), torch.zeros(4, 1, 8, 12), torch.zeros(4, 1, 12, 8)
    with pytest.raises(ValueError, match="different sizes"):
        grids_image.z_image(None, {"x": [wide, high], "cap_feats": [caption] * 2})
    with pytest.raises(ValueError, match="different sizes"):
        grids_image.z_image(None, {"x": [[wide], [wide]], "cap_feats": [[caption], [caption[1:]]]})
    assert grids_image.z_image(None, {"x": [wide] * 2, "cap_feats": [caption, caption[1:]]}) == Grid(1, 4, 6)


def test_packed_hidream_images_tell_their_sizes() -> None:
    config, packed = SimpleNamespace(patch_size=2), torch.zeros(2, 40, 16)
    assert grids_image.hidream(config, {"hidden_states": packed, "img_sizes": [(4, 6)] * 2}) == Grid(1, 4, 6)
    for sizes in ([(4, 6), (6, 4)], torch.tensor([[4, 6]] * 2)):
        with pytest.raises(ValueError, match="packed"):
            grids_image.hidream(config, {"hidden_states": packed, "img_sizes": sizes})


def test_flux2_with_a_cache_of_references_is_refused() -> None:
    arguments = {"hidden_states": torch.zeros(1, 15, 8), "img_ids": position_ids(3, 5)}
    assert grids_image.flux2(None, arguments) == Grid(1, 3, 5)
    with pytest.raises(ValueError, match="cache"):
        grids_image.flux2(None, {**arguments, "kv_cache_mode": "cached"})
