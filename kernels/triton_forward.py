"""Portable Triton backend: block-sparse attention forward over compacted lists, with no host sync."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from dit_sparse.kernels.indices import BLOCK, BlockIndices
from dit_sparse.kernels.launch import Launch, launch_for, padded_head_dim
from dit_sparse.kernels.lists import BlockLists, has_partial
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


def attention(
    q: Tensor,  # [B, Sq, H, D], D contiguous
    k: Tensor,  # [B, Sk, Hkv, D]
    v: Tensor,  # [B, Sk, Hkv, D]
    indices: BlockIndices,
    scale: float,
    kv_lengths: Tensor | None,  # int32 [B]
    launch: Launch | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute out [B, Sq, H, D] in q.dtype and the LSE, fp32 [B, Sq, H]; launch None takes the heuristic."""
    with _on_device(q):
        return attend_lists(q, k, v, indices, compact(indices, kv_lengths), scale, kv_lengths, launch)


def attend_lists(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: BlockIndices,  # its blocks and masks are read, its bitmaps are not
    lists: BlockLists,
    scale: float,
    kv_lengths: Tensor | None = None,
    launch: Launch | None = None,
) -> tuple[Tensor, Tensor]:
    """Do what attention() does, from lists that exist already."""
    batch, q_tokens, heads, head_dim = q.shape
    launch = launch_for(head_dim, q.dtype, _arch(q.device)) if launch is None else launch
    tma = launch.tma and _fits_tma(k) and _fits_tma(v)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((batch, q_tokens, heads), dtype=torch.float32, device=q.device)
    padded = padded_head_dim(head_dim)
    with _on_device(q):
        _forward[(batch * heads * indices.query_blocks * (BLOCK // launch.block_m),)](
            q,
            k,
            v,
            _descriptor(k, launch.block_n, padded) if tma else None,
            _descriptor(v, launch.block_n, padded) if tma else None,
            out,
            lse,
            lists.blocks,
            lists.tiles,
            indices.masks,
            lists.full_count,
            lists.partial_count,
            lists.row_of,
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
            lists.blocks.shape[2],
            scale * LOG2_E,
            D=head_dim,
            D_PAD=padded,
            BLOCK=BLOCK,
            BLOCK_M=launch.block_m,
            BLOCK_N=launch.block_n,
            PARTIAL=has_partial(indices, k.shape[1], kv_lengths),
            RAGGED=kv_lengths is not None or k.shape[1] != BLOCK * indices.key_blocks,
            PRECISION=launch.precision,
            num_warps=launch.num_warps,
            num_stages=launch.num_stages,
        )
    return out, lse


def _on_device(q: Tensor) -> AbstractContextManager[object]:
    """Make q's GPU the current one: Triton launches there."""
    return torch.cuda.device(q.device) if q.device.type == "cuda" else nullcontext()


def _interpreted() -> bool:
    """Tell whether Triton runs its interpreter, in which these kernels take CPU tensors."""
    return not isinstance(_forward, triton.JITFunction)


def _arch(device: torch.device) -> str:
    """Name the chip as launch_for wants it."""
    if device.type != "cuda":
        return "interpreter"
    if torch.version.hip is not None:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm{major}{minor}"


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
def _tile(
    base_ptr,  # of this batch and head
    desc,  # descriptor [B, H, S, D] or None
    batch,
    head,
    start,  # first token
    stride,
    rows_left,  # rows beyond it read as 0
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASK_ROWS: tl.constexpr,
):
    """Load one tile [BLOCK_N, D_PAD] of keys or values; lanes past D, and with MASK_ROWS past rows_left, are 0."""
    if desc is not None and not MASK_ROWS:
        return desc.load([batch, head, start, 0]).reshape(BLOCK_N, D_PAD)
    lane = tl.arange(0, BLOCK_N)
    column = tl.arange(0, D_PAD)
    pointers = base_ptr + start.to(tl.int64) * stride + (lane[:, None] * stride + column[None, :])
    if MASK_ROWS:
        if D == D_PAD:
            return tl.load(pointers, mask=lane[:, None] < rows_left, other=0.0)
        return tl.load(pointers, mask=(lane[:, None] < rows_left) & (column[None, :] < D), other=0.0)
    if D == D_PAD:
        return tl.load(pointers)
    return tl.load(pointers, mask=column[None, :] < D, other=0.0)


@triton.jit
def _forward(
    q_ptr,
    k_ptr,
    v_ptr,
    k_desc,  # or None
    v_desc,  # or None
    out_ptr,
    lse_ptr,
    blocks_ptr,  # int16 [R, Q, list_width]
    tiles_ptr,  # int16 [R, Q, list_width] or None
    masks_ptr,  # int32 [M, 128, 4] or None
    full_count_ptr,  # int32 [R, Q]
    partial_count_ptr,  # int32 [R, Q]
    row_of_ptr,  # int32 [B*H]
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
    list_width,
    scale_log2,  # scale * log2(e): the softmax runs in powers of two
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PARTIAL: tl.constexpr,  # some list may hold partial blocks
    RAGGED: tl.constexpr,  # some partial block may have fewer than 128 visible keys
    PRECISION: tl.constexpr,
):
    """Compute BLOCK_M queries of one head. Heads follow one another, so that one head's K and V stay in L2."""
    SPLIT_M: tl.constexpr = BLOCK // BLOCK_M
    SPLIT_N: tl.constexpr = BLOCK // BLOCK_N
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
    list_ptr = blocks_ptr + entry * list_width
    full = tl.load(full_count_ptr + entry)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, D_PAD], tl.float32)

    for step in tl.range(0, full * SPLIT_N):
        key_start = tl.load(kv_start_ptr + tl.load(list_ptr + step // SPLIT_N)) + (step % SPLIT_N) * BLOCK_N
        k = _tile(k_base, k_desc, batch, kv_head, key_start, k_stride_s, BLOCK_N, D, D_PAD, BLOCK_N, False)
        logits = tl.dot(q, k.T, input_precision=PRECISION)
        new_top = tl.maximum(top, tl.max(logits, 1) * scale_log2)
        weights = tl.math.exp2(logits * scale_log2 - new_top[:, None])
        rescale = tl.math.exp2(top - new_top)
        total = total * rescale + tl.sum(weights, 1)
        acc = acc * rescale[:, None]
        v = _tile(v_base, v_desc, batch, kv_head, key_start, v_stride_s, BLOCK_N, D, D_PAD, BLOCK_N, False)
        acc = tl.dot(weights.to(v.dtype), v, acc, input_precision=PRECISION)
        top = new_top

    if PARTIAL:
        list_ptr += full
        for step in tl.range(0, tl.load(partial_count_ptr + entry) * SPLIT_N):
            block = tl.load(list_ptr + step // SPLIT_N)
            first = (step % SPLIT_N) * BLOCK_N
            key_start = tl.load(kv_start_ptr + block) + first
            keys_left = BLOCK_N
            if RAGGED:
                keys_left = tl.load(kv_len_ptr + block) - first
                if kv_lengths_ptr is not None:
                    keys_left = tl.minimum(keys_left, tl.load(kv_lengths_ptr + batch) - key_start)
            k = _tile(k_base, k_desc, batch, kv_head, key_start, k_stride_s, keys_left, D, D_PAD, BLOCK_N, RAGGED)
            logits = tl.dot(q, k.T, input_precision=PRECISION) * scale_log2
            key = tl.arange(0, BLOCK_N)
            if RAGGED:
                logits = tl.where(key[None, :] < keys_left, logits, float("-inf"))
            if tiles_ptr is not None:
                tile = tl.load(tiles_ptr + entry * list_width + full + step // SPLIT_N)
                logits = tl.where(_seen(masks_ptr, tile, part + lane, first, BLOCK_N), logits, float("-inf"))
            new_top = tl.maximum(top, tl.max(logits, 1))
            # A row that has seen no key yet keeps -inf, and -inf - -inf would be NaN.
            shift = tl.where(new_top == float("-inf"), 0.0, new_top)
            weights = tl.math.exp2(logits - shift[:, None])
            rescale = tl.math.exp2(top - shift)
            total = total * rescale + tl.sum(weights, 1)
            acc = acc * rescale[:, None]
            v = _tile(v_base, v_desc, batch, kv_head, key_start, v_stride_s, keys_left, D, D_PAD, BLOCK_N, RAGGED)
            acc = tl.dot(weights.to(v.dtype), v, acc, input_precision=PRECISION)
            top = new_top

    empty = total == 0.0
    acc = acc / tl.where(empty, 1.0, total)[:, None]
    lse = tl.where(empty, float("-inf"), (top + tl.math.log2(tl.where(empty, 1.0, total))) * 0.6931471805599453)
    out_rows = out_ptr + batch64 * out_stride_b + head.to(tl.int64) * out_stride_h + start.to(tl.int64) * out_stride_s
    tl.store(out_rows + (lane[:, None] * out_stride_s + column[None, :]), acc.to(out_ptr.dtype.element_ty), mask=stored)
    lse_rows = lse_ptr + batch64 * lse_stride_b + start.to(tl.int64) * lse_stride_s + head
    tl.store(lse_rows + lane * lse_stride_s, lse, mask=lane < rows_left)


@triton.jit
def _seen(
    masks_ptr,  # int32 [M, 128, 4]
    tile,  # row of masks, or -1: everything is seen
    row,  # int32 [BLOCK_M]: query lanes of the 128-token block
    first,  # key lane of the first column
    BLOCK_N: tl.constexpr,
):
    """Read a bit tile as bool [BLOCK_M, BLOCK_N]: one word per row and 32 columns, not a load per bit."""
    words_ptr = masks_ptr + (tl.maximum(tile, 0).to(tl.int64) * 512 + first // 32) + row * 4
    column = tl.arange(0, BLOCK_N)[None, :]
    word = tl.load(words_ptr)[:, None]
    for index in tl.static_range(1, BLOCK_N // 32):
        word = tl.where(column // 32 == index, tl.load(words_ptr + index)[:, None], word)
    return (((word >> (column % 32)) & 1) != 0) | (tile < 0)
