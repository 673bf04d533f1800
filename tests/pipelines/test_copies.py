"""Copies, pickles and saved folders are right, and independent of the original."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dit_sparse.patterns import TopBlocks
from dit_sparse.pipelines.enable import attach, disable, enable, sparse, summary
from dit_sparse.pipelines.hooks import find_hook
from dit_sparse.pipelines.processors import SparseProcessor
from tests.pipelines.conftest import Told
from tests.pipelines.tiny import generate


def pickled(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


COPIES = {"deepcopy": copy.deepcopy, "pickle": pickled}
copier = pytest.mark.parametrize("make_copy", COPIES.values(), ids=COPIES)


def processors_of(transformer: Any) -> list[SparseProcessor]:
    return [one for one in transformer.attn_processors.values() if isinstance(one, SparseProcessor)]


@copier
def test_a_copied_pipeline_is_its_own(pipe: Any, told: list[Told], make_copy: Callable[[Any], Any]) -> None:
    stock = generate(pipe)
    enable(attach(pipe), "balanced", min_tokens=0)
    expected = generate(pipe)
    twin = make_copy(pipe)
    originals, copies = processors_of(pipe.transformer), processors_of(twin.transformer)
    assert len(originals) == len(copies) == 2
    assert {int(one.sparse_layer.id) for one in originals}.isdisjoint(int(one.sparse_layer.id) for one in copies)
    (schedule,) = {one.sparse_layer.schedule for one in copies}
    assert schedule is not originals[0].sparse_layer.schedule
    told.clear()
    record = summary(pipe).to_dict()
    # a reload may align its weights otherwise, and CPU kernels then round otherwise
    torch.testing.assert_close(generate(twin), expected, rtol=1e-4, atol=1e-4)
    assert [one.total_steps for one in told] == [3] * len(told)
    assert told[-1].step == 2
    assert summary(pipe).to_dict() == record
    assert summary(twin).to_dict() == record
    disable(twin)
    torch.testing.assert_close(generate(twin), stock, rtol=1e-4, atol=1e-4)
    assert torch.equal(generate(pipe), expected)
    twin.set_attn_processor("balanced", min_tokens=0)
    disable(pipe)
    assert summary(twin).plan == "balanced"
    assert torch.equal(generate(pipe), stock)


@copier
def test_a_copied_transformer_is_its_own(pipe: Any, make_copy: Callable[[Any], Any]) -> None:
    stock = generate(pipe)
    enable(pipe, TopBlocks(keep=0.5), min_tokens=0)
    expected = generate(pipe)
    original = pipe.transformer
    pipe.transformer = make_copy(original)
    assert find_hook(pipe.transformer).pipe is None  # the pipeline was not dragged along
    torch.testing.assert_close(generate(pipe), expected, rtol=1e-4, atol=1e-4)
    disable(pipe)
    torch.testing.assert_close(generate(pipe), stock, rtol=1e-4, atol=1e-4)
    assert len(processors_of(original)) == 2
    pipe.transformer = original
    assert torch.equal(generate(pipe), expected)


def test_a_copy_runs_its_own_weights(pipe: Any) -> None:
    """A wrapped `forward` would run the original's weights in the copy."""
    enable(pipe, TopBlocks(keep=0.5), min_tokens=0)
    expected = generate(pipe)
    twin = copy.deepcopy(pipe)
    with torch.no_grad():
        twin.transformer.proj_out.weight.zero_()
    assert not torch.equal(generate(twin), expected)
    assert torch.equal(generate(pipe), expected)


def test_copies_share_the_derived_class(pipe: Any) -> None:
    enable(pipe, TopBlocks(keep=0.5))
    one = processors_of(pipe.transformer)[0]
    assert type(one) is type(pickled(one)) is type(copy.deepcopy(one)) is type(copy.copy(one))
    assert isinstance(one, type(one.stock_processor))


def test_save_pretrained_is_unaffected(pipe: Any, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path / "stock")
    with sparse(pipe, TopBlocks(keep=0.5), min_tokens=0):
        pipe.save_pretrained(tmp_path / "sparse")
    files = sorted(path.relative_to(tmp_path / "stock") for path in (tmp_path / "stock").rglob("*") if path.is_file())
    assert files
    assert files == sorted(
        path.relative_to(tmp_path / "sparse") for path in (tmp_path / "sparse").rglob("*") if path.is_file()
    )
    for file in files:
        assert (tmp_path / "stock" / file).read_bytes() == (tmp_path / "sparse" / file).read_bytes()
    again = type(pipe).from_pretrained(tmp_path / "sparse")
    again.set_progress_bar_config(disable=True)
    assert not processors_of(again.transformer)
    assert find_hook(again.transformer) is None
    torch.testing.assert_close(generate(again), generate(pipe), rtol=1e-4, atol=1e-4)


def test_state_dict_keys_are_unchanged(pipe: Any) -> None:
    keys = list(pipe.transformer.state_dict())
    enable(pipe, TopBlocks(keep=0.5))
    assert list(pipe.transformer.state_dict()) == keys


def test_a_dropped_pipeline_is_freed() -> None:
    import gc
    import weakref

    from tests.pipelines.tiny import wan

    pipe = attach(wan())
    enable(pipe, TopBlocks(keep=0.5), min_tokens=0)
    generate(pipe, steps=1)
    gone = weakref.ref(pipe.transformer.blocks[0].attn1.processor.sparse_layer.schedule)
    del pipe
    gc.collect()
    assert gone() is None
