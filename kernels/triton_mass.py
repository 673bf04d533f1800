"""Attention mass of key blocks on the device: one product of queries and keys, and no softmax over rows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_sparse.kernels.device import arch_of, on_device
from dit_sparse.kernels.indices import BLOCK
from dit_sparse.kernels.launch import Launch, launch_for, padded_head_dim

LOG2_E = 1.4426950408889634
# Programs that keep the largest GPU busy for some rounds; with fewer row tiles, the key blocks are shared out.
WANTED_PROGRAMS = 2048
# The narrowest product of int8 that tensor cores have.
MIN_INT8_DIM = 32


def block_log_mass(
    q: Tensor,  # [B, R, H, D]
    k: Tensor,  # [B, S, Hkv, D]
    kv_start: Tensor,
    kv_len: Tensor,
    scale: float,
    kv_lengths: Tensor | None = None,
    q_scale: Tensor | None = None,
    k_scale: Tensor | None = None,
) -> Tensor:
    """Do what mass.block_log_mass does. CUDA-graph safe: shapes alone decide every size."""
    batch, rows, heads, _ = q.shape
    out = torch.empty((batch, heads, rows, kv_start.shape[0]), dtype=torch.float32, device=q.device)
    launch = _launch_for(q)
    tiles = triton.cdiv(rows, launch.block_m)
    _run(launch, q, k, None, out, None, None, tiles, kv_start, kv_len, scale, kv_lengths, q_scale, k_scale)
    return out


def block_mass(
    q: Tensor,  # [B, Sq, H, D]
    k: Tensor,  # [B, S, Hkv, D]
    lse: Tensor,  # fp32 [B, Sq, H]
    q_start: Tensor,
    q_len: Tensor,
    kv_start: Tensor,
    kv_len: Tensor,
    scale: float,
    kv_lengths: Tensor | None = None,
    q_scale: Tensor | None = None,
    k_scale: Tensor | None = None,
) -> Tensor:
    """Do what mass.block_mass does; parts of a query block are summed last, so that the result is deterministic."""
    batch, _, heads, _ = q.shape
    launch = _launch_for(q)
    parts = BLOCK // launch.block_m
    tiles = q_start.shape[0] * parts
    out = torch.empty((batch, heads, tiles, kv_start.shape[0]), dtype=torch.float32, device=q.device)
    _run(launch, q, k, lse, out, q_start, q_len, tiles, kv_start, kv_len, scale, kv_lengths, q_scale, k_scale)
    return out if parts == 1 else out.unflatten(2, (-1, parts)).sum(3)


def _launch_for(q: Tensor) -> Launch:
    """Take the attention kernel's launch: that one holds values and sums too, so what fits there fits here."""
    return launch_for(q.shape[-1], q.dtype, arch_of(q.device))


def _run(
    launch: Launch,
    q: Tensor,
    k: Tensor,
    lse: Tensor | None,
    out: Tensor,  # fp32 [B, H, R, K], or with lse [B, H, tiles, K]
    q_start: Tensor | None,
    q_len: Tensor | None,
    tiles: int,  # row tiles of a head
    kv_start: Tensor,
    kv_len: Tensor,
    scale: float,
    kv_lengths: Tensor | None,
    q_scale: Tensor | None,
    k_scale: Tensor | None,
) -> None:
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    batch, rows, heads, dim = q.shape
    key_blocks = kv_start.shape[0]
    entries = batch * heads * tiles
    span = triton.cdiv(key_blocks, min(key_blocks, triton.cdiv(WANTED_PROGRAMS, entries)))
    splits = triton.cdiv(key_blocks, span)
    padded = padded_head_dim(dim)
    with on_device(q):
        _masses[(entries * splits,)](
            q,
            k,
            q_scale,
            k_scale,
            lse,
            out,
            None if q_start is None else q_start.contiguous(),
            None if q_len is None else q_len.contiguous(),
            kv_start.contiguous(),
            kv_len.contiguous(),
            None if kv_lengths is None else kv_lengths.contiguous(),
            *q.stride()[:3],
            *k.stride()[:3],
            *((0, 0, 0) if q_scale is None else q_scale.stride()),
            *((0, 0, 0) if k_scale is None else k_scale.stride()),
            *((0, 0, 0) if lse is None else lse.stride()),
            heads,
            heads // k.shape[2],
            rows,
            tiles,
            key_blocks,
            span,
            splits,
            scale * LOG2_E,
            D=dim,
            D_PAD=max(padded, MIN_INT8_DIM) if q.dtype == torch.int8 else padded,
            BLOCK=BLOCK,
            BLOCK_M=launch.block_m,
            BLOCK_N=launch.block_n,
            PRECISION=launch.precision,
            num_warps=launch.num_warps,
            num_stages=launch.num_stages,
        )


