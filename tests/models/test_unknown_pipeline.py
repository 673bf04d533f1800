"""What else is around an unknown transformer: a pipeline with other processors, and text in its sequence."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dit_sparse.grid import Grid
from dit_sparse.patterns import TopBlocks
from dit_sparse.pipelines.enable import attach, disable, enable, sparse, summary
from dit_sparse.pipelines.hooks import find_hook
from dit_sparse.pipelines.model_table import MODELS
from dit_sparse.pipelines.processors import SparseProcessor
from tests.models import own_dit
from tests.models.cases import CASES
from tests.models.test_sweep import equal, run
from tests.pipelines.tiny import generate, wan

GRID = Grid(4, 8, 8)  # of tests.pipelines.tiny.SIZE
PATTERN = TopBlocks(keep=0.5)


@pytest.fixture(params=[1, 2], ids=["one transformer", "two experts"])
def pipe(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Build a pipeline that nobody knows, with a text encoder whose attention has a processor and heads as well."""
    monkeypatch.delitem(MODELS, "WanTransformer3DModel")
    made = wan(experts=request.param)
    attention = text_attention(made)
    attention.processor, attention.heads = own_dit.OwnProcessor(), 4
    return made


def text_attention(pipe: Any) -> Any:
    return pipe.text_encoder.encoder.block[0].layer[0].SelfAttention


def test_without_a_grid_the_error_says_what_to_do(pipe: Any) -> None:
    for switch_on in (lambda: enable(pipe, PATTERN), lambda: attach(pipe)):
        with pytest.raises(ValueError, match=r"docs/models\.md.*grid="):
            switch_on()


def test_the_text_encoder_is_left_alone(pipe: Any) -> None:
    processor, stock = text_attention(pipe).processor, generate(pipe)
    enable(pipe, PATTERN, grid=GRID, min_tokens=0, strict=True)
    sparse_latents = generate(pipe)
    assert not torch.equal(sparse_latents, stock)
    assert summary(pipe).sparse_calls > 0
    assert not [layer.name for layer in summary(pipe).layers if "SelfAttention" in layer.name]
    assert text_attention(pipe).processor is processor
    assert find_hook(pipe.text_encoder) is None
    disable(pipe)
    assert text_attention(pipe).processor is processor
    assert torch.equal(generate(pipe), stock)


def test_the_same_as_the_known_class(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps and branches are told to an unknown transformer too."""
    with sparse(pipe, PATTERN, grid=GRID, dense_steps=1, min_tokens=0, strict=True):
        out = generate(pipe)
        assert summary(pipe).dense_reasons["dense_steps"] > 0
    monkeypatch.undo()  # the class is known again
    with sparse(pipe, PATTERN, dense_steps=1, min_tokens=0, strict=True):
        assert torch.equal(generate(pipe), out)


def test_attached_pipelines_take_a_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = attach(wan())
    with sparse(pipe, PATTERN, min_tokens=0):
        expected = generate(pipe)
    # the table's rule would serve as well; one that is given is asked
    asked: list[Any] = []

    def grid(config: Any, arguments: Any) -> Grid:
        asked.append(config.patch_size)
        return GRID

    pipe.set_attn_processor(PATTERN, grid=grid, layers=r"blocks\.\d+\.attn1", min_tokens=0, strict=True)
    assert torch.equal(generate(pipe), expected)
    assert asked
    ours = [name for name, one in pipe.transformer.attn_processors.items() if isinstance(one, SparseProcessor)]
    assert ours == ["blocks.0.attn1.processor", "blocks.1.attn1.processor"]
    disable(pipe)


# text in front; text behind
@pytest.mark.parametrize("name", ["FluxTransformer2DModel", "SD3Transformer2DModel"])
def test_text_in_the_sequence_is_part_of_the_grid(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = next(case for case in CASES if case.model == name)
    model = case.build()
    with sparse(model, PATTERN, min_tokens=0, strict=True):
        expected = run(model, case)
        calls = summary(model).sparse_calls
    monkeypatch.delitem(MODELS, name)
    with sparse(model, PATTERN, grid=case.grid, min_tokens=0, strict=True):
        assert equal(run(model, case), expected)
        assert (summary(model).grid, summary(model).sparse_calls) == (str(case.grid), calls)
    with sparse(model, PATTERN, grid=Grid(*case.grid.shape), min_tokens=0):
        run(model, case)
        assert summary(model).sparse_calls == 0
        assert "do not match the grid" in " ".join(summary(model).dense_reasons)
