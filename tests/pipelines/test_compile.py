"""torch.compile: one graph, no break, no recompile over steps, branches and layers, and the eager result."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from dit_sparse.patterns import TopBlocks
from dit_sparse.pipelines.enable import disable, enable, sparse, summary
from tests.pipelines.tiny import cogvideox, generate, wan


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()
    counters.clear()


def graphs() -> int:
    assert not counters["graph_break"], dict(counters["graph_break"])
    return int(counters["stats"]["unique_graphs"])


def eager(pipe: Any) -> torch.Tensor:
    with sparse(pipe, TopBlocks(keep=0.5), min_tokens=0, dense_steps=1):
        return generate(pipe)


def switch_on(pipe: Any) -> None:
    enable(pipe, TopBlocks(keep=0.5), min_tokens=0, dense_steps=1)


# enable may come before or after compiling
@pytest.mark.parametrize("enable_first", [True, False])
def test_wan_as_a_whole(enable_first: bool) -> None:
    pipe = wan()
    expected = eager(pipe)
    if enable_first:
        switch_on(pipe)
    pipe.transformer = torch.compile(pipe.transformer, fullgraph=True, backend="eager")
    if not enable_first:
        switch_on(pipe)
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert torch.equal(generate(pipe), expected)
    assert graphs() == 1
    assert summary(pipe).sparse_calls == 8
    assert summary(pipe).dense_reasons == {"dense_steps": 4}


def test_cogvideox_in_place() -> None:
    pipe = cogvideox()
    expected = eager(pipe)
    switch_on(pipe)
    pipe.transformer.compile(fullgraph=True, backend="eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert torch.equal(generate(pipe), expected)
    assert graphs() == 1
    assert summary(pipe).sparse_calls == 4
    assert summary(pipe).dense_reasons == {"dense_steps": 2}


def test_repeated_blocks_share_one_graph() -> None:
    pipe = wan(layers=4)
    expected = eager(pipe)
    switch_on(pipe)
    pipe.transformer.compile_repeated_blocks(fullgraph=True, backend="eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert torch.equal(generate(pipe), expected)
        switch_to = TopBlocks(keep=1.0)
        with pytest.warns(UserWarning, match="replaces"):
            enable(pipe, switch_to, min_tokens=0)
        generate(pipe)  # another plan, new layers: the same graph
    assert graphs() == 1
    disable(pipe)


def test_aot_functionalises_the_op() -> None:
    """The backend that inductor builds on, on a block of each model."""
    pipe = wan(layers=1)
    expected = eager(pipe)
    switch_on(pipe)
    pipe.transformer.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(generate(pipe), expected, rtol=1e-5, atol=1e-5)
    assert graphs() == 1
