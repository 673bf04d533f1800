"""Hopper backend: the host side of gluon_forward, which must be told where heads lie."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from dit_sparse.kernels.device import on_device
from dit_sparse.kernels.gluon_forward import forward
from dit_sparse.kernels.indices import BLOCK, BlockIndices
from dit_sparse.kernels.launch import HopperLaunch, hopper_launch_for
from dit_sparse.kernels.lists import BlockLists, has_partial
from dit_sparse.kernels.pool import log_counts, pool_blocks
from dit_sparse.kernels.triton_lists import compact

HEAD_DIMS = (64, 128)
LOG2_E = 1.4426950408889634
TMA_ALIGN_BYTES = 16
MOST_ROWS = 2**31 - 1  # coordinates of the copy engine are int32
# Entry registers of the kernel: what 384 threads share evenly; warp groups trade theirs from there.
ENTRY_REGISTERS = 168
CONSUMER_REGISTERS = 240
GL_DTYPES = {torch.float16: gl.float16, torch.bfloat16: gl.bfloat16}


def refusal(q: Tensor, k: Tensor, v: Tensor, indices: BlockIndices) -> str | None:
    """Say why this machine or these tensors cannot run the kernel, or return None."""
    if q.device.type != "cuda" or torch.version.hip is not None:
        return f"tensors must be on an NVIDIA GPU, got {q.device}"
    if torch.cuda.get_device_capability(q.device) != (9, 0):
        return f"compute capability must be 9.0, got {torch.cuda.get_device_capability(q.device)}"
    if q.dtype not in GL_DTYPES:
        return f"dtype must be float16 or bfloat16, got {str(q.dtype).removeprefix('torch.')}"
    if q.shape[-1] not in HEAD_DIMS:
        return f"head_dim must be one of {', '.join(map(str, HEAD_DIMS))}, got {q.shape[-1]}"
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.stride(-1) == 1 and plane_of(tensor) is None:
            return f"{name} must be one plane of rows for the copy engine, got strides {tuple(tensor.stride())}"
    return None


@dataclass(frozen=True)
class Plane:
    """See x [B, S, H, D] as rows of a matrix: token s of head h in batch b is D columns from (row, column) on.

    row = b * rows_b + h * rows_h + s, column = h * columns_h.
    """

    matrix: Tensor
    rows_b: int
    rows_h: int
    columns_h: int


def plane_of(x: Tensor) -> Plane | None:
    """Return x [B, S, H, D], D contiguous, as a plane, or None where strides or alignment do not allow it."""
    batch, tokens, heads, dim = x.shape
    stride_b, stride_s, stride_h, _ = x.stride()
    if x.data_ptr() % TMA_ALIGN_BYTES or stride_s * x.element_size() % TMA_ALIGN_BYTES or stride_s < dim:
        return None
    rows_b, rest = divmod(stride_b, stride_s) if batch > 1 else (tokens, 0)
    if rest:
        return None
    rows_h = columns_h = 0
    if heads > 1 and stride_h % stride_s == 0:
        rows_h = stride_h // stride_s
    elif heads > 1:
        columns_h = stride_h
    columns = (heads - 1) * columns_h + dim
    rows = (batch - 1) * rows_b + (heads - 1) * rows_h + tokens
    if columns > stride_s or rows > MOST_ROWS:
        return None
    return Plane(x.as_strided((rows, columns), (stride_s, 1)), rows_b, rows_h, columns_h)


def finite_values(v: Tensor, kv_lengths: Tensor | None) -> Tensor:
    """Make sure that tiles which reach past a short block meet tokens of this call alone: v itself, or a copy.

    Such values meet weights of 0, and 0 * NaN would be NaN. So hidden ones become 0, and v [B, S, H, D] is copied where
    it is a part of a longer sequence. A NaN or infinity among real values may still reach the rows of other heads.
    """
    if kv_lengths is not None:
        hidden = torch.arange(v.shape[1], device=v.device) >= kv_lengths[:, None]
        return v.masked_fill(hidden[:, :, None, None], 0.0)
    return v.contiguous() if _plane(v).matrix.numel() > v.numel() else v


def _plane(x: Tensor) -> Plane:
    plane = plane_of(x)
    if plane is None:
        raise ValueError(f"the hopper backend cannot read strides {tuple(x.stride())} of shape {tuple(x.shape)}")
    return plane


@dataclass(frozen=True, eq=False)
class Means:
    """Hold what stands for the key blocks that a query block does not visit, padded to whole tiles."""

    k: Tensor  # [B, Hkv, tiles * 128, D] in the dtype of q, contiguous
    v: Tensor  # the same
    log_counts: Tensor  # fp32 [B, tiles * 128]: log of the visible keys, -inf for none and for padding


def attention(
    q: Tensor,  # [B, Sq, H, D], D contiguous
    k: Tensor,  # [B, Sk, Hkv, D]
    v: Tensor,  # [B, Sk, Hkv, D]
    indices: BlockIndices,
    scale: float,
    kv_lengths: Tensor | None,  # int32 [B]
    compensate: bool = False,
    launch: HopperLaunch | None = None,
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
    padding = -indices.key_blocks % BLOCK
    mean_k, mean_v = (
        F.pad(pool_blocks(x, start, length, kv_lengths, x.dtype).transpose(1, 2), (0, 0, 0, padding)).contiguous()
        for x in (k, v)
    )
    counts = F.pad(log_counts(start, length, kv_lengths, k.shape[0]), (0, padding), value=-torch.inf)
    return Means(mean_k, mean_v, counts.contiguous())


def attend_lists(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: BlockIndices,
    lists: BlockLists,
    scale: float,
    kv_lengths: Tensor | None = None,
    launch: HopperLaunch | None = None,
    means: Means | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Do what attention() does, from lists and means that exist already."""
    batch, q_tokens, heads, head_dim = q.shape
    compensate = means is not None
    partial = has_partial(indices, k.shape[1], kv_lengths)
    launch = hopper_launch_for(head_dim, lists.tiles is not None or compensate) if launch is None else launch
    ragged = kv_lengths is not None or k.shape[1] != BLOCK * indices.key_blocks
    v = finite_values(v, kv_lengths) if ragged else v
    q_plane, k_plane, v_plane = _plane(q), _plane(k), _plane(v)
    layout = gl.NVMMASharedLayout.get_default_for([BLOCK, head_dim], GL_DTYPES[q.dtype])

    def describe(matrix: Tensor, rows: int = BLOCK) -> TensorDescriptor:
        return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), [rows, head_dim], layout)

    k_desc, v_desc = describe(k_plane.matrix), describe(v_plane.matrix)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((batch, q_tokens, heads), dtype=torch.float32, device=q.device)
    computed_lse = torch.empty(lse.shape, dtype=torch.float32, device=q.device) if compensate else lse
    total = batch * heads * indices.query_blocks
    programs = min(total, torch.cuda.get_device_properties(q.device).multi_processor_count)
    noted = torch.empty((programs, 2, triton.cdiv(total, programs)), dtype=torch.int32, device=q.device)
    with on_device(q):
        forward[(programs,)](
            describe(q_plane.matrix),
            k_desc,
            v_desc,
            k_desc if means is None else describe(means.k.flatten(0, 2)),
            v_desc if means is None else describe(means.v.flatten(0, 2)),
            describe(out.view(batch * q_tokens, heads * head_dim), BLOCK // 2),
            out,
            lse,
            computed_lse,
            lists.blocks,
            lists.tiles,
            None if lists.tiles is None else indices.masks,
            indices.head_of,
            lists.items,
            noted,
            indices.bits,
            None if means is None else means.log_counts,
            indices.q_start,
            indices.q_len,
            indices.kv_start,
            indices.kv_len,
            kv_lengths,
            q_plane.rows_b,
            q_plane.rows_h,
            q_plane.columns_h,
            k_plane.rows_b,
            k_plane.rows_h,
            k_plane.columns_h,
            v_plane.rows_b,
            v_plane.rows_h,
            v_plane.columns_h,
            total,
            indices.query_blocks,
            q_tokens,
            heads,
            heads // k.shape[2],
            lists.blocks.shape[2],
            indices.bits.shape[2],
            0 if means is None else means.k.shape[2] // BLOCK,
            scale * LOG2_E,
            D=head_dim,
            BLOCK=BLOCK,
            PARTIAL=partial,
            RAGGED=ragged,
            COMPENSATE=compensate,
            ONLINE=q.dtype == torch.float16,
            STAGES=launch.stages,
            TURNS=launch.turns,
            CONSUMER_REGISTERS=CONSUMER_REGISTERS,
            num_warps=4,
            maxnreg=ENTRY_REGISTERS,
            enable_fp_fusion=True,
        )
    return out, lse, computed_lse
