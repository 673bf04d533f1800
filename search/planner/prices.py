"""What a candidate costs: milliseconds of real calls on this machine, as a launch and a share for each head."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dit_sparse.attention import Layer, dense_attention
from dit_sparse.execution import Execution, Tensors
from dit_sparse.grid import Grid
from dit_sparse.moment import Call, Moment, groups_of
from dit_sparse.patterns import Cached, Dense, Pattern
from dit_sparse.plan import Plan
from dit_sparse.record import LayerRecord
from dit_sparse.schedule import Schedule

ROUNDS = {"cpu": 2}
ROUNDS_ACCELERATOR = 7


@dataclass(frozen=True)
class CallShape:
    """Describe a self-attention call: q is [batch, grid.tokens, heads, head_dim] of a torch dtype; so are k and v."""

    grid: Grid
    batch: int
    heads: int
    head_dim: int
    dtype: str
    kv_heads: int | None = None  # None: as many as heads

    @classmethod
    def of(cls, given: Tensors, call: Call) -> CallShape:
        batch, _, heads, head_dim = given.q.shape
        return cls(call.grid, batch, heads, head_dim, str(given.q.dtype).removeprefix("torch."), given.k.shape[2])

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> CallShape:
        return cls(**{**values, "grid": Grid(**values["grid"])})


@dataclass(frozen=True)
class Price:
    """Hold the milliseconds of one call: `launch` once, `head` for each head that takes part."""

    launch: float
    head: float

    def of(self, heads: int) -> float:
        return self.launch + heads * self.head


@dataclass(frozen=True)
class Prices:
    """Hold what calls of one shape cost, by the text of the pattern; `mixed` is paid where heads must be gathered.

    predicted: from the table of another machine, see `price_table`.
    """

    shape: CallShape
    where: str
    by_pattern: Mapping[str, Price]
    mixed: float
    predicted: bool = False

    def of(self, patterns: Sequence[Pattern]) -> float:
        """Predict the milliseconds of one call whose heads take these patterns."""
        groups = groups_of(tuple(patterns))
        heads = sum(self.by_pattern[str(pattern)].head for pattern in patterns)
        launches = sum(max(self.by_pattern[str(patterns[h])].launch for h in members) for _, members in groups)
        return heads + launches + (self.mixed if len(groups) > 1 else 0.0)


def measure_prices(
    patterns: Sequence[Pattern],
    shape: CallShape,
    device: torch.device | str,
    backend: str = "auto",
    known: Mapping[str, Price] | None = None,
    keep: Callable[[str, Price], None] = lambda pattern, price: None,
    mixed: float | None = None,
    busy: bool = True,
    rounds: int | None = None,
) -> Prices:
    """Time calls with each pattern (dense too) for all heads and for half of them, and one of two groups.

    A call is what a layer pays: token order, choice and kernel; a kept choice is shared out over the steps it serves.
    Medians of some rounds on random q, k and v, after two to warm up. CUDA events where there are any. What is in
    `known` is not timed; `keep` hears of each new price, and may raise to stop. `mixed`: as in `Prices`, if known.
    busy: the calls are those of a model that keeps the GPU busy, which hides what the host does (`keeps_busy`).
    rounds: calls that each median is of, None for the usual number.
    """
    everyone = [Dense(), *(p for p in patterns if not isinstance(p, Dense))]
    found = dict(known or {})
    timer = _Timer(shape, torch.device(device), backend, busy)
    timer.rounds = rounds or timer.rounds
    half = timer.half
    for pattern in everyone:
        if str(pattern) in found:
            continue
        whole, part = timer.milliseconds([pattern] * shape.heads), timer.milliseconds([pattern] * half)
        head = (whole - part) / (shape.heads - half) if shape.heads > half else whole
        head = min(max(head, 0.0), whole / shape.heads)
        found[str(pattern)] = Price(max(0.0, whole - head * shape.heads), head)  # which rounding may make negative
        keep(str(pattern), found[str(pattern)])
    if mixed is None and (len(everyone) == 1 or shape.heads == half):
        mixed = 0.0
    if mixed is None:
        two = [everyone[0]] * half + [everyone[-1]] * (shape.heads - half)
        alone = found[str(two[0])].of(half) + found[str(two[-1])].of(shape.heads - half)
        mixed = max(0.0, timer.milliseconds(two) - alone)
    return Prices(shape, timer.where, found, mixed)


def place_of(device: torch.device | str) -> str:
    """Name what prices are true of: the GPU, or the CPU and torch's threads."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads"


