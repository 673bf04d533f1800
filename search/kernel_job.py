"""One job of the kernel benchmark, in a process of its own: it writes what it finds line by line as it finds it.

Run by kernel_bench: python -m dit_sparse.search.kernel_job '{"section": ...}'
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from dit_sparse.kernels.backends import BACKENDS
from dit_sparse.kernels.bench import block_indices
from dit_sparse.kernels.contenders import Attend, Contender, Inputs
from dit_sparse.kernels.gate import CASES, build, check
from dit_sparse.kernels.row_errors import row_errors
from dit_sparse.kernels.timing import Call, Clocks, Sample, time_contenders

Tell = Callable[[dict[str, Any]], None]

WARM_CALLS = 2
GATE_SHARES = 4  # of the gate's cases, each a process of its own
GATE_THREADS = 1  # of each: the oracle runs on the CPU


class WrongResult(ValueError):
    """A contender's result does not agree with FP64, so no figure of it may stand."""


@dataclass(frozen=True)
class Spec:
    """Say what one job does; kernel_bench writes it, the process reads it."""

    section: str
    units: tuple[str, ...]
    backends: tuple[str, ...]
    rounds: int
    lines: str  # file that lines are added to
    excluded: tuple[tuple[str, str], ...] = ()  # (unit, contender) that hung before
    device: str = "cuda"

    @staticmethod
    def parse(text: str) -> Spec:
        found = json.loads(text)
        excluded = tuple((unit, name) for unit, name in found.pop("excluded"))
        return Spec(**found | {"units": tuple(found["units"]), "backends": tuple(found["backends"])}, excluded=excluded)

    def to_json(self) -> str:
        return json.dumps(asdict(self))


@dataclass(frozen=True)
class Entry:
    """Let a contender take part in a unit on inputs; numbers go into its row as they are."""

    contender: Contender
    inputs: Inputs
    numbers: dict[str, float] = field(default_factory=dict)
    name: str = ""  # where the contender's own does not tell it from others

    @property
    def label(self) -> str:
        return self.name or self.contender.name


@dataclass(frozen=True)
class Job:
    """Hold what the sections need to measure and to tell."""

    spec: Spec
    unit: str
    tell: Tell
    samples: Sequence[Sample]

    def prepared(self, entries: Sequence[Entry]) -> dict[str, tuple[Entry, Attend, tuple[float, float]]]:
        """Make, warm up and check each contender; those that refuse or fail are told and left out."""
        ready = {}
        for entry in entries:
            if (self.unit, entry.label) in self.spec.excluded:
                continue
            reason = entry.contender.refusal(entry.inputs)
            if reason is not None:
                self.tell({"kind": "refused", "contender": entry.label, "reason": reason})
                continue
            self.tell({"kind": "contender", "contender": entry.label})
            try:
                call = entry.contender.make(entry.inputs)
                ready[entry.label] = (entry, call, checked(entry.contender, entry.inputs, call))
            except Exception:
                self.tell({"kind": "error", "contender": entry.label, "error": traceback.format_exc(limit=-3)})
        return ready

    def measure(self, entries: Sequence[Entry], numbers: dict[str, float]) -> None:
        """Time the entries in turn and tell a row for each; numbers go into every row."""
        ready = self.prepared(entries)
        calls: dict[str, Call] = {name: call for name, (_, call, _) in ready.items()}
        self.time(
            calls, {name: {**numbers, **entry.numbers} for name, (entry, _, _) in ready.items()},
            {name: errors for name, (_, _, errors) in ready.items()},
        )  # fmt: skip

    def time(
        self,
        calls: dict[str, Call],
        numbers: dict[str, dict[str, float]],
        errors: dict[str, tuple[float, float]],
    ) -> None:
        """Time calls that have run before, and tell a row for each."""
        self.tell({"kind": "contender", "contender": f"all: {', '.join(calls)}"})
        for name, timing in time_contenders(calls, self.spec.rounds, self.samples).items():
            error, allowed = errors.get(name, (None, None))
            row = {"contender": name, **asdict(timing), "error": error, "allowed": allowed, "numbers": numbers[name]}
            self.tell({"kind": "row", **row})


def checked(contender: Contender, inputs: Inputs, call: Attend) -> tuple[float, float]:
    """Run a call and compare some of its rows with FP64; returns error and bound.

    Raises: WrongResult.
    """
    for _ in range(WARM_CALLS):
        out = call()
    indices = inputs.indices
    if contender.dense:
        blocks = torch.ones(1, indices.query_blocks, indices.key_blocks, dtype=torch.bool, device=inputs.q.device)
        shape = (inputs.q.shape[1], inputs.k.shape[1])
        indices = block_indices(blocks.expand(inputs.q.shape[2], -1, -1), *shape)
    error, allowed = row_errors(out, inputs.q, inputs.k, inputs.v, indices, inputs.scale, contender.compensated)
    if not error <= allowed:
        raise WrongResult(f"rows differ from FP64 by {error:.3g}, allowed is {allowed:.3g}")
    return error, allowed


def gate(unit: str, job: Job) -> None:
    """Run a backend through a share of the table of cases in one dtype: unit is `backend:dtype:share`."""
    backend, name, share = unit.split(":")
    dtype = getattr(torch, name)
    torch.set_num_threads(GATE_THREADS)
    for case in CASES[int(share) :: GATE_SHARES]:
        row = {"kind": "gate", "backend": backend, "dtype": name, "case": case.name}
        job.tell({"kind": "contender", "contender": case.name})
        q, k, v, indices, lengths = build(case, dtype)
        device = job.spec.device
        q, k, v, indices = q.to(device), k.to(device), v.to(device), indices.to(device)
        lengths = None if lengths is None else lengths.to(device)
        reason = BACKENDS[backend].refusal(q, k, v, indices, lengths, case.compensate)
        if reason is not None:
            job.tell({**row, "kind": "gate_refused", "reason": reason})
            continue
        try:
            outcome = check(BACKENDS[backend].run, case, dtype, device)
            job.tell({**row, "passed": outcome.passed, **asdict(outcome)})
        except Exception:
            job.tell({**row, "passed": False, "error": traceback.format_exc(limit=-3)})


def line_writer(path: str, **always: str) -> Tell:
    """Return a function that adds one JSON line at a time, in one write, so that jobs can share a file."""
    place = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

    def tell(found: dict[str, Any]) -> None:
        os.write(place, (json.dumps({**always, **found}) + "\n").encode())

    return tell


@torch.no_grad()
def main(text: str) -> None:
    """Run every unit of a spec."""
    from dit_sparse.search.kernel_sections import SECTIONS

    spec = Spec.parse(text)
    run = gate if spec.section == "gate" else SECTIONS[spec.section].run
    clocks = Clocks()
    with nullcontext() if spec.section == "gate" else clocks:
        for unit in spec.units:
            tell = line_writer(spec.lines, section=spec.section, unit=unit)
            tell({"kind": "begin"})
            try:
                run(unit, Job(spec, unit, tell, clocks.samples))
            except Exception:
                tell({"kind": "error", "error": traceback.format_exc(limit=-4)})
            tell({"kind": "end"})
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main(sys.argv[1])
