"""Grids of Ideogram 4, and the edits of GLM-Image."""

from __future__ import annotations

import diffusers
import pytest
import torch
from diffusers.models.transformers.transformer_glm_image import GlmImageKVCache
from torch import Tensor

from dit_sparse.grid import Grid
from dit_sparse.patterns import TopBlocks
from dit_sparse.pipelines import grids_image
from dit_sparse.pipelines.enable import sparse, summary
from tests.models.image_rows import CASES

CPU = torch.device("cpu")


def ideogram4_ids(height: int, width: int, texts: list[int]) -> Tensor:
    ids: Tensor = diffusers.Ideogram4Pipeline._prepare_ids(texts, height, width, 7, CPU)[0]
    return ids


# one row, one column and neither; no text, padded text, text of two lengths
@pytest.mark.parametrize(("height", "width"), [(1, 6), (6, 1), (3, 4)])
@pytest.mark.parametrize("texts", [[0], [5], [7, 1]])
def test_ideogram4_has_its_image_last(height: int, width: int, texts: list[int]) -> None:
    ids = ideogram4_ids(height, width, texts)
    assert grids_image.ideogram4(None, {"position_ids": ids}) == Grid(1, height, width)
    assert grids_image.ideogram4(None, {"position_ids": ids[:, 7:]}) == Grid(1, height, width)


def test_ideogram4_images_of_a_batch_have_one_size() -> None:
    ids = torch.cat([ideogram4_ids(3, 4, [5]), ideogram4_ids(4, 3, [5])])
    with pytest.raises(ValueError, match="differ in size"):
        grids_image.ideogram4(None, {"position_ids": ids})


@torch.no_grad()
def test_glm_image_edits_are_the_stock_model() -> None:
    """A reference image fills a cache of keys, of which the edit's grid knows nothing: all of it stays dense."""
    case = next(case for case in CASES if case.model == "GlmImageTransformer2DModel")
    model = case.build()
    arguments, reference = case.arguments(case.draw(1, seed=1)), case.arguments(case.draw(1, seed=2))

    def edit() -> Tensor:
        caches = GlmImageKVCache(num_layers=2)
        caches.set_mode("write")
        model(**{**reference, "encoder_hidden_states": reference["encoder_hidden_states"][:, :0]}, kv_caches=caches)
        caches.set_mode("read")
        out: Tensor = model(**arguments, kv_caches=caches, return_dict=False)[0]
        return out

    stock = edit()
    with sparse(model, TopBlocks(keep=0.3), min_tokens=0):
        assert torch.equal(edit(), stock)
        assert any("reference images" in reason for reason in summary(model).dense_reasons)
        assert model(**arguments, kv_caches=GlmImageKVCache(num_layers=2)) is not None
        assert summary(model).sparse_calls > 0
