"""What a tensor's device can do: whether Triton runs there, and under which name launches know it."""

from __future__ import annotations

import importlib.util
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def runs_triton(x: Tensor) -> bool:
    """Tell whether Triton is installed and x lies on a GPU that it compiles half-precision products for."""
    if not x.is_cuda or importlib.util.find_spec("triton") is None:
        return False
    return torch.version.hip is not None or torch.cuda.get_device_capability(x.device) >= (8, 0)


def on_device(x: Tensor) -> AbstractContextManager[object]:
    """Make x's GPU the current one: Triton launches there."""
    return torch.cuda.device(x.device) if x.device.type == "cuda" else nullcontext()


def arch_of(device: torch.device) -> str:
    """Name the chip as launch_for wants it; a CPU can only mean Triton's interpreter."""
    if device.type != "cuda":
        return "interpreter"
    if torch.version.hip is not None:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm{major}{minor}"
