"""What a reader needs to know of a machine to trust or repeat a figure."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
from typing import Any

import torch

PACKAGES = ("torch", "triton", "diffusers", "transformers", "accelerate", "numpy", "gradio", "flash-attn-4")


def environment() -> dict[str, Any]:
    """Return versions, devices and the backends that can run here, each refusal with its reason."""
    found: dict[str, Any] = {
        "dit-sparse": _version("dit-sparse") or "not installed (run from a checkout)",
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "packages": {name: _version(name) or "not installed" for name in PACKAGES},
        "cpu": f"{_cpu_name()}, {os.cpu_count()} cores, {torch.get_num_threads()} torch threads",
        "gpu": None,
    }
    if torch.cuda.is_available():
        device = torch.cuda.get_device_properties(0)
        found["gpu"] = f"{torch.cuda.device_count()} × {device.name}, {device.total_memory / 2**30:.0f} GiB"
        found["compute"] = f"sm_{device.major}{device.minor}"
        found["cuda"] = f"{torch.version.cuda or torch.version.hip}, driver {_driver() or 'unknown'}"
    found["backends"] = backends()
    return found


def backends() -> dict[str, str]:
    """Say for each kernel backend whether it takes a small call on this machine, or why not."""
    from dit_sparse.kernels.backends import BACKENDS, explain
    from dit_sparse.kernels.indices import random_indices

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    q = torch.zeros(1, 256, 1, 64, device=device, dtype=dtype)
    refused = {r.name: r.reason for r in explain(q, q, q, random_indices(1, 1, [256], [256]).to(device))}
    return {name: refused.get(name, f"runs on {device}") for name in BACKENDS}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def _driver() -> str | None:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    query = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.splitlines()[0].strip() if done.returncode == 0 and done.stdout else None
