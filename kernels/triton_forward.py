"""Portable Triton backend: block-sparse attention forward over compacted lists, with no host sync."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from dit_sparse.kernels.device import arch_of, on_device
from dit_sparse.kernels.indices import BLOCK, BlockIndices
from dit_sparse.kernels.launch import Launch, launch_for, padded_head_dim
from dit_sparse.kernels.lists import BlockLists, has_partial
from dit_sparse.kernels.pool import log_counts, pool_blocks
from dit_sparse.kernels.triton_attend import attend, lost, natural_lse
from dit_sparse.kernels.triton_lists import compact

MAX_HEAD_DIM = 128
LOG2_E = 1.4426950408889634
TMA_ALIGN_BYTES = 16


def refusal(q: Tensor) -> str | None:
    """Say why this machine or head_dim cannot run the kernel, or return None."""
    if q.shape[-1] > MAX_HEAD_DIM:
        return f"head_dim must be at most {MAX_HEAD_DIM}, got {q.shape[-1]}"
    if _interpreted():
        return None
    if q.device.type != "cuda":
        return f"tensors must be on a GPU, got {q.device}"
    if torch.version.hip is None and torch.cuda.get_device_capability(q.device) < (8, 0):
        return f"compute capability must be at least 8.0, got {torch.cuda.get_device_capability(q.device)}"
    return None


@dataclass(frozen=True, eq=False)
class Means:
    """Hold what stands for the key blocks that a query block does not visit."""

    k: Tensor  # [B, K, Hkv, D] in the dtype of q, contiguous
    v: Tensor  # the same
    log_counts: Tensor  # fp32 [B, K]: log of the visible keys, -inf for none


def attention(
    q: Tensor,  # [B, Sq, H, D], D contiguous
    k: Tensor,  # [B, Sk, Hkv, D]
    v: Tensor,  # [B, Sk, Hkv, D]
    indices: BlockIndices,
    scale: float,
    kv_lengths: Tensor | None,  # int32 [B]
    compensate: bool = False,
    launch: Launch | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute out [B, Sq, H, D] in q.dtype, the LSE and that of the visited blocks alone, both fp32 [B, Sq, H].

    compensate lets the means of the other blocks stand for them; launch None takes the heuristic.
    """
    with on_device(q):
        lists = compact(indices, kv_lengths)
        means = block_means(k, v, indices, kv_lengths) if compensate else None
        return attend_lists(q, k, v, indices, lists, scale, kv_lengths, launch, means)


def block_means(k: Tensor, v: Tensor, indices: BlockIndices, kv_lengths: Tensor | None) -> Means:
    """Average the visible keys and values of every key block."""
    start, length = indices.kv_start, indices.kv_len
    mean_k, mean_v = (pool_blocks(x, start, length, kv_lengths, x.dtype).contiguous() for x in (k, v))
    return Means(mean_k, mean_v, log_counts(start, length, kv_lengths, k.shape[0]).contiguous())


