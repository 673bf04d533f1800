"""Time every pattern at the shapes of real models: choosing blocks beside attending to them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dit_sparse.attention import SparseAttention
from dit_sparse.grid import Grid
from dit_sparse.kernels.timing import captured
from dit_sparse.patterns import Pattern, PatternState, pattern_from_text
from dit_sparse.runner import attend_selection, exact_attention
from dit_sparse.search.fitting import fit
from dit_sparse.search.row_check import check_rows

ROUNDS = 7
HEADINGS = (
    "shape", "pattern", "density", "first ms", "order ms", "choose ms", "graph ms", "lists ms", "attend ms", "of dense",
    "choose/attend", "MiB added", "error", "allowed",
)  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """Name one attention call: batch 1, bf16."""

    grid: Grid
    heads: int
    head_dim: int


SHAPES = {
    "wan2.1-1.3b-480p": Shape(Grid(21, 30, 52), 12, 128),
    "wan2.1-14b-720p": Shape(Grid(21, 45, 80), 40, 128),
    "hunyuanvideo-720p": Shape(Grid(33, 45, 80, suffix=256), 24, 128),
    "cogvideox-5b": Shape(Grid(13, 30, 45, prefix=226), 48, 64),
}
# Static patterns are fitted to the density by their knob; those without one, and content-dependent ones with a target
# of their own, run as they are.
PATTERNS = (
    "neighborhood", "neighborhood:clamp=tile,window=3x15x15,stride=1x5x5", "radial", "radial:kind=block",
    "stripes:kind=diagonal", "stripes:kind=multi-diagonal", "stripes:kind=vertical", "frames:kind=spatial",
    "frames:kind=temporal", "autoframes", "powers", "strided",
    "topblocks", "topblocks:order=raster", "topblocks:order=hilbert", "topblocks:order=gilbert",
    "topblocks:order=morton", "topblocks:order=hilbert,compensate=true", "topblocks:order=hilbert,heads=adaptive",
    "topblocks:order=hilbert,mass=0.25", "topblocks:order=hilbert,threshold=0.7",
    "topblocks:order=hilbert,score=lse", "topblocks:order=hilbert,score=antidiagonal",
    "topblocks:order=hilbert,score=sampled", "topblocks:order=hilbert,score=exact",
    "topblocks:order=hilbert,score=lowbit", "topblocks:order=hilbert,score=proxy",
    "topblocks:order=hilbert,score=region", "topblocks:clusters=256", "topblocks:order=hilbert,recall=0.25",
    "topblocks:order=hilbert,error=0.9",
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """Hold what one pattern measured at one shape; milliseconds are medians of CUDA events.

    first: wall time of the first call of all (masks built, kernels compiled). order: q, k, v to kernel order and the
    output back. choose: the selection of one later call, launched by the host. graph: the same replayed from a CUDA
    graph, so the device's time alone; None where it cannot be captured. lists: the block lists of that selection,
    replayed too; a part of attend. attend: the kernels over the chosen blocks. of_dense: choose + order + attend over
    torch's faster dense attention. added_bytes: peak memory of a call beyond that of the dense one.
    """

    shape: str
    pattern: str
    computed_density: float
    first_ms: float
    order_ms: float
    choose_ms: float
    graph_ms: float | None
    lists_ms: float | None
    attend_ms: float
    dense_ms: float
    added_bytes: int
    error: float
    allowed: float

    @property
    def of_dense(self) -> float:
        return (self.order_ms + self.choose_ms + self.attend_ms) / self.dense_ms


def bench_patterns(
    shapes: Sequence[str], specs: Sequence[str], density: float, told: Callable[[str], None]
) -> list[Row]:
    """Measure each pattern at each shape on the GPU, after checking sampled rows against FP64.

    Raises: ValueError for an unknown shape or spec; RuntimeError where a result is wrong, or without a GPU.
    """
    if unknown := sorted(set(shapes) - SHAPES.keys()):
        raise ValueError(f"shape must be one of {', '.join(SHAPES)}, got {unknown[0]!r}")
    patterns = [pattern_from_text(spec) for spec in specs]
    if not torch.cuda.is_available():
        raise RuntimeError("patterns are timed on a GPU only; none is here")
    rows = []
    for name in shapes:
        shape = SHAPES[name]
        dense_ms, dense_peak = _time_dense(shape)
        for pattern in patterns:
            try:
                fitted = fit(pattern, shape.grid, density, "cuda")
            except ValueError as refused:
                told(f"{name}  {pattern}: {refused}")
                continue
            row = _time_pattern(name, shape, fitted, dense_ms, dense_peak)
            told("  ".join(cells([row])[0]))
            rows.append(row)
            torch.cuda.empty_cache()
    if wrong := [f"{row.shape} {row.pattern}" for row in rows if not row.error <= row.allowed]:
        raise RuntimeError(f"no figure stands while results are wrong: {'; '.join(wrong)}")
    return rows


def _draw(shape: Shape) -> tuple[Tensor, Tensor, Tensor]:
    size = (1, shape.grid.tokens, shape.heads, shape.head_dim)
    q, k, v = (torch.randn(size, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    return q, k, v


@torch.no_grad()
def _time_dense(shape: Shape) -> tuple[float, int]:
    """Return the milliseconds and the peak bytes of the faster of torch's two dense kernels."""
    q, k, v = (x.transpose(1, 2) for x in _draw(shape))
    torch.cuda.reset_peak_memory_stats()
    found = []
    for kernel in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):
        with sdpa_kernel(kernel):
            found.append(_median_ms(lambda: F.scaled_dot_product_attention(q, k, v)))
    return min(found), torch.cuda.max_memory_allocated()


