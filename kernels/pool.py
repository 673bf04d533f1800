"""Means over the tokens of every block: what estimates and compensation are made of."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_sparse.kernels.device import runs_triton
from dit_sparse.kernels.indices import BLOCK

# Elements that the slow form gathers at a time: few enough to stay out of the way of peak memory.
CHUNK_ELEMENTS = 1 << 24


def pool_blocks(
    x: Tensor,  # [B, S, H, D]; S may exceed the tokens of the blocks
    start: Tensor,  # int32 [K]
    length: Tensor,  # int32 [K], 1..128
    kv_lengths: Tensor | None = None,  # int32 [B]: tokens at index >= kv_lengths[b] do not count
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Average the visible tokens of every block, summed in fp32: [B, K, H, D]; a block without any gives 0.

    Raises: ValueError or TypeError for tensors that do not fit each other.
    """
    _check(x, start, length, kv_lengths)
    if runs_triton(x) and x.dtype != torch.float64:
        from dit_sparse.kernels import triton_pool  # triton is not there on every system

        return triton_pool.pool_blocks(x, start, length, kv_lengths, dtype)
    return slow_pool_blocks(x, start, length, kv_lengths, dtype)


def pool_both(
    q: Tensor,  # [B, Sq, H, D]
    k: Tensor,  # [B, S, Hkv, D]
    start: Tensor,  # int32 [K]
    length: Tensor,  # int32 [K], 1..128
    q_blocks: int,  # at most K: the first so many blocks tile the queries that are pooled
    kv_lengths: Tensor | None = None,  # int32 [B]: of k
) -> tuple[Tensor, Tensor]:
    """Average queries and keys that are cut alike, in fp32: [B, q_blocks, H, D] and [B, K, Hkv, D].

    Raises: ValueError or TypeError for tensors that do not fit each other.
    """
    _check(k, start, length, kv_lengths)
    if q.dim() != 4 or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3] or q.device != k.device:
        raise ValueError(
            f"q and k must be [B, S, H, D] with one B, D and device, got {tuple(q.shape)} on {q.device}, "
            f"{tuple(k.shape)} on {k.device}"
        )
    if not 1 <= q_blocks <= start.shape[0]:
        raise ValueError(f"q_blocks must be 1 to {start.shape[0]}, the blocks there are, got {q_blocks}")
    if runs_triton(q) and torch.float64 not in (q.dtype, k.dtype):
        from dit_sparse.kernels import triton_pool  # triton is not there on every system

        return triton_pool.pool_both(q, k, start, length, q_blocks, kv_lengths)
    return slow_pool_both(q, k, start, length, q_blocks, kv_lengths)


def slow_pool_both(
    q: Tensor, k: Tensor, start: Tensor, length: Tensor, q_blocks: int, kv_lengths: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Do what pool_both does, one tensor after the other."""
    mean_q = slow_pool_blocks(q, start[:q_blocks], length[:q_blocks])
    return mean_q, slow_pool_blocks(k, start, length, kv_lengths)


def slow_pool_blocks(
    x: Tensor, start: Tensor, length: Tensor, kv_lengths: Tensor | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Do what pool_blocks does, by gathering some blocks at a time; fp64 stays fp64."""
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    batch, tokens, heads, dim = x.shape
    out = torch.empty((batch, len(start), heads, dim), dtype=dtype, device=x.device)
    lane = torch.arange(BLOCK, device=x.device)
    visible = visible_counts(start, length, kv_lengths, batch)  # [B, K]
    step = max(1, CHUNK_ELEMENTS // (batch * BLOCK * heads * dim))
    for first in range(0, len(start), step):
        blocks = slice(first, first + step)
        token = (start[blocks, None] + lane).clamp(max=tokens - 1)  # [c, 128]
        hidden = lane >= visible[:, blocks, None]  # [B, c, 128]
        # What hidden tokens hold cannot matter, even if it is NaN.
        values = x[:, token].to(compute).masked_fill_(hidden[..., None, None], 0.0)
        out[:, blocks] = (values.sum(2) / visible[:, blocks, None, None].clamp(min=1)).to(dtype)
    return out


def log_counts(start: Tensor, length: Tensor, kv_lengths: Tensor | None, batch: int) -> Tensor:
    """Take the log of every block's visible tokens: fp32 [B, K]; -inf for none."""
    return visible_counts(start, length, kv_lengths, batch).float().log()


def visible_counts(start: Tensor, length: Tensor, kv_lengths: Tensor | None, batch: int) -> Tensor:
    """Count every block's tokens with index < kv_lengths[b]: int32 [B, K]."""
    if kv_lengths is None:
        return length.expand(batch, -1)
    return torch.minimum((kv_lengths[:, None] - start).clamp(min=0), length)


def _check(x: Tensor, start: Tensor, length: Tensor, kv_lengths: Tensor | None) -> None:
    if x.dim() != 4 or x.numel() == 0:
        raise ValueError(f"x must be [B, S, H, D] with at least one element, got shape {tuple(x.shape)}")
    if not x.is_floating_point():
        raise TypeError(f"x must be floating point, got {x.dtype}")
    if start.dim() != 1 or start.shape != length.shape:
        raise ValueError(
            f"start and length must be [K] both, got start={tuple(start.shape)}, length={tuple(length.shape)}"
        )
    if kv_lengths is not None and tuple(kv_lengths.shape) != (x.shape[0],):
        raise ValueError(f"kv_lengths must be [batch={x.shape[0]}], got {tuple(kv_lengths.shape)}")
    for name, tensor in (("start", start), ("length", length), ("kv_lengths", kv_lengths)):
        if tensor is None:
            continue
        if tensor.dtype != torch.int32:
            raise TypeError(f"{name} must be int32, got {tensor.dtype}")
        if tensor.device != x.device:
            raise ValueError(f"{name} and x must be on one device, got {tensor.device} and {x.device}")
