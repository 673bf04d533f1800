"""Interleaved timing on a GPU: rounds whose order turns round, and the clocks while each contender ran."""

from __future__ import annotations

import datetime
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, NamedTuple

import torch

Call = Callable[[], Any]

ROUND_MS = 25.0  # time of one contender in one round, at least one call
SAMPLE_MS = 20  # between two looks at the clocks
CLOCKS = ("timestamp", "clocks.sm", "power.draw", "temperature.gpu")


class Sample(NamedTuple):
    """Hold one look at the GPU."""

    seconds: float  # since the epoch
    sm_mhz: float
    watts: float
    celsius: float


@dataclass(frozen=True)
class Timing:
    """Hold what the rounds of one contender say; clocks are medians while it ran, None where nobody could look."""

    ms: float  # median of the rounds
    ms_low: float
    ms_high: float
    rounds: int
    repeats: int  # calls in one round
    sm_mhz: float | None = None
    watts: float | None = None
    celsius: float | None = None


def turns(names: Sequence[str], rounds: int) -> list[list[str]]:
    """Return the order of each round: every other one is reversed, so that heat meets nobody in one place only."""
    return [list(names) if number % 2 == 0 else list(reversed(names)) for number in range(rounds)]


def time_contenders(
    calls: dict[str, Call], rounds: int, samples: Sequence[Sample] = (), round_ms: float = ROUND_MS
) -> dict[str, Timing]:
    """Time all calls in turn, round by round; each has run before. samples: those of Clocks, which grow meanwhile."""
    repeats = {name: max(1, int(round_ms / milliseconds(call, 1))) for name, call in calls.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    spans: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for order in turns(list(calls), rounds):
        for name in order:
            begin = time.time()
            times[name].append(milliseconds(calls[name], repeats[name]))
            spans[name].append((begin, time.time()))
    return {name: summary(times[name], repeats[name], spans[name], samples) for name in calls}


def summary(
    times: Sequence[float], repeats: int, spans: Sequence[tuple[float, float]], samples: Sequence[Sample]
) -> Timing:
    """Put the rounds of one contender together with the clocks seen within its spans of seconds."""
    seen = [one for one in samples if any(begin <= one.seconds <= end for begin, end in spans)]
    clocks: list[float | None] = [None, None, None]
    if seen:
        clocks = [statistics.median(values) for values in list(zip(*seen, strict=True))[1:]]
    return Timing(statistics.median(times), min(times), max(times), len(times), repeats, *clocks)


def milliseconds(call: Call, repeats: int) -> float:
    """Return the GPU's time for one call, the mean of so many; short calls come after one that is not counted."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    if repeats > 1:
        call()
    begin.record()
    for _ in range(repeats):
        call()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / repeats


def host_seconds(call: Call, calls: int = 15) -> float:
    """Return the median time until a call comes back, while the GPU has room for more work."""
    times = []
    for _ in range(calls):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    torch.cuda.synchronize()
    return statistics.median(times)


def captured(call: Call) -> tuple[torch.cuda.CUDAGraph, Any]:
    """Capture a call that has run before in a CUDA graph; returns it and the result that a replay fills.

    Raises: RuntimeError where the call waits for the GPU or does what a graph cannot hold.
    """
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        result = call()
    graph.replay()
    torch.cuda.synchronize()
    return graph, result


class Clocks:
    """Look at clock, power and temperature every few milliseconds, from a process and a thread of their own."""

    def __init__(self) -> None:
        self.samples: list[Sample] = []
        self._process: subprocess.Popen[str] | None = None
        self._reader: threading.Thread | None = None

    def __enter__(self) -> Clocks:
        device = torch.cuda.get_device_properties(torch.cuda.current_device())
        # nvidia-smi counts all GPUs of the machine, torch those that it may see: the id tells which is meant
        which = f"GPU-{device.uuid}" if hasattr(device, "uuid") else "0"
        command = [
            "nvidia-smi", f"--query-gpu={','.join(CLOCKS)}", "--format=csv,noheader,nounits", f"--loop-ms={SAMPLE_MS}",
            f"--id={which}",
        ]  # fmt: skip
        try:
            self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        except OSError:  # no such tool: times without clocks
            return self
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process is None or self._reader is None:
            return
        self._process.terminate()
        self._reader.join(5)
        self._process.wait(5)

    def _read(self) -> None:
        assert self._process is not None
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if (sample := parse_sample(line)) is not None:
                self.samples.append(sample)


def parse_sample(line: str) -> Sample | None:
    """Read one line of nvidia-smi, `2025/11/22 18:03:22.123, 1980, 512.30, 45`; None for anything else."""
    parts = [part.strip() for part in line.split(",")]
    try:
        when = datetime.datetime.strptime(parts[0], "%Y/%m/%d %H:%M:%S.%f")
        return Sample(when.timestamp(), *(float(part) for part in parts[1:4]))
    except (ValueError, TypeError):
        return None
