"""Selection and attention as one CUDA graph on a real GPU: replayed on other contents, it must do what eager does."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

import dit_sparse as ds
from dit_sparse.patterns import PatternState
from dit_sparse.runner import attend_selection

pytestmark = pytest.mark.gpu

GRID = ds.Grid(5, 12, 20, prefix=9, suffix=140)  # ragged tiles, text on both sides
CLIP = ds.Grid(16, 16, 16)  # whole blocks alone
PATTERNS = (
    ds.TopBlocks(keep=0.3),
    ds.TopBlocks(keep=(0.1, 0.3, 0.6, 1.0)),
    ds.TopBlocks(keep=0.3, order="hilbert", sinks="text+diagonal"),
    ds.TopBlocks(threshold=0.5, at_least=0.1, dense_text=False),
    ds.TopBlocks(mass=0.4, compensate=True),
)
SCALE = 128**-0.5


def drawn(grid: ds.Grid, kv_heads: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (
        torch.randn(2, grid.tokens, heads, 128, device="cuda", dtype=torch.bfloat16)
        for heads in (4, kv_heads, kv_heads)
    )
    return 3 * q, 3 * k, v


def choose_and_attend(
    pattern: ds.TopBlocks, qkv: tuple[Tensor, Tensor, Tensor], grid: ds.Grid, state: PatternState, backend: str
) -> tuple[Tensor, ...]:
    q, k, v = qkv
    selection = pattern.select(q, k, grid, state)
    attended = attend_selection(selection, q, k, v, state.layout, SCALE, state.kv_lengths, backend)
    return attended.out, attended.lse, attended.computed_lse, selection.indices.bits, selection.kept_pairs


@pytest.mark.parametrize("backend", ["auto", "triton"])  # what users get, and what every GPU has
@pytest.mark.parametrize("grid", [GRID, CLIP], ids=str)
@pytest.mark.parametrize("hides", [False, True], ids=["all keys", "hidden keys"])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_a_graph_follows_its_inputs(pattern: ds.TopBlocks, hides: bool, grid: ds.Grid, backend: str) -> None:
    layout = pattern.token_order().layout(grid, "cuda")
    lengths = torch.tensor([grid.tokens, grid.tokens - 70], dtype=torch.int32, device="cuda") if hides else None
    state = PatternState(layout, SCALE, kv_lengths=lengths)
    held = drawn(grid, 2)
    choose_and_attend(pattern, held, grid, state, backend)  # compiles, and makes what depends on shapes alone
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = choose_and_attend(pattern, held, grid, state, backend)
    seen = []
    for _ in range(3):
        for kept, fresh in zip(held, drawn(grid, 2), strict=True):
            kept.copy_(fresh)
        for tensor in captured:
            tensor.fill_(-1)  # what the last replay left must not pass for this one's
        graph.replay()
        expected = choose_and_attend(pattern, held, grid, state, backend)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(captured, expected, strict=True))
        seen.append(captured[3].clone())
    assert not torch.equal(seen[0], seen[1])


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_a_whole_call_is_captured(pattern: ds.TopBlocks) -> None:
    attend, held = ds.SparseAttention(pattern), drawn(GRID)
    attend(*held, GRID)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = attend(*held, GRID)
    for kept, fresh in zip(held, drawn(GRID), strict=True):
        kept.copy_(fresh)
    captured.fill_(torch.nan)
    graph.replay()
    assert torch.equal(captured, attend(*held, GRID))


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_choosing_blocks_takes_four_launches(pattern: ds.TopBlocks) -> None:
    """Pool, score, clear the pair counts, choose."""
    q, k, _ = drawn(GRID)
    state = PatternState(pattern.token_order().layout(GRID, "cuda"), SCALE)
    pattern.select(q, k, GRID, state)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        pattern.select(q, k, GRID, state)
        torch.cuda.synchronize()
    launched = [event.name for event in profiled.events() if event.device_type == DeviceType.CUDA]
    assert 3 <= len(launched) <= 4, launched
