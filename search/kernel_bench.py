"""Run the kernel benchmark: the gate first, then every section in processes that a hang or a crash cannot outlive."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from dit_sparse.kernels.backends import explain
from dit_sparse.kernels.indices import random_indices
from dit_sparse.search.kernel_job import GATE_SHARES, Spec

Event = dict[str, Any]
Hear = Callable[[Event], None]

WORKER = (sys.executable, "-c", "import sys; from dit_sparse.search.kernel_job import main; main(sys.argv[1])")
BACKENDS = ("hopper", "triton", "fa4", "flex")
GATED = ("hopper", "triton")  # peers compile for many seconds a case: their rows at the timed shape are checked
TIMED_DTYPE = "bfloat16"
POLL_SECONDS = 0.1
KILL_SECONDS = 60.0  # the driver takes its time over a kernel that never ends
TAIL_CHARACTERS = 1500


@dataclass(frozen=True)
class Request:
    """Say what to measure, and when to give up."""

    sections: tuple[str, ...]
    shapes: tuple[str, ...] = ()  # none: all
    densities: tuple[float, ...] = ()  # of the sections that have several; none: all
    backends: tuple[str, ...] = BACKENDS
    rounds: int = 5
    silence_seconds: float = 120.0  # a process that says nothing for so long is ended
    seconds: float = 540.0  # of everything
    variants: bool = False  # the section "launches" too


def bench_kernels(request: Request, hear: Hear) -> None:
    """Run everything asked for on this machine's GPU; hear gets each event as it happens.

    Raises: RuntimeError without a GPU.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("kernels are timed on a GPU only; none is here")
    from dit_sparse.search.environment import environment

    deadline = time.monotonic() + request.seconds
    hear({"kind": "environment", **environment()})
    missing = {one.name: one.reason for one in _absent() if one.name in request.backends}
    for name, reason in missing.items():
        hear({"kind": "refused", "section": "gate", "unit": name, "contender": name, "reason": reason})
    present = [name for name in request.backends if name not in missing]
    usable = run_gates(present, request, deadline, hear)
    for name, units in units_of(request).items():
        spec = Spec(name, units, tuple(usable), request.rounds, "")
        run_units(spec, request.silence_seconds, deadline, hear)


def units_of(request: Request) -> dict[str, tuple[str, ...]]:
    """Return the units of each section asked for, those of the wanted shapes and densities.

    Raises: ValueError for a section, shape or density that no section knows.
    """
    from dit_sparse.search.kernel_sections import SECTIONS

    if unknown := [name for name in request.sections if name not in SECTIONS]:
        raise ValueError(f"section must be one of {', '.join(SECTIONS)}, got {unknown[0]!r}")
    shapes = {unit.split("@")[0] for section in SECTIONS.values() for unit in section.units}
    if unknown := [name for name in request.shapes if name not in shapes]:
        raise ValueError(f"shape must be one of {', '.join(sorted(shapes))}, got {unknown[0]!r}")
    if unknown := [name for name in request.backends if name not in BACKENDS]:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {unknown[0]!r}")

    def wanted(unit: str) -> bool:
        shape, _, density = unit.partition("@")
        of_density = "." in density and request.densities and float(density) not in request.densities
        return not (request.shapes and shape not in request.shapes) and not of_density

    names = request.sections or tuple(name for name, section in SECTIONS.items() if section.usual)
    if request.variants and "launches" not in names:
        names = (*names, "launches")
    found = {name: tuple(unit for unit in SECTIONS[name].units if wanted(unit)) for name in names}
    found = {name: units for name, units in found.items() if units}
    if not found:
        raise ValueError(f"no section has a unit of shapes {request.shapes} and densities {request.densities}")
    return found


