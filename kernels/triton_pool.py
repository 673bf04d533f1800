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
    columns = min(MAX_COLUMNS, triton.next_power_of_2(heads * dim))
    slabs = triton.cdiv(heads * dim, columns)
    with on_device(x):
        _pool[(batch * blocks * slabs,)](
            x,
            start.contiguous(),
            length.contiguous(),
            None if kv_lengths is None else kv_lengths.contiguous(),
            out,
            *x.stride()[:3],
            blocks,
            slabs,
            heads * dim,
            D=dim,
            ROWS=ROWS,
            COLUMNS=columns,
            num_warps=4,
        )
    return out


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
    blocks,
    slabs,
    width,  # H * D
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Average COLUMNS columns of H * D over one block; the slabs of a block follow one another, in memory too."""
    pid = tl.program_id(0)
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
