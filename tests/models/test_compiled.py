"""torch.compile of the repeated blocks: the eager result, and no new graph for another plan, step or prompt."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from dit_sparse.patterns import Neighborhood, TopBlocks
from dit_sparse.pipelines.enable import enable, sparse, summary
from dit_sparse.plan import Plan, Rule
from tests.models.case import TEXT, Case
from tests.models.cases import CASES
from tests.models.test_sweep import equal, run

PLANS = [
    Plan((Rule(Neighborhood(window=(1, 0.5, 0.4))),)),
    Plan((Rule(TopBlocks(keep=0.5)),)),
    Plan.dense(),
]
# (class, form) -> why it is here
COMPILED = {
    ("WanTransformer3DModel", ""): "text by cross-attention",
    ("HunyuanVideoTransformer3DModel", ""): "a mask over keys, two kinds of blocks",
    ("HunyuanVideo15Transformer3DModel", ""): "its outer mask is stripped inside the graph, by a meta tensor",
    ("FluxTransformer2DModel", ""): "text in front, no mask",
    ("QwenImageTransformer2DModel", ""): "padded text in front",
    ("SkyReelsV2Transformer3DModel", "diffusion forcing"): "a timestep for each frame",
    ("ChromaTransformer2DModel", "bias"): "a mask that adds to scores",
    ("LTXVideoTransformer3DModel", ""): "packed latents",
}
HERE = [case for case in CASES if case.exists and (case.model, case.form) in COMPILED]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the matrices are tiny; more threads only wait for each other
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()
    counters.clear()
    torch.set_num_threads(threads)


def graphs() -> int:
    assert not counters["graph_break"], dict(counters["graph_break"])
    return int(counters["stats"]["unique_graphs"])


def test_the_cases_are_there() -> None:
    assert {(case.model, case.form) for case in CASES} >= set(COMPILED)


@pytest.mark.parametrize("case", HERE, ids=str)
def test_repeated_blocks(case: Case) -> None:
    lengths = [TEXT - 7, TEXT - 2] if case.padded else [TEXT, TEXT]
    other_lengths = [TEXT - 2, TEXT - 5] if case.padded else lengths
    model: Any = case.build()
    eager = []
    for plan in PLANS:
        with sparse(model, plan, min_tokens=0, strict=True):
            eager.append(run(model, case, lengths))
    enable(model, PLANS[0], min_tokens=0, strict=True)
    other = run(model, case, other_lengths)
    model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    assert equal(run(model, case, lengths), eager[0])
    sparse_calls, count = summary(model).sparse_calls, graphs()
    assert sparse_calls > 0
    assert count >= len({type(block) for block in model.modules() if type(block).__name__ in model._repeated_blocks})
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert equal(run(model, case, other_lengths), other)
        for plan, expected in zip(PLANS[1:], eager[1:], strict=True):
            with sparse(model, plan, min_tokens=0, strict=True):
                assert equal(run(model, case, lengths), expected)
        with sparse(model, PLANS[1], dense_steps=1, min_tokens=0, strict=True):
            for step, expected in enumerate((eager[2], eager[1])):  # dense, sparse
                with model.cache_context("cond", step_index=step, num_inference_steps=2):
                    assert equal(run(model, case, lengths), expected)
        assert equal(run(model, case, lengths), eager[0])  # the first plan again
    assert graphs() == count
    assert summary(model).sparse_calls == sparse_calls