def run_gates(
    backends: Sequence[str], request: Request, deadline: float, hear: Hear, worker: Sequence[str] = WORKER
) -> list[str]:
    """Run our own backends through the gate, in processes that share its cases, since most of its time is compiling.

    Returns the backends that may be timed.
    """

    def one(unit: str) -> list[Event]:
        found: list[Event] = []

        def heard(event: Event) -> None:
            found.append(event)
            hear(event)

        spec = Spec("gate", (unit,), (), 0, "")
        run_units(spec, request.silence_seconds, deadline, heard, worker, again=False)
        return found

    def clean(found: list[Event]) -> bool:
        cases = [event["passed"] for event in found if event["kind"] == "gate"]
        bad = any(event["kind"] in ("error", "failed", "left_out") for event in found)
        return bool(cases) and all(cases) and not bad

    units = {name: [f"{name}:{TIMED_DTYPE}:{share}" for share in range(GATE_SHARES)] for name in GATED}
    with ThreadPoolExecutor(len(GATED) * GATE_SHARES) as pool:
        found = {name: [pool.submit(one, unit) for unit in units[name]] for name in backends if name in GATED}
        events = {name: [event for share in shares for event in share.result()] for name, shares in found.items()}
    return [name for name in backends if name not in GATED or clean(events[name])]


def run_units(
    spec: Spec,
    silence_seconds: float,
    deadline: float,
    hear: Hear,
    worker: Sequence[str] = WORKER,
    again: bool = True,
) -> None:
    """Run the units of a spec in one process, and in a further one after each that hung or died.

    A contender that a process hung in is left out of the unit's second try; a unit that fails twice, or otherwise, is
    given up, and the next one follows.
    """
    remaining, reason = spec.units, "out of time"
    while remaining:
        if time.monotonic() > deadline:
            break
        steps: list[Event] = []
        why = run_watched(replace(spec, units=remaining), silence_seconds, deadline, _both(hear, steps), worker)
        if why is None:
            return
        last = steps[-1] if steps else {"unit": remaining[0], "kind": "start"}
        unit, contender = last["unit"], last.get("contender")
        hear({"kind": "failed", "section": spec.section, "unit": unit, "contender": contender, "reason": why})
        place = remaining.index(unit)
        if last["kind"] == "start":
            remaining, reason = remaining[1:], "its process does not start"
            break
        first = contender is not None and (unit, contender) not in spec.excluded
        if contender is not None and first and again and not contender.startswith("all:"):
            spec = replace(spec, excluded=(*spec.excluded, (unit, contender)))
            remaining = remaining[place:]
        else:
            remaining = remaining[place + 1 :]
    for unit in remaining:
        hear({"kind": "left_out", "section": spec.section, "unit": unit, "reason": reason})


def run_watched(
    spec: Spec, silence_seconds: float, deadline: float, hear: Hear, worker: Sequence[str] = WORKER
) -> str | None:
    """Run one process and pass on its lines; end it when it falls silent or time is up.

    Returns why it failed, or None.
    """
    with tempfile.TemporaryDirectory() as folder:
        lines, log = Path(folder, "lines.jsonl"), Path(folder, "log.txt")
        lines.touch()
        with log.open("w") as output, lines.open() as written:
            command = [*worker, replace(spec, lines=str(lines)).to_json()]
            process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
            part, changed, why = "", time.monotonic(), None
            while True:
                running = process.poll() is None
                part += (fresh := written.read())
                *whole, part = part.split("\n")
                for line in whole:
                    hear(json.loads(line))
                now = time.monotonic()
                changed = now if fresh else changed
                if not running:
                    break
                if now - changed > silence_seconds:
                    why = f"it said nothing for {silence_seconds:.0f} s"
                elif now > deadline:
                    why = "out of time"
                if why is not None:
                    os.killpg(process.pid, signal.SIGKILL)  # its own session: the process and what it started
                    process.wait(KILL_SECONDS)
                    break
                time.sleep(POLL_SECONDS)
        if why is None and process.returncode != 0:
            why = f"exit code {process.returncode}: {log.read_text(errors='replace')[-TAIL_CHARACTERS:].strip()}"
        return why


def _both(hear: Hear, steps: list[Event]) -> Hear:
    """Pass events on, and keep those that tell how far a process has come."""

    def heard(event: Event) -> None:
        if event["kind"] in ("begin", "contender", "end"):
            steps.append(event)
        hear(event)

    return heard


def _absent() -> list[Any]:
    """List the backends that cannot run a plain call on this machine."""
    q = torch.zeros(1, 256, 1, 128, device="cuda", dtype=torch.bfloat16)
    return explain(q, q, q, random_indices(1, 1, [256], [256]).to("cuda"))