def attend_lists(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: BlockIndices,  # its blocks and masks are read, its bitmaps only with means
    lists: BlockLists,
    scale: float,
    kv_lengths: Tensor | None = None,
    launch: Launch | None = None,
    means: Means | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Do what attention() does, from lists and means that exist already."""
    batch, q_tokens, heads, head_dim = q.shape
    compensate = means is not None
    partial = has_partial(indices, k.shape[1], kv_lengths)
    if launch is None:
        launch = launch_for(head_dim, q.dtype, arch_of(q.device), compensate, partial)
    tma = launch.tma and _fits_tma(k) and _fits_tma(v)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((batch, q_tokens, heads), dtype=torch.float32, device=q.device)
    computed_lse = torch.empty(lse.shape, dtype=torch.float32, device=q.device) if compensate else lse
    padded = padded_head_dim(head_dim)
    with on_device(q):
        _forward[(batch * heads * indices.query_blocks * (BLOCK // launch.block_m),)](
            q,
            k,
            v,
            _descriptor(k, launch.block_n, padded) if tma else None,
            _descriptor(v, launch.block_n, padded) if tma else None,
            None if means is None else means.k,
            None if means is None else means.v,
            None if means is None else means.log_counts,
            out,
            lse,
            computed_lse,
            lists.blocks,
            lists.tiles,
            indices.masks,
            lists.full_count,
            lists.partial_count,
            lists.row_of,
            indices.head_of,
            indices.bits,
            indices.q_start,
            indices.q_len,
            indices.kv_start,
            indices.kv_len,
            kv_lengths,
            *q.stride()[:3],
            *k.stride()[:3],
            *v.stride()[:3],
            *out.stride()[:3],
            *lse.stride()[:2],
            heads,
            heads // k.shape[2],
            indices.query_blocks,
            indices.key_blocks,
            lists.blocks.shape[2],
            scale * LOG2_E,
            D=head_dim,
            D_PAD=padded,
            BLOCK=BLOCK,
            BLOCK_M=launch.block_m,
            BLOCK_N=launch.block_n,
            PARTIAL=partial,
            RAGGED=kv_lengths is not None or k.shape[1] != BLOCK * indices.key_blocks,
            COMPENSATE=compensate,
            ONLINE=q.dtype == torch.float16 or not launch.keep,
            PRECISION=launch.precision,
            num_warps=launch.num_warps,
            num_stages=launch.num_stages,
        )
    return out, lse, computed_lse


def _interpreted() -> bool:
    """Tell whether Triton runs its interpreter, in which these kernels take CPU tensors."""
    return not isinstance(_forward, triton.JITFunction)


def _fits_tma(x: Tensor) -> bool:
    """Tell whether a tensor descriptor can read x: 16-byte base and strides."""
    size = x.element_size()
    return x.data_ptr() % TMA_ALIGN_BYTES == 0 and all(
        stride * size % TMA_ALIGN_BYTES == 0 and stride > 0 for stride in x.stride()[:3]
    )


def _descriptor(x: Tensor, block_n: int, padded: int) -> TensorDescriptor:
    """Describe x [B, S, H, D] as tiles of one head: none reads another head, and lanes past S or D are 0."""
    by_head = x.transpose(1, 2)
    return TensorDescriptor(by_head, list(by_head.shape), list(by_head.stride()), [1, 1, block_n, padded])


@triton.jit
def _forward(
    q_ptr,
    k_ptr,
    v_ptr,
    k_desc,  # or None
    v_desc,  # or None
    mean_k_ptr,  # [B, K, Hkv, D] or None
    mean_v_ptr,  # [B, K, Hkv, D] or None
    log_counts_ptr,  # fp32 [B, K] or None
    out_ptr,
    lse_ptr,
    computed_lse_ptr,  # strides of lse
    blocks_ptr,  # int16 [R, Q, list_width]
    tiles_ptr,  # int16 [R, Q, list_width] or None
    masks_ptr,  # int32 [M, 128, 4] or None
    full_count_ptr,  # int32 [R, Q]
    partial_count_ptr,  # int32 [R, Q]
    row_of_ptr,  # int32 [B*H]: row of R
    head_of_ptr,  # int32 [B*H]: row of U
    bits_ptr,  # int32 [U, Q, ceil(K/32)]
    q_start_ptr,
    q_len_ptr,
    kv_start_ptr,
    kv_len_ptr,
    kv_lengths_ptr,  # int32 [B] or None
    q_stride_b,
    q_stride_s,
    q_stride_h,
    k_stride_b,
    k_stride_s,
    k_stride_h,
    v_stride_b,
    v_stride_s,
    v_stride_h,
    out_stride_b,
    out_stride_s,
    out_stride_h,
    lse_stride_b,
    lse_stride_s,
    heads,
    group,  # query heads per key head
    query_blocks,
    key_blocks,
    list_width,
    scale_log2,  # scale * log2(e): the softmax runs in powers of two
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PARTIAL: tl.constexpr,  # some list may hold partial blocks
    RAGGED: tl.constexpr,  # some partial block may have fewer than 128 visible keys
    COMPENSATE: tl.constexpr,  # the means of key blocks that are not visited stand for them
    ONLINE: tl.constexpr,  # with a running maximum: fp16, and wherever the launch does not keep the shift
    PRECISION: tl.constexpr,
):
    """Compute BLOCK_M queries of one head. Heads follow one another, so that one head's K and V stay in L2."""
    SPLIT_M: tl.constexpr = BLOCK // BLOCK_M
    pid = tl.program_id(0)
    query_block = (pid // SPLIT_M) % query_blocks
    head_index = pid // (SPLIT_M * query_blocks)
    part = (pid % SPLIT_M) * BLOCK_M
    batch = head_index // heads
    head = head_index % heads
    kv_head = head // group
    batch64 = batch.to(tl.int64)
    k_base = k_ptr + batch64 * k_stride_b + kv_head.to(tl.int64) * k_stride_h
    v_base = v_ptr + batch64 * v_stride_b + kv_head.to(tl.int64) * v_stride_h

    lane = tl.arange(0, BLOCK_M)
    column = tl.arange(0, D_PAD)
    start = tl.load(q_start_ptr + query_block) + part
    rows_left = tl.load(q_len_ptr + query_block) - part
    q_rows = q_ptr + batch64 * q_stride_b + head.to(tl.int64) * q_stride_h + start.to(tl.int64) * q_stride_s
    stored = (lane[:, None] < rows_left) & (column[None, :] < D)
    q = tl.load(q_rows + (lane[:, None] * q_stride_s + column[None, :]), mask=stored, other=0.0)

    entry = tl.load(row_of_ptr + head_index).to(tl.int64) * query_blocks + query_block
    bits_row = tl.load(head_of_ptr + head_index).to(tl.int64) * query_blocks + query_block
    keys = (k_base, v_base, k_desc, v_desc, k_stride_s, v_stride_s, batch, kv_head, group)
    lists = (blocks_ptr, tiles_ptr, full_count_ptr, partial_count_ptr, entry, list_width)
    blocks = (kv_start_ptr, kv_len_ptr, kv_lengths_ptr, masks_ptr)
    means = (mean_k_ptr, mean_v_ptr, log_counts_ptr, bits_ptr + bits_row * tl.cdiv(key_blocks, 32), heads, key_blocks)

    acc, total, top, computed, computed_top = attend(
        q, part + lane, keys, lists, blocks, means, scale_log2,
        D, D_PAD, BLOCK_N, BLOCK, PARTIAL, RAGGED, COMPENSATE, ONLINE, PRECISION,
    )  # fmt: skip
    if not ONLINE:
        visited = tl.load(full_count_ptr + entry) + tl.load(partial_count_ptr + entry) > 0
        again = lost(computed) & visited
        if COMPENSATE:
            again = again | lost(total)
        if tl.sum((again & (lane < rows_left)).to(tl.int32), 0) > 0:
            acc, total, top, computed, computed_top = attend(
                q, part + lane, keys, lists, blocks, means, scale_log2,
                D, D_PAD, BLOCK_N, BLOCK, PARTIAL, RAGGED, COMPENSATE, True, PRECISION,
            )  # fmt: skip
    lse_place = batch64 * lse_stride_b + (start + lane).to(tl.int64) * lse_stride_s + head
    if COMPENSATE:
        tl.store(computed_lse_ptr + lse_place, natural_lse(computed_top, computed), mask=lane < rows_left)
    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    out_rows = out_ptr + batch64 * out_stride_b + head.to(tl.int64) * out_stride_h + start.to(tl.int64) * out_stride_s
    tl.store(out_rows + (lane[:, None] * out_stride_s + column[None, :]), acc.to(out_ptr.dtype.element_ty), mask=stored)
    tl.store(lse_ptr + lse_place, natural_lse(top, total), mask=lane < rows_left)
