"""Two sections of the kernel benchmark: what choosing blocks costs, and what a launch costs the host."""

from __future__ import annotations

import traceback
from functools import partial

import torch

from dit_sparse.kernels.contenders import CUDNN, OWN, Inputs, kernel, whole_call
from dit_sparse.kernels.pool import pool_both
from dit_sparse.kernels.timing import Call, captured, host_seconds
from dit_sparse.patterns import PatternState, TopBlocks
from dit_sparse.search.kernel_job import Entry, Job
from dit_sparse.search.kernel_shapes import GRIDS, SHAPES, draw, even_inputs

SELECTORS = {
    "keep=0.25": TopBlocks(keep=0.25),
    "keep=0.1": TopBlocks(keep=0.1),
    "threshold=0.7": TopBlocks(threshold=0.7),
}
HEAD_DIM = 128
HOST_DENSITY = 0.05


def selection(unit: str, job: Job) -> None:
    """Time choosing (pool, score, select, compact), eager and replayed, beside the kernel over the chosen blocks."""
    from dit_sparse.kernels.triton_lists import compact  # triton is not there on every system

    grid, heads = GRIDS[unit]
    q, k, v = draw(grid.tokens, heads, HEAD_DIM, job.spec.device)
    scale = q.shape[-1] ** -0.5
    own = [name for name in job.spec.backends if name in OWN]
    for label, pattern in SELECTORS.items():
        layout = pattern.token_order().layout(grid, q.device)
        state = PatternState(layout, scale, v=v)

        def choose(pattern: TopBlocks = pattern, state: PatternState = state) -> tuple[object, ...]:
            indices = pattern.select(q, k, grid, state).indices
            return indices, compact(indices)

        job.tell({"kind": "contender", "contender": f"choose {label}"})
        choose()
        indices = choose()[0]
        inputs = Inputs(q, k, v, indices)  # type: ignore[arg-type]
        ready = job.prepared([Entry(kernel(name), inputs, name=f"{label} {name}") for name in own])
        calls: dict[str, Call] = {f"{label} choose": choose}
        calls[f"{label} pool"] = partial(pool_both, q, k, layout.start, layout.length, layout.blocks)
        calls[f"{label} compact"] = partial(compact, inputs.indices)
        for call in calls.values():
            call()
        numbers: dict[str, float] = {"density": float(inputs.indices.block_mask().double().mean())}
        try:
            graph, replayed = captured(choose)
            calls[f"{label} choose replayed"] = graph.replay
            numbers["replay_agrees"] = float(torch.equal(replayed[0].bits, inputs.indices.bits))
        except Exception:
            job.tell(
                {"kind": "error", "contender": f"{label} choose replayed", "error": traceback.format_exc(limit=-3)}
            )
        calls |= {name: call for name, (_, call, _) in ready.items()}
        job.time(calls, dict.fromkeys(calls, numbers), {name: errors for name, (_, _, errors) in ready.items()})


def host(unit: str, job: Job) -> None:
    """Time a launch on the host, eager and as a CUDA graph, at the shape's lowest density."""
    shape = SHAPES[unit]
    count = max(1, round(HOST_DENSITY * shape.blocks))
    inputs = even_inputs(shape, [count] * shape.heads, job.spec.device)
    names = job.spec.backends
    contenders = [CUDNN, *(kernel(name) for name in names), *(whole_call(name) for name in names if name in OWN)]
    ready = job.prepared([Entry(one, inputs) for one in contenders])
    calls: dict[str, Call] = {}
    numbers: dict[str, dict[str, float]] = {}
    for name, (_, call, _) in ready.items():
        job.tell({"kind": "contender", "contender": name})
        calls[name], numbers[name] = call, {"host_us": 1e6 * host_seconds(call)}
    for name, (_, call, _) in ready.items():
        job.tell({"kind": "contender", "contender": f"{name} replayed"})
        try:
            graph, out = captured(call)
        except Exception:
            job.tell({"kind": "error", "contender": f"{name} replayed", "error": traceback.format_exc(limit=-3)})
            continue
        agrees = float(torch.equal(out, call()))
        numbers[f"{name} replayed"] = {"host_us": 1e6 * host_seconds(graph.replay), "replay_agrees": agrees}
        calls[f"{name} replayed"] = graph.replay
    job.time(calls, numbers, {name: errors for name, (_, _, errors) in ready.items()})
