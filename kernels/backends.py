"""The table of backends, the chooser that explains itself, and the two entry points to block-sparse attention."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dit_sparse.kernels import cpu, fa4, flex, reference
from dit_sparse.kernels.indices import BlockIndices

LOW_DTYPES = (torch.float16, torch.bfloat16, torch.float32)

# q, k, v, indices, scale, kv_lengths, compensate -> out, LSE, LSE of the visited blocks
Run = Callable[[Tensor, Tensor, Tensor, BlockIndices, float, "Tensor | None", bool], tuple[Tensor, Tensor, Tensor]]

# q, k, v, indices, kv_lengths, compensate -> reason or None
Refusal = Callable[[Tensor, Tensor, Tensor, BlockIndices, "Tensor | None", bool], "str | None"]


class NoBackendError(ValueError):
    """No backend can run this call."""


@dataclass(frozen=True)
class Rejected:
    """Say why a backend cannot run a call."""

    name: str
    reason: str


@dataclass(frozen=True)
class Backend:
    """Name one implementation; refusal gives the reason why it cannot run a call, or None."""

    name: str
    refusal: Refusal
    run: Run
    automatic: bool  # whether "auto" may pick it


def block_attention(
    q: Tensor,  # [B, Sq, H, D]
    k: Tensor,  # [B, Sk, Hkv, D], H % Hkv == 0
    v: Tensor,  # [B, Sk, Hkv, D]
    indices: BlockIndices,
    *,
    scale: float | None = None,
    kv_lengths: Tensor | None = None,  # int32 [B]: keys at kernel-order index >= kv_lengths[b] are invisible
    backend: str | Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Attend over the listed blocks only, forward only; scale defaults to 1 / sqrt(D).

    Returns out [B, Sq, H, D] in q.dtype and the natural-log LSE, fp32 [B, Sq, H] (fp64 where reference got fp64).
    A query without a visible key gets 0 and -inf.

    Raises: ValueError or TypeError for tensors that do not fit each other or that the backend refuses.
    """
    out, lse, _ = _attend(q, k, v, indices, scale, kv_lengths, backend, compensate=False)
    return out, lse


def compensated_attention(
    q: Tensor,  # [B, Sq, H, D]
    k: Tensor,  # [B, Sk, Hkv, D], H % Hkv == 0
    v: Tensor,  # [B, Sk, Hkv, D]
    indices: BlockIndices,
    *,
    scale: float | None = None,
    kv_lengths: Tensor | None = None,  # int32 [B]
    backend: str | Backend = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Attend over the listed blocks, and let the mean key and value of every other block stand for it.

    In the same softmax such a block weighs (visible keys) * exp(scale * q . mean key); a block without a visible key
    weighs nothing, and a block seen in part through a mask counts as visited. Means are taken in fp32 and rounded to
    q.dtype. Returns out and LSE as block_attention does, and the LSE of the visited blocks alone, fp32 [B, Sq, H]
    (-inf where a query visits nothing).

    Raises: what block_attention raises.
    Paper: Sol-Attn (arXiv 2607.24027), zero-order compensation
    """
    return _attend(q, k, v, indices, scale, kv_lengths, backend, compensate=True)


def explain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: BlockIndices,
    kv_lengths: Tensor | None = None,  # int32 [B]
    compensate: bool = False,
) -> list[Rejected]:
    """List the backends that cannot run this call, each with its reason."""
    call = (q, k, v, indices, kv_lengths, compensate)
    reasons = ((backend.name, backend.refusal(*call)) for backend in BACKENDS.values())
    return [Rejected(name, reason) for name, reason in reasons if reason is not None]


def choose(
    name: str | Backend,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: BlockIndices,
    kv_lengths: Tensor | None = None,  # int32 [B]
    compensate: bool = False,
) -> Backend:
    """Return the named backend, or for "auto" the first automatic one that can run this call.

    Raises: ValueError for an unknown name and where the named one refuses; NoBackendError where, for "auto", all do.
    """
    if isinstance(name, Backend):  # chosen for this call before
        return name
    call = (q, k, v, indices, kv_lengths, compensate)
    if name == "auto":
        for backend in BACKENDS.values():
            if backend.automatic and backend.refusal(*call) is None:
                return backend
        reasons = "; ".join(f"{rejected.name}: {rejected.reason}" for rejected in explain(*call))
        raise NoBackendError(f"no backend can run this call: {reasons} (reference, flex and fa4 run only by name)")
    if name not in BACKENDS:
        raise ValueError(f'backend must be one of {", ".join(("auto", *BACKENDS))}, got "{name}"')
    reason = BACKENDS[name].refusal(*call)
    if reason is not None:
        raise ValueError(f"backend {name} cannot run this call: {reason}")
    return BACKENDS[name]


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: BlockIndices,
    scale: float | None,
    kv_lengths: Tensor | None,
    backend: str | Backend,
    compensate: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Check everything, choose the backend and run it."""
    _check_tensors(q, k, v, kv_lengths)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if not 0.0 < scale < math.inf:
        raise ValueError(f"scale must be positive and finite, got {scale}")
    indices.validate(q, k, v)
    chosen = choose(backend, q, k, v, indices, kv_lengths, compensate)
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    return chosen.run(q, k, v, indices, scale, kv_lengths, compensate)


def _check_tensors(q: Tensor, k: Tensor, v: Tensor, kv_lengths: Tensor | None) -> None:
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.dim() != 4:
            raise ValueError(f"{name} must be [B, S, H, D], got shape {tuple(tensor.shape)}")
        if tensor.numel() == 0:
            raise ValueError(f"{name} must hold at least one element, got shape {tuple(tensor.shape)}")
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must be floating point, got {tensor.dtype}")
    if not q.dtype == k.dtype == v.dtype:
        raise TypeError(f"q, k and v must have one dtype, got q={q.dtype}, k={k.dtype}, v={v.dtype}")
    if not q.device == k.device == v.device:
        raise ValueError(f"q, k and v must be on one device, got q={q.device}, k={k.device}, v={v.device}")
    if k.shape != v.shape:
        raise ValueError(f"k and v must have one shape, got k={tuple(k.shape)}, v={tuple(v.shape)}")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"q and k must agree in batch and head_dim, got q={tuple(q.shape)}, k={tuple(k.shape)}")
    if q.shape[2] % k.shape[2] != 0:
        raise ValueError(f"heads of q must be a multiple of heads of k, got q={q.shape[2]}, k={k.shape[2]}")
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        raise ValueError("attention is forward only, got inputs that require grad; call it under torch.no_grad()")
    if kv_lengths is None:
        return
    if tuple(kv_lengths.shape) != (q.shape[0],) or kv_lengths.dtype != torch.int32:
        raise ValueError(
            f"kv_lengths must be int32 [batch={q.shape[0]}], got {kv_lengths.dtype} {tuple(kv_lengths.shape)}"
        )
    if kv_lengths.device != q.device:
        raise ValueError(f"kv_lengths and q must be on one device, got {kv_lengths.device} and {q.device}")


