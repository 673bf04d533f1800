"""Scores of all pairs of blocks from their mean queries and keys."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_sparse.kernels.device import runs_triton
from dit_sparse.kernels.pool import log_counts


def block_scores(
    mean_q: Tensor,  # fp32 [B, Q, H, D]
    mean_k: Tensor,  # fp32 [B, K, Hkv, D], H % Hkv == 0
    start: Tensor,  # int32 [K]
    length: Tensor,  # int32 [K], 1..128
    scale: float,
    kv_lengths: Tensor | None = None,  # int32 [B]
) -> Tensor:
    """Score key blocks by scale * mean_q . mean_k + log(visible keys): fp32 [B, H, Q, K]; -inf where none is visible.

    Products keep the precision of fp32 whatever torch is told about tf32: near scores must not change places.

    Raises: ValueError or TypeError for tensors that do not fit each other.
    """
    _check(mean_q, mean_k, start, length, kv_lengths)
    if runs_triton(mean_q):
        from dit_sparse.kernels import triton_block_scores  # triton is not there on every system

        return triton_block_scores.block_scores(mean_q, mean_k, start, length, scale, kv_lengths)
    return slow_block_scores(mean_q, mean_k, start, length, scale, kv_lengths)


def slow_block_scores(
    mean_q: Tensor, mean_k: Tensor, start: Tensor, length: Tensor, scale: float, kv_lengths: Tensor | None = None
) -> Tensor:
    """Do what block_scores does, in plain torch."""
    mean_k = mean_k.repeat_interleave(mean_q.shape[2] // mean_k.shape[2], 2)
    counts = log_counts(start, length, kv_lengths, mean_q.shape[0])
    return torch.einsum("bqhd,bkhd->bhqk", mean_q * scale, mean_k) + counts[:, None, None]


def _check(mean_q: Tensor, mean_k: Tensor, start: Tensor, length: Tensor, kv_lengths: Tensor | None) -> None:
    (batch, blocks), shape = mean_k.shape[:2], tuple(mean_q.shape)
    if mean_q.dtype != torch.float32 or mean_k.dtype != torch.float32:
        raise TypeError(f"means must be float32, got {mean_q.dtype} and {mean_k.dtype}")
    if (shape[0], shape[3]) != (batch, mean_k.shape[3]) or shape[2] % mean_k.shape[2]:
        raise ValueError(f"means must be [B, Q, H, D] and [B, K, Hkv, D], got {shape} and {tuple(mean_k.shape)}")
    named = (("start", start, blocks), ("length", length, blocks), ("kv_lengths", kv_lengths, batch))
    for name, tensor, size in named:
        if tensor is not None and (tensor.dtype != torch.int32 or tuple(tensor.shape) != (size,)):
            raise ValueError(f"{name} must be int32 [{size}], got {tensor.dtype} {tuple(tensor.shape)}")
