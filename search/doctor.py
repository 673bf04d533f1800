"""Does each backend really work here: a tiny call against the float64 oracle."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dit_sparse.kernels.backends import BACKENDS, block_attention, explain
from dit_sparse.kernels.indices import random_indices

TOKENS = (300, 77)  # ragged video and text segments: neither divides into blocks
HEADS, HEAD_DIM = 2, 64
# worst absolute error against float64 on unit-normal inputs; outputs are of order 1
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3}


@dataclass(frozen=True)
class Finding:
    """Say what one backend did with one dtype on one device."""

    backend: str
    device: str
    dtype: str
    verdict: str  # "ok", "not here" or "WRONG"
    detail: str


def examine() -> list[Finding]:
    """Run every backend on every device that torch sees, in the dtypes that models use."""
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    return [
        _try(name, device, dtype)
        for device in devices
        for name in BACKENDS
        for dtype in ((torch.float32,) if device == "cpu" else tuple(TOLERANCE))
    ]


@torch.no_grad()
def _try(name: str, device: str, dtype: torch.dtype) -> Finding:
    generator = torch.Generator().manual_seed(0)
    shape = (1, sum(TOKENS), HEADS, HEAD_DIM)
    q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3))
    indices = random_indices(1, HEADS, TOKENS, TOKENS, density=0.5, partial=0.3)
    low = [x.to(dtype) for x in (q, k, v)]
    wanted, _ = block_attention(low[0].double(), low[1].double(), low[2].double(), indices, backend="reference")
    q, k, v, indices = low[0].to(device), low[1].to(device), low[2].to(device), indices.to(device)
    label = (name, device, str(dtype).removeprefix("torch."))
    refused = {r.name: r.reason for r in explain(q, k, v, indices)}
    if name in refused:
        return Finding(*label, "not here", refused[name])
    try:
        out, _ = block_attention(q, k, v, indices, backend=name)
        error = float((out.cpu().double() - wanted).abs().max())
    except Exception as failure:  # whatever a compiler or driver raises is the finding
        return Finding(*label, "WRONG", f"{type(failure).__name__}: {str(failure).splitlines()[0]}")
    good = error <= TOLERANCE[dtype]  # false for NaN
    return Finding(*label, "ok" if good else "WRONG", f"max error {error:.1e} (allowed {TOLERANCE[dtype]:.0e})")
