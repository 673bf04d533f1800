"""Time one forward of real architectures: stock, dense, and patterns fitted to one computed density."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from dit_sparse.grid import Grid
from dit_sparse.patterns import Dense, Neighborhood, Pattern, Radial, Skip, TopBlocks
from dit_sparse.pipelines.architectures import ARCHITECTURES, Architecture
from dit_sparse.pipelines.enable import disable, enable, summary
from dit_sparse.pipelines.hooks import find_hook
from dit_sparse.pipelines.models import attention_module, head_dim_of, heads_of
from dit_sparse.pipelines.targets import find_targets
from dit_sparse.plan import Plan
from dit_sparse.schedule import Schedule
from dit_sparse.search.fitting import fit
from dit_sparse.search.row_check import check_rows

if TYPE_CHECKING:
    from dit_sparse.attention import Layer

SLOW_SECONDS = 8.0  # a slower forward is timed once
ROUNDS = 3
HEADINGS = (
    "architecture",
    "plan",
    "seconds",
    "speed-up",
    "attention s",
    "computed density",
    "peak GiB",
    "error",
    "allowed",
)


@dataclass(frozen=True)
class Row:
    """Hold what one plan measured on one architecture; seconds are medians of whole forwards.

    error, allowed: of sampled attention rows against FP64, on fresh inputs of the same shape; None for dense rows.
    """

    architecture: str
    plan: str
    seconds: float
    attention_seconds: float | None
    computed_density: float | None
    peak_bytes: int
    first_forward_seconds: float
    error: float | None = None
    allowed: float | None = None
    dense_reasons: dict[str, int] = dataclasses.field(default_factory=dict)


def bench_forwards(
    names: list[str], density: float, told: Callable[[str], None], patterns: list[Pattern] | None = None
) -> list[Row]:
    """Measure the named architectures on the GPU, one after the other.

    patterns: None for Radial (block), Neighborhood and TopBlocks, each fitted to `density` computed pairs.

    Raises: ValueError for an unknown name; RuntimeError where a check of the results fails, or without a GPU.
    """
    if unknown := sorted(set(names) - ARCHITECTURES.keys()):
        raise ValueError(f"architecture must be one of {', '.join(ARCHITECTURES)}, got {unknown[0]!r}")
    if not torch.cuda.is_available():
        raise RuntimeError("forwards of real architectures are timed on a GPU only; none is here")
    rows = []
    for name in names:
        rows += _bench_one(name, ARCHITECTURES[name], density, told, patterns)
        gc.collect()
        torch.cuda.empty_cache()
    return rows


@torch.no_grad()
def _bench_one(
    name: str, architecture: Architecture, density: float, told: Callable[[str], None], patterns: list[Pattern] | None
) -> list[Row]:
    torch.manual_seed(0)
    device = torch.device("cuda")
    model, inputs = architecture.build(device), architecture.inputs(device)
    grid, heads, head_dim = _shape(model, inputs)
    stock_out, stock = _time(name, "stock", model, inputs)
    told("  ".join(cells([stock])[0]))
    rows = [stock]

    def measure(label: str, spec: Pattern | Plan) -> torch.Tensor:
        enable(model, spec, min_tokens=0)
        out, row = _time(name, label, model, inputs)
        found = summary(model)
        row = dataclasses.replace(row, computed_density=found.computed_density, dense_reasons=found.dense_reasons)
        if isinstance(spec, Pattern) and not isinstance(spec, (Dense, Skip)):
            error, allowed = check_rows(spec, grid, heads, head_dim, device)
            if error > allowed:
                raise RuntimeError(f"{name}: {spec} is wrong: rows are {error:.2e} off, {allowed:.2e} allowed")
            row = dataclasses.replace(row, error=error, allowed=allowed)
        rows.append(row)
        told("  ".join(cells([stock, row])[1]))
        disable(model)
        return out

    same = measure("Plan.dense()", Plan.dense())
    if not torch.equal(same, stock_out):
        raise RuntimeError(f"{name}: Plan.dense() is not the stock output")
    trimmed = measure("Dense()", Dense())
    told(f"{name}: Dense() against stock, relative L2: {_relative(trimmed, stock_out):.2e}")
    measure("without attention", Skip())
    for pattern in patterns or fitted(grid, density, device):
        out = measure(str(pattern), pattern)
        if not bool(out.isfinite().all()):
            raise RuntimeError(f"{name}: {pattern} gave values that are not finite")
    return rows


def fitted(grid: Grid, density: float, device: torch.device) -> list[Pattern]:
    """Return the patterns of the comparison, each as near to this computed density on a grid as it comes."""
    return [fit(pattern, grid, density, device) for pattern in (Radial(kind="block"), Neighborhood(), TopBlocks())]


def _time(name: str, label: str, model: nn.Module, inputs: dict[str, Any]) -> tuple[torch.Tensor, Row]:
    """Run a forward to warm up and some to time; the last output comes back."""
    timer, schedules = _AttentionTimer(), _schedules(model)
    for schedule in schedules:
        schedule.timer = timer
    torch.cuda.reset_peak_memory_stats()
    seconds: list[float] = []
    attention: list[float] = []
    while len(seconds) < (2 if seconds and seconds[0] > SLOW_SECONDS else ROUNDS + 1):
        timer.calls.clear()
        torch.cuda.synchronize()
        start = time.perf_counter()
        out = model(**inputs, return_dict=False)[0]
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
        attention.append(timer.seconds())
    of_attention = statistics.median(attention[1:]) if schedules else None
    peak = torch.cuda.max_memory_allocated()
    return out, Row(name, label, statistics.median(seconds[1:]), of_attention, None, peak, seconds[0])


class _AttentionTimer:
    """Put events around each attention call; nothing waits within a forward."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, Any]] = []

    @contextlib.contextmanager
    def __call__(self, layer: Layer) -> Iterator[None]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        yield
        end.record()
        self.calls.append((start, end))

    def seconds(self) -> float:
        return sum(start.elapsed_time(end) for start, end in self.calls) / 1e3


def _schedules(model: nn.Module) -> list[Schedule]:
    hook = find_hook(model)
    return [] if hook is None else hook.schedules(model)


def _shape(model: nn.Module, inputs: dict[str, Any]) -> tuple[Grid, int, int]:
    """Return the grid, without text, the heads and head_dim of a model's self-attention."""
    (target,) = find_targets(model)
    attention = attention_module(model, target.layers[0])
    return target.model.grid(cast(Any, model).config, inputs), heads_of(attention), head_dim_of(attention)


def _relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def cells(rows: list[Row]) -> list[list[str]]:
    """Return the table's cells; speed-ups are against the stock forward of the same architecture."""
    stock = {row.architecture: row.seconds for row in rows if row.plan == "stock"}

    def number(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    return [
        [
            row.architecture, row.plan, f"{row.seconds:.3f}", f"{stock[row.architecture] / row.seconds:.2f}",
            number(row.attention_seconds, ".3f"), number(row.computed_density, ".3f"), f"{row.peak_bytes / 2**30:.1f}",
            number(row.error, ".1e"), number(row.allowed, ".1e"),
        ]
        for row in rows
    ]  # fmt: skip