@torch.no_grad()
def _time_pattern(name: str, shape: Shape, pattern: Pattern, dense_ms: float, dense_peak: int) -> Row:
    from dit_sparse.kernels.triton_lists import compact  # triton is not there on every system

    torch.manual_seed(0)
    error, allowed = check_rows(pattern, shape.grid, shape.heads, shape.head_dim, torch.device("cuda"))
    q, k, v = _draw(shape)
    attend = SparseAttention(pattern)
    torch.cuda.synchronize()
    start = time.perf_counter()
    attend(q, k, v, shape.grid)
    torch.cuda.synchronize()
    first_ms = 1e3 * (time.perf_counter() - start)
    torch.cuda.reset_peak_memory_stats()
    attend(q, k, v, shape.grid)
    peak = torch.cuda.max_memory_allocated()
    layout = pattern.token_order().layout(shape.grid, q.device)
    order_ms = _median_ms(lambda: [layout.to_kernel(x) for x in (q, k, v)] + [layout.from_kernel(q)])
    q, k, v = layout.to_kernel(q), layout.to_kernel(k), layout.to_kernel(v)
    scale = shape.head_dim**-0.5
    state = PatternState(layout, scale, v=v, exact=exact_attention(k, v, layout, scale, None, "auto", {}))
    selection = pattern.select(q, k, shape.grid, state)
    choose_ms = _median_ms(lambda: pattern.select(q, k, shape.grid, state))
    apart = replace(state, memory=dict(state.memory))  # a graph's tensors belong to the graph
    graph_ms = _replayed_ms(lambda: pattern.select(q, k, shape.grid, apart))
    lists_ms = _replayed_ms(lambda: compact(selection.indices))
    attend_ms = _median_ms(lambda: attend_selection(selection, q, k, v, layout, scale, None, "auto"))
    visited = float(selection.visited_pairs.sum()) / shape.heads / shape.grid.video_tokens**2
    return Row(
        name, str(pattern), visited, first_ms, order_ms, choose_ms, graph_ms, lists_ms, attend_ms, dense_ms,
        peak - dense_peak, error, allowed,
    )  # fmt: skip


def _median_ms(call: Callable[[], object]) -> float:
    """Return the median of some rounds after two to warm up."""
    times = []
    for _ in range(ROUNDS + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times[2:])


def _replayed_ms(call: Callable[[], object]) -> float | None:
    """Return the median of replays from a CUDA graph; None where the call, which has run before, cannot be captured."""
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")  # found out before a capture breaks on it
    try:
        call()
    except RuntimeError:
        return None
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    try:
        graph, _ = captured(call)
    except RuntimeError:
        return None
    return _median_ms(graph.replay)


def _cell(ms: float | None) -> str:
    return "-" if ms is None else f"{ms:.3f}"


def cells(rows: list[Row]) -> list[list[str]]:
    """Return the table's cells under HEADINGS."""
    return [
        [
            row.shape, row.pattern, f"{row.computed_density:.3f}", f"{row.first_ms:.0f}", f"{row.order_ms:.2f}",
            f"{row.choose_ms:.3f}", _cell(row.graph_ms), _cell(row.lists_ms), f"{row.attend_ms:.2f}",
            f"{row.of_dense:.2f}", f"{row.choose_ms / row.attend_ms:.1%}", f"{row.added_bytes / 2**20:+.0f}",
            f"{row.error:.1e}", f"{row.allowed:.1e}",
        ]
        for row in rows
    ]  # fmt: skip