def _refuse_dtype(q: Tensor) -> str | None:
    if q.dtype not in LOW_DTYPES:
        return f"dtype must be float16, bfloat16 or float32, got {str(q.dtype).removeprefix('torch.')}"
    return None


def _refuse_reference(
    q: Tensor, k: Tensor, v: Tensor, indices: BlockIndices, kv_lengths: Tensor | None, compensate: bool
) -> str | None:
    return None


def _refuse_cpu(
    q: Tensor, k: Tensor, v: Tensor, indices: BlockIndices, kv_lengths: Tensor | None, compensate: bool
) -> str | None:
    if q.device.type != "cpu":
        return f"tensors must be on the CPU, got {q.device}"
    return _refuse_dtype(q)


def _refuse_triton(
    q: Tensor, k: Tensor, v: Tensor, indices: BlockIndices, kv_lengths: Tensor | None, compensate: bool
) -> str | None:
    if (reason := _refuse_without_triton()) is not None:
        return reason
    from dit_sparse.kernels import triton_forward  # triton is not there on every system

    return triton_forward.refusal(q) or _refuse_dtype(q)


def _refuse_without_triton() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install triton; it exists for Linux only)"
    return None


def _run_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: BlockIndices,
    scale: float,
    kv_lengths: Tensor | None,
    compensate: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    from dit_sparse.kernels import triton_forward  # triton is not there on every system

    return triton_forward.attention(q, k, v, indices, scale, kv_lengths, compensate)


def _refuse_hopper(
    q: Tensor, k: Tensor, v: Tensor, indices: BlockIndices, kv_lengths: Tensor | None, compensate: bool
) -> str | None:
    if q.device.type != "cuda":  # said before anything is imported
        return f"tensors must be on a GPU, got {q.device}"
    if (reason := _refuse_without_triton()) is not None:
        return reason
    try:
        from dit_sparse.kernels import hopper  # triton may be there without gluon
    except ImportError:
        return "gluon is not in this triton"
    return hopper.refusal(q, k, v, indices)


def _run_hopper(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: BlockIndices,
    scale: float,
    kv_lengths: Tensor | None,
    compensate: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    from dit_sparse.kernels import hopper  # triton may be there without gluon

    return hopper.attention(q, k, v, indices, scale, kv_lengths, compensate)


BACKENDS: dict[str, Backend] = {
    "hopper": Backend("hopper", _refuse_hopper, _run_hopper, automatic=True),
    "triton": Backend("triton", _refuse_triton, _run_triton, automatic=True),
    "cpu": Backend("cpu", _refuse_cpu, cpu.attention, automatic=True),
    "reference": Backend("reference", _refuse_reference, reference.attention, automatic=False),
    "flex": Backend("flex", flex.refusal, flex.attention, automatic=False),
    "fa4": Backend("fa4", fa4.refusal, fa4.attention, automatic=False),
}