@triton.jit
def _masses(
    q_ptr,
    k_ptr,
    q_scale_ptr,  # fp32 [B, R, H] or None
    k_scale_ptr,  # fp32 [B, S, Hkv] or None
    lse_ptr,  # fp32 [B, R, H], or None: write log masses of rows, not masses of tiles
    out_ptr,  # fp32 [B, H, R, K], with lse [B, H, tiles, K]
    q_start_ptr,  # int32 [Q], or None: tiles follow one another
    q_len_ptr,  # int32 [Q] or None
    kv_start_ptr,
    kv_len_ptr,
    kv_lengths_ptr,  # int32 [B] or None
    q_stride_b,
    q_stride_s,
    q_stride_h,
    k_stride_b,
    k_stride_s,
    k_stride_h,
    q_scale_stride_b,
    q_scale_stride_s,
    q_scale_stride_h,
    k_scale_stride_b,
    k_scale_stride_s,
    k_scale_stride_h,
    lse_stride_b,
    lse_stride_s,
    lse_stride_h,
    heads,
    group,  # query heads per key head
    rows,
    tiles,
    key_blocks,
    span,  # key blocks of one program
    splits,
    scale_log2,  # scale * log2(e): exponentials are powers of two
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Multiply one tile of rows with the keys of some blocks; tiles that share keys follow one another."""
    SPLIT_M: tl.constexpr = BLOCK // BLOCK_M
    SPLIT_N: tl.constexpr = BLOCK // BLOCK_N
    pid = tl.program_id(0)
    tile = pid % tiles
    split = (pid // tiles) % splits
    head_index = pid // (tiles * splits)
    batch = (head_index // heads).to(tl.int64)
    head = (head_index % heads).to(tl.int64)
    kv_head = head // group

    first_row = tile * BLOCK_M
    rows_left = rows - first_row
    if q_start_ptr is not None:
        part = (tile % SPLIT_M) * BLOCK_M
        first_row = tl.load(q_start_ptr + tile // SPLIT_M) + part
        rows_left = tl.load(q_len_ptr + tile // SPLIT_M) - part
    lane = tl.arange(0, BLOCK_M)
    key = tl.arange(0, BLOCK_N)
    column = tl.arange(0, D_PAD)
    there = lane < rows_left
    q_base = q_ptr + batch * q_stride_b + head * q_stride_h + first_row.to(tl.int64) * q_stride_s
    q_mask = there[:, None] & (column[None, :] < D)
    q = tl.load(q_base + (lane[:, None] * q_stride_s + column[None, :]), mask=q_mask, other=0)
    row_scale = tl.zeros([BLOCK_M], tl.float32) + scale_log2
    if q_scale_ptr is not None:
        scale_base = q_scale_ptr + batch * q_scale_stride_b + head * q_scale_stride_h
        scale_base += first_row.to(tl.int64) * q_scale_stride_s
        row_scale *= tl.load(scale_base + lane * q_scale_stride_s, mask=there, other=0.0)
    if lse_ptr is not None:
        lse_base = lse_ptr + batch * lse_stride_b + head * lse_stride_h + first_row.to(tl.int64) * lse_stride_s
        level = tl.load(lse_base + lane * lse_stride_s, mask=there, other=float("-inf")) * 1.4426950408889634
        level = tl.where(level == float("-inf"), float("inf"), level)  # such a row weighs nothing
        out_line = out_ptr + (head_index.to(tl.int64) * tiles + tile) * key_blocks
    else:
        out_lines = out_ptr + (head_index.to(tl.int64) * rows + first_row + lane) * key_blocks
    k_base = k_ptr + batch * k_stride_b + kv_head * k_stride_h
    limit = 2147483647
    if kv_lengths_ptr is not None:
        limit = tl.load(kv_lengths_ptr + batch)

    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    first_block = split * span
    for step in tl.range(first_block * SPLIT_N, tl.minimum(first_block + span, key_blocks) * SPLIT_N):
        block = step // SPLIT_N
        start = tl.load(kv_start_ptr + block)
        keys_left = tl.minimum(tl.load(kv_len_ptr + block), limit - start) - (step % SPLIT_N) * BLOCK_N
        key_start = (start + (step % SPLIT_N) * BLOCK_N).to(tl.int64)
        k_mask = (key[:, None] < keys_left) & (column[None, :] < D)
        k_rows = k_base + key_start * k_stride_s
        k = tl.load(k_rows + (key[:, None] * k_stride_s + column[None, :]), mask=k_mask, other=0)
        if k_scale_ptr is not None:
            k_scale_rows = k_scale_ptr + batch * k_scale_stride_b + kv_head * k_scale_stride_h
            k_scale_rows += key_start * k_scale_stride_s
            key_scale = tl.load(k_scale_rows + key * k_scale_stride_s, mask=key < keys_left, other=0.0)
            logits = tl.dot(q, k.T, out_dtype=tl.int32).to(tl.float32) * row_scale[:, None] * key_scale[None, :]
        else:
            logits = tl.dot(q, k.T, input_precision=PRECISION) * row_scale[:, None]
        logits = tl.where(key[None, :] < keys_left, logits, float("-inf"))
        begins = step % SPLIT_N == 0
        top = tl.where(begins, float("-inf"), top)
        total = tl.where(begins, 0.0, total)
        ends = step % SPLIT_N == SPLIT_N - 1
        if lse_ptr is not None:
            total += tl.sum(tl.math.exp2(logits - level[:, None]), 1)
            tl.store(out_line + block, tl.sum(total, 0), mask=ends)
        else:
            new_top = tl.maximum(top, tl.max(logits, 1))
            # Rows that have seen no key yet keep -inf, and -inf - -inf would be NaN.
            shift = tl.where(new_top == float("-inf"), 0.0, new_top)
            total = total * tl.math.exp2(top - shift) + tl.sum(tl.math.exp2(logits - shift[:, None]), 1)
            top = new_top
            tl.store(out_lines + block, (top + tl.math.log2(total)) * 0.6931471805599453, mask=there & ends)
