"""Means of blocks in one pass over memory."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_sparse.kernels.device import on_device

# 16 rows of 256 columns: 8 KB of half-precision reads in flight per program, in runs of 512 bytes.
ROWS = 16
MAX_COLUMNS = 256


def pool_blocks(
    x: Tensor,  # [B, S, H, D], any strides
    start: Tensor,  # int32 [K]
    length: Tensor,  # int32 [K]
    kv_lengths: Tensor | None = None,  # int32 [B]
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Do what pool.pool_blocks does. CUDA-graph safe: shapes alone decide every size."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    batch, _, heads, dim = x.shape
    blocks = start.shape[0]
    out = torch.empty((batch, blocks, heads, dim), dtype=dtype, device=x.device)
    columns = _columns(heads, dim)
    with on_device(x):
        _pool[(batch * blocks * triton.cdiv(heads * dim, columns),)](
            x,
            start.contiguous(),
            length.contiguous(),
            None if kv_lengths is None else kv_lengths.contiguous(),
            out,
            *x.stride()[:3],
            heads,
            blocks,
            D=dim,
            ROWS=ROWS,
            COLUMNS=columns,
            num_warps=4,
        )
    return out


def pool_both(
    q: Tensor,  # [B, Sq, H, D], any strides
    k: Tensor,  # [B, S, Hkv, D], any strides
    start: Tensor,  # int32 [K]
    length: Tensor,  # int32 [K]
    q_blocks: int,
    kv_lengths: Tensor | None = None,  # int32 [B]
) -> tuple[Tensor, Tensor]:
    """Do what pool.pool_both does, in one launch. CUDA-graph safe: shapes alone decide every size."""
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    (batch, _, heads, dim), kv_heads, blocks = q.shape, k.shape[2], start.shape[0]
    mean_q = torch.empty((batch, q_blocks, heads, dim), dtype=torch.float32, device=q.device)
    mean_k = torch.empty((batch, blocks, kv_heads, dim), dtype=torch.float32, device=q.device)
    columns = _columns(heads, dim)
    q_programs = batch * q_blocks * triton.cdiv(heads * dim, columns)
    with on_device(q):
        _pool_both[(q_programs + batch * blocks * triton.cdiv(kv_heads * dim, columns),)](
            q,
            k,
            start.contiguous(),
            length.contiguous(),
            None if kv_lengths is None else kv_lengths.contiguous(),
            mean_q,
            mean_k,
            *q.stride()[:3],
            *k.stride()[:3],
            heads,
            kv_heads,
            q_blocks,
            blocks,
            q_programs,
            D=dim,
            ROWS=ROWS,
            COLUMNS=columns,
            num_warps=4,
        )
    return mean_q, mean_k


def _columns(heads: int, dim: int) -> int:
    return min(MAX_COLUMNS, triton.next_power_of_2(heads * dim))


@triton.jit
def _pool(
    x_ptr,
    start_ptr,
    length_ptr,
    kv_lengths_ptr,  # int32 [B] or None
    out_ptr,  # [B, K, H, D], contiguous
    x_stride_b,
    x_stride_s,
    x_stride_h,
    heads,
    blocks,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Average COLUMNS columns of H * D over one block."""
    pid = tl.program_id(0)
    _average(pid, x_ptr, start_ptr, length_ptr, kv_lengths_ptr, out_ptr, x_stride_b, x_stride_s, x_stride_h, heads,
             blocks, D, ROWS, COLUMNS)  # fmt: skip


@triton.jit
def _pool_both(
    q_ptr,
    k_ptr,
    start_ptr,
    length_ptr,
    kv_lengths_ptr,  # int32 [B] or None: of k
    mean_q_ptr,  # [B, q_blocks, H, D], contiguous
    mean_k_ptr,  # [B, K, Hkv, D], contiguous
    q_stride_b,
    q_stride_s,
    q_stride_h,
    k_stride_b,
    k_stride_s,
    k_stride_h,
    heads,
    kv_heads,
    q_blocks,
    blocks,
    q_programs,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Do what _pool does: the first q_programs for q, the others for k."""
    pid = tl.program_id(0)
    if pid < q_programs:
        _average(pid, q_ptr, start_ptr, length_ptr, None, mean_q_ptr, q_stride_b, q_stride_s, q_stride_h, heads,
                 q_blocks, D, ROWS, COLUMNS)  # fmt: skip
    else:
        _average(pid - q_programs, k_ptr, start_ptr, length_ptr, kv_lengths_ptr, mean_k_ptr, k_stride_b, k_stride_s,
                 k_stride_h, kv_heads, blocks, D, ROWS, COLUMNS)  # fmt: skip


@triton.jit
def _average(
    pid,
    x_ptr,
    start_ptr,
    length_ptr,
    kv_lengths_ptr,
    out_ptr,
    x_stride_b,
    x_stride_s,
    x_stride_h,
    heads,
    blocks,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Average slab `pid`: the slabs of COLUMNS columns of one block follow one another, in memory too."""
    width = heads * D
    slabs = tl.cdiv(width, COLUMNS)
    slab = pid % slabs
    entry = pid // slabs
    block = entry % blocks
    batch = entry // blocks
    start = tl.load(start_ptr + block)
    visible = tl.load(length_ptr + block)
    if kv_lengths_ptr is not None:
        visible = tl.minimum(visible, tl.load(kv_lengths_ptr + batch) - start)
    column = slab * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < width
    lane = tl.arange(0, ROWS)
    base = x_ptr + batch.to(tl.int64) * x_stride_b + start.to(tl.int64) * x_stride_s
    place = (column // D).to(tl.int64) * x_stride_h + column % D
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, visible, ROWS):
        row = first + lane
        mask = (row[:, None] < visible) & inside[None, :]
        total += tl.load(base + (row[:, None] * x_stride_s + place[None, :]), mask=mask, other=0.0).to(tl.float32)
    mean = tl.sum(total, 0) / tl.maximum(visible, 1)
    tl.store(out_ptr + entry.to(tl.int64) * width + column, mean.to(out_ptr.dtype.element_ty), mask=inside)