class _Timer:
    """Run calls on random tensors of one shape."""

    def __init__(self, shape: CallShape, device: torch.device, backend: str, busy: bool) -> None:
        self.shape, self.device, self.backend = shape, device, backend
        dtype, kv_heads = getattr(torch, shape.dtype), shape.kv_heads or shape.heads
        self.shared = shape.heads // kv_heads  # query heads that share a key head
        self.half = max(1, kv_heads // 2) * self.shared

        def draw(heads: int) -> Tensor:
            size = (shape.batch, shape.grid.tokens, heads, shape.head_dim)
            return torch.randn(size, device=device, dtype=dtype)

        self.q, self.k, self.v = draw(shape.heads), draw(kv_heads), draw(kv_heads)
        self.layer = Layer("timed", 0, Schedule(Plan.dense()), dense_attention)
        self.rounds = ROUNDS.get(device.type, ROUNDS_ACCELERATOR)
        self.where = place_of(device)
        self.filler = _Filler(device) if busy and device.type == "cuda" else None

    @torch.no_grad()
    def milliseconds(self, patterns: Sequence[Pattern]) -> float:
        """Return the median time of a call whose heads take these patterns, the mean over the life of a choice.

        Rounds are queued one behind the other, as the layers of a model are. Where the model keeps the GPU busy, other
        work goes before each, for as long as the host needs to queue it: then the host's time is hidden, as in a run.
        """
        kv_heads = len(patterns) // self.shared
        k, v = (x[:, :, :kv_heads].contiguous() for x in (self.k, self.v))
        given = Tensors(self.q[:, :, : len(patterns)].contiguous(), k, v, None, None, self.shared > 1, None)
        call = Call(groups_of(tuple(pattern.at_layer(0) for pattern in patterns)), self.shape.grid, None, 0)
        execution, record = Execution(self.backend), LayerRecord("timed")
        life = max(p.refresh_steps if isinstance(p, Cached) else 1 for p in patterns)

        def one_life(number: int) -> tuple[Any, Any]:
            start = self._now()
            for step in range(life):
                moment = Moment(self.shape.grid, step=number * life + step)
                execution.sparse(self.layer, given, call, moment, record)
            return start, self._now()

        one_life(0)
        began = time.perf_counter()
        one_life(1)
        host_ms = 1e3 * (time.perf_counter() - began)
        taken = []
        for number in range(self.rounds):
            if self.filler is not None:
                self.filler.run(host_ms)
            taken.append(one_life(2 + number))
        return statistics.median(self._between(*one) for one in taken) / life

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, start: Any, end: Any) -> float:
        if self.device.type != "cuda":
            return float(end - start) * 1e3
        end.synchronize()
        return float(start.elapsed_time(end))


class _Filler:
    """Keep a GPU busy for about so many milliseconds, with products of two matrices."""

    def __init__(self, device: torch.device) -> None:
        self.matrix = torch.randn(4096, 4096, device=device, dtype=torch.float16)
        self.ms = math.inf
        for _ in range(3):  # the first ones are slow
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            self.matrix @ self.matrix
            end.record()
            end.synchronize()
            self.ms = min(self.ms, start.elapsed_time(end))

    def run(self, ms: float) -> None:
        for _ in range(1 + math.ceil(ms / self.ms)):
            self.matrix @ self.matrix
