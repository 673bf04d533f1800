"""Launch configurations of our own kernels, timed one by one after a short gate of each."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch

from dit_sparse.kernels.contenders import Attend, Contender, Inputs, kernel, own_module
from dit_sparse.kernels.gate import CASES, check
from dit_sparse.kernels.launch import HopperLaunch, Launch

GATE_CASES = ("full", "masks", "ragged_masks", "d128", "masks_d128", "kv_lengths_masks")

# Beside the heuristic's own choice; each was a plausible winner on paper.
TRITON = {
    128: (
        Launch(128, 128, 8, 2, True, "ieee"),
        Launch(128, 128, 8, 2, False, "ieee"),
        Launch(128, 64, 4, 2, True, "ieee"),
        Launch(128, 64, 4, 4, True, "ieee"),
        Launch(128, 64, 4, 3, True, "ieee"),
        Launch(128, 64, 4, 2, True, "ieee", keep=True),
        Launch(128, 64, 4, 3, True, "ieee", keep=True),
    ),
    64: (
        Launch(128, 128, 8, 2, True, "ieee"),
        Launch(64, 128, 4, 3, True, "ieee"),
        Launch(64, 128, 4, 2, True, "ieee"),
        Launch(128, 64, 4, 3, True, "ieee"),
        Launch(128, 64, 4, 3, True, "ieee", keep=True),
        Launch(64, 128, 4, 2, True, "ieee", keep=True),
    ),
}
HOPPER = {
    128: tuple(HopperLaunch(2, turns) for turns in (False, True)),
    64: tuple(HopperLaunch(stages, turns) for stages in (4, 3, 2) for turns in (True, False)),
}


def launch_choices(backend: str, head_dim: int) -> dict[str, Launch | HopperLaunch]:
    """Return the configurations of a backend of our own by label."""
    choices: tuple[Launch | HopperLaunch, ...] = (TRITON if backend == "triton" else HOPPER)[head_dim]
    return {label(one): one for one in choices}


def launch_contenders(backend: str, choices: dict[str, Launch | HopperLaunch], head_dim: int) -> list[Contender]:
    """Return a contender for each configuration; making one runs it through the gate first."""
    found = []
    for name, launch in choices.items():
        one = kernel(backend, launch, name)
        found.append(replace(one, make=partial(_gated, backend, launch, one, head_dim)))
    return found


def _gated(backend: str, launch: Any, contender: Contender, head_dim: int, inputs: Inputs) -> Attend:
    """Make the contender after its configuration has passed a few cases in bf16.

    Raises: ValueError.
    """
    from dit_sparse.kernels.triton_lists import compact  # triton is not there on every system

    module = own_module(backend)

    def run(q: Any, k: Any, v: Any, indices: Any, scale: float, kv_lengths: Any, compensate: bool) -> Any:
        return module.attend_lists(q, k, v, indices, compact(indices, kv_lengths), scale, kv_lengths, launch, None)

    for case in CASES:
        if case.name in GATE_CASES and case.head_dim == head_dim:
            outcome = check(run, case, torch.bfloat16, inputs.q.device)
            if not outcome.passed:
                raise ValueError(f"{launch} fails the gate: {outcome}")
    return contender.make(inputs)


def label(launch: Launch | HopperLaunch) -> str:
    """Write a configuration shortly."""
    if isinstance(launch, HopperLaunch):
        return f"s{launch.stages}{' turns' if launch.turns else ''}"
    reads = ("tma" if launch.tma else "ptr") + (" keep" if launch.keep else "")
    return f"{launch.block_m}x{launch.block_n} w{launch.num_warps} s{launch.num_stages} {reads}"
