"""Attention mass of key blocks: for sampled query rows, and for whole query blocks under a given LSE."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dit_sparse.kernels.device import runs_triton
from dit_sparse.kernels.indices import BLOCK
from dit_sparse.kernels.pool import visible_counts

FAST_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.int8)
MAX_FAST_HEAD_DIM = 128
# Logits that the slow forms hold at a time.
CHUNK_LOGITS = 1 << 22


def block_log_mass(
    q: Tensor,  # [B, R, H, D]: any query rows
    k: Tensor,  # [B, S, Hkv, D], H % Hkv == 0
    kv_start: Tensor,  # int32 [K]
    kv_len: Tensor,  # int32 [K], 1..128
    scale: float,
    kv_lengths: Tensor | None = None,  # int32 [B]
    q_scale: Tensor | None = None,  # fp32 [B, R, H], with int8 q and k
    k_scale: Tensor | None = None,  # fp32 [B, S, Hkv]
) -> Tensor:
    """Take the log of each key block's unnormalised softmax mass per row, log sum exp(scale q.k): fp32 [B, H, R, K].

    A block without a visible key gives -inf. With int8 q and k, a logit is (q.k) * q_scale * k_scale * scale.

    Raises: ValueError or TypeError for tensors that do not fit each other.
    """
    _check(q, k, kv_start, kv_len, scale, kv_lengths, q_scale, k_scale)
    if _is_fast(q):
        from dit_sparse.kernels import triton_mass  # triton is not there on every system

        return triton_mass.block_log_mass(q, k, kv_start, kv_len, scale, kv_lengths, q_scale, k_scale)
    return slow_block_log_mass(q, k, kv_start, kv_len, scale, kv_lengths, q_scale, k_scale)


def block_mass(
    q: Tensor,  # [B, Sq, H, D]
    k: Tensor,  # [B, S, Hkv, D], H % Hkv == 0
    lse: Tensor,  # fp32 [B, Sq, H]; rows with -inf count for nothing
    q_start: Tensor,  # int32 [Q]
    q_len: Tensor,  # int32 [Q], 1..128
    kv_start: Tensor,  # int32 [K]
    kv_len: Tensor,  # int32 [K], 1..128
    scale: float,
    kv_lengths: Tensor | None = None,  # int32 [B]
    q_scale: Tensor | None = None,  # fp32 [B, Sq, H], with int8 q and k
    k_scale: Tensor | None = None,  # fp32 [B, S, Hkv]
) -> Tensor:
    """Sum exp(scale q.k - lse) over the rows and visible keys of every pair of blocks: fp32 [B, H, Q, K].

    Raises: ValueError or TypeError for tensors that do not fit each other.
    Paper: AdaSpa (arXiv 2502.21079), the search that reuses the LSE of an earlier step.
    """
    _check(q, k, kv_start, kv_len, scale, kv_lengths, q_scale, k_scale)
    _check_vector("q_start", q_start, q)
    _check_vector("q_len", q_len, q)
    if tuple(lse.shape) != tuple(q.shape[:3]):
        raise ValueError(f"lse must be [B, Sq, H] = {tuple(q.shape[:3])}, got {tuple(lse.shape)}")
    if _is_fast(q):
        from dit_sparse.kernels import triton_mass  # triton is not there on every system

        return triton_mass.block_mass(
            q, k, lse, q_start, q_len, kv_start, kv_len, scale, kv_lengths, q_scale, k_scale
        )  # fmt: skip
    return slow_block_mass(q, k, lse, q_start, q_len, kv_start, kv_len, scale, kv_lengths, q_scale, k_scale)


def slow_block_log_mass(
    q: Tensor,
    k: Tensor,
    kv_start: Tensor,
    kv_len: Tensor,
    scale: float,
    kv_lengths: Tensor | None = None,
    q_scale: Tensor | None = None,
    k_scale: Tensor | None = None,
) -> Tensor:
    """Do what block_log_mass does, some key blocks at a time; fp64 stays fp64."""
    batch, rows, heads, _ = q.shape
    queries = _real(q, q_scale).transpose(1, 2) * scale  # [B, H, R, D]
    keys = _real(k, k_scale)
    visible = visible_counts(kv_start, kv_len, kv_lengths, batch)
    out = queries.new_empty((batch, heads, rows, len(kv_start)))
    step = max(1, CHUNK_LOGITS // (batch * heads * rows * BLOCK))
    for first in range(0, len(kv_start), step):
        blocks = slice(first, first + step)
        logits = _logits(queries, keys, kv_start[blocks], visible[:, blocks])
        out[..., blocks] = logits.logsumexp(-1)
    return out


def slow_block_mass(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    q_start: Tensor,
    q_len: Tensor,
    kv_start: Tensor,
    kv_len: Tensor,
    scale: float,
    kv_lengths: Tensor | None = None,
    q_scale: Tensor | None = None,
    k_scale: Tensor | None = None,
) -> Tensor:
    """Do what block_mass does, one query block and some key blocks at a time; fp64 stays fp64."""
    batch, tokens, heads, _ = q.shape
    queries = _real(q, q_scale).transpose(1, 2) * scale  # [B, H, Sq, D]
    keys = _real(k, k_scale)
    visible = visible_counts(kv_start, kv_len, kv_lengths, batch)
    lane = torch.arange(BLOCK, device=q.device)
    level = lse.to(queries.dtype).transpose(1, 2)  # [B, H, Sq]
    level = level.masked_fill(level == -torch.inf, torch.inf)
    out = queries.new_empty((batch, heads, len(q_start), len(kv_start)))
    step = max(1, CHUNK_LOGITS // (batch * heads * BLOCK * BLOCK))
    for block in range(len(q_start)):
        token = (q_start[block] + lane).clamp(max=tokens - 1)
        shift = level[:, :, token].masked_fill(lane >= q_len[block], torch.inf)[..., None, None]  # [B, H, 128, 1, 1]
        for first in range(0, len(kv_start), step):
            blocks = slice(first, first + step)
            logits = _logits(queries[:, :, token], keys, kv_start[blocks], visible[:, blocks])
            out[:, :, block, blocks] = (logits - shift).exp().sum((2, 4))
    return out


def _logits(queries: Tensor, keys: Tensor, start: Tensor, visible: Tensor) -> Tensor:
    """Multiply queries [B, H, R, D] with keys [B, S, Hkv, D] of blocks [c]: [B, H, R, c, 128], -inf where hidden."""
    lane = torch.arange(BLOCK, device=keys.device)
    token = (start[:, None] + lane).clamp(max=keys.shape[1] - 1)
    chosen = keys[:, token].permute(0, 3, 1, 2, 4).repeat_interleave(queries.shape[1] // keys.shape[2], 1)
    logits = queries @ chosen.flatten(2, 3).transpose(-1, -2)
    hidden = lane >= visible[:, None, None, :, None]
    return logits.unflatten(-1, (-1, BLOCK)).masked_fill_(hidden, -torch.inf)


def _real(x: Tensor, x_scale: Tensor | None) -> Tensor:
    """Turn x [B, S, H, D] into what it stands for, in fp32 or, for fp64, in fp64."""
    if x_scale is not None:
        return x.float() * x_scale[..., None]
    return x if x.dtype == torch.float64 else x.float()


def _is_fast(q: Tensor) -> bool:
    return runs_triton(q) and q.dtype in FAST_DTYPES and q.shape[-1] <= MAX_FAST_HEAD_DIM


def _check(
    q: Tensor,
    k: Tensor,
    kv_start: Tensor,
    kv_len: Tensor,
    scale: float,
    kv_lengths: Tensor | None,
    q_scale: Tensor | None,
    k_scale: Tensor | None,
) -> None:
    for name, tensor in (("q", q), ("k", k)):
        if tensor.dim() != 4 or tensor.numel() == 0:
            raise ValueError(f"{name} must be [B, S, H, D] with at least one element, got {tuple(tensor.shape)}")
    if q.dtype != k.dtype or q.device != k.device:
        raise ValueError(f"q and k must agree in dtype and device, got {q.dtype} {q.device} and {k.dtype} {k.device}")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3] or q.shape[2] % k.shape[2]:
        raise ValueError(
            f"q and k must agree in batch and head_dim, and heads of q be a multiple of those of k, "
            f"got q={tuple(q.shape)}, k={tuple(k.shape)}"
        )
    if not 0.0 < scale < math.inf:
        raise ValueError(f"scale must be positive and finite, got {scale}")
    given = (q_scale is not None, k_scale is not None)
    if given != ((True, True) if q.dtype == torch.int8 else (False, False)):
        raise ValueError(f"q_scale and k_scale go with int8 q and k and only with them, got {given} for {q.dtype}")
    for name, factor, x in (("q_scale", q_scale, q), ("k_scale", k_scale, k)):
        if factor is not None and (tuple(factor.shape) != tuple(x.shape[:3]) or factor.dtype != torch.float32):
            raise ValueError(f"{name} must be float32 {tuple(x.shape[:3])}, got {factor.dtype} {tuple(factor.shape)}")
    _check_vector("kv_start", kv_start, q)
    _check_vector("kv_len", kv_len, q)
    if kv_lengths is not None:
        _check_vector("kv_lengths", kv_lengths, q)
        if kv_lengths.shape[0] != q.shape[0]:
            raise ValueError(f"kv_lengths must have one entry per batch={q.shape[0]}, got {kv_lengths.shape[0]}")


def _check_vector(name: str, tensor: Tensor, q: Tensor) -> None:
    if tensor.dim() != 1 or tensor.dtype != torch.int32 or tensor.device != q.device:
        raise ValueError(
            f"{name} must be an int32 vector on {q.device}, got {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"
        )
