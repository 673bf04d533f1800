"""The Triton kernels on a real GPU, through the same table as everywhere."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch

from dit_sparse.kernels import lists
from dit_sparse.kernels.backends import BACKENDS, block_attention, choose, compensated_attention
from dit_sparse.kernels.gate import CASES, Case, build, check
from tests.kernels.far_logits import check_far_logits

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU; deselected by default through the marker"),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)  # every dtype it takes
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_triton_meets_fp64(case: Case, dtype: torch.dtype) -> None:
    outcome = check(BACKENDS["triton"].run, case, dtype, "cuda")
    assert outcome.passed, outcome


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("compensate", [False, True])
@pytest.mark.parametrize("partial", [0.0, 0.5])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_logits_far_from_those_of_the_first_block(
    head_dim: int, partial: float, compensate: bool, dtype: torch.dtype
) -> None:
    check_far_logits(BACKENDS["triton"].run, head_dim, partial, compensate, dtype, "cuda")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_compaction_equals_its_torch_twin(case: Case) -> None:
    from dit_sparse.kernels import triton_lists

    _, _, _, indices, kv_lengths = build(case, torch.float32)
    twin = lists.compact(indices, kv_lengths)
    ours = triton_lists.compact(indices.to("cuda"), None if kv_lengths is None else kv_lengths.cuda())
    assert torch.equal(ours.full_count.cpu(), twin.full_count)
    assert torch.equal(ours.partial_count.cpu(), twin.partial_count)
    assert torch.equal(ours.items.cpu(), twin.items)
    written = torch.arange(indices.key_blocks) < (twin.full_count + twin.partial_count)[..., None]
    assert torch.equal(ours.blocks.cpu()[written], twin.blocks[written])


@pytest.mark.parametrize("backend", ["auto", "triton"])  # what users get, and what every GPU has
@pytest.mark.parametrize("whole", [block_attention, compensated_attention])  # with means there are more kernels
def test_no_host_sync_and_one_cuda_graph(whole: Callable[..., tuple[torch.Tensor, ...]], backend: str) -> None:
    q, k, v, indices, _ = build(CASES[0], torch.bfloat16)
    q, k, v, indices = q.cuda(), k.cuda(), v.cuda(), indices.to("cuda")
    hopper = torch.cuda.get_device_capability() == (9, 0)
    assert choose("auto", q, k, v, indices).name == ("hopper" if hopper else "triton")
    attend = partial(whole, backend=backend)
    expected = attend(q, k, v, indices)
    torch.cuda.synchronize()
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        attend(q, k, v, indices)
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = attend(q, k, v, indices)
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(result, first) for result, first in zip(results, expected, strict=True))
