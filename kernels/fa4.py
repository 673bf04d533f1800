"""Peer backend: FlashAttention-4's CuTe kernels (PyPI flash-attn-4) over lists of full blocks."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import torch
from torch import Tensor

from dit_sparse.kernels.device import on_device
from dit_sparse.kernels.indices import BLOCK, BlockIndices
from dit_sparse.kernels.peer_lists import peer_lists, refuse_call

HEAD_DIMS = range(8, 129, 8)  # beyond 128 its key tile is no longer a 128-block


def refusal(
    q: Tensor, k: Tensor, v: Tensor, indices: BlockIndices, kv_lengths: Tensor | None, compensate: bool
) -> str | None:
    """Say why FlashAttention-4 cannot run this call, or return None."""
    if (reason := dense_refusal(q)) is not None:
        return reason
    if indices.partial_bits is not None:
        # Its masks are programs traced by CuTe per element; nothing there reads a stored tile.
        return "it reads no bit tiles: full blocks only"
    return refuse_call(indices, kv_lengths, compensate)


def dense_refusal(q: Tensor) -> str | None:
    """Say why it cannot even run dense attention on such tensors, or return None."""
    if q.device.type != "cuda":
        return f"tensors must be on a GPU, got {q.device}"
    if torch.version.hip is not None or torch.cuda.get_device_capability(q.device)[0] != 9:
        return "compute capability must be 9.x: elsewhere its query tiles are no 128-blocks"
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"dtype must be float16 or bfloat16, got {str(q.dtype).removeprefix('torch.')}"
    if q.shape[-1] not in HEAD_DIMS:
        return f"head_dim must be a multiple of 8 up to 128, got {q.shape[-1]}"
    if importlib.util.find_spec("flash_attn") is None:
        return "flash-attn-4 is not installed (pip install flash-attn-4)"
    try:
        _interface()
    except Exception as error:  # its compiler stack fails in many ways where versions do not fit
        return f"flash-attn-4 cannot be imported: {type(error).__name__}: {error}"
    return None


def attention(
    q: Tensor,  # [B, Sq, H, D]
    k: Tensor,  # [B, Sk, Hkv, D]
    v: Tensor,  # [B, Sk, Hkv, D]
    indices: BlockIndices,
    scale: float,
    kv_lengths: Tensor | None = None,  # must be None, see refusal
    compensate: bool = False,  # must be False
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute out [B, Sq, H, D] in q.dtype and the natural-log LSE twice, fp32 [B, Sq, H]."""
    assert kv_lengths is None, "refusal names it"
    assert not compensate, "refusal names it"
    assert indices.partial_bits is None, "refusal names them"
    return attend_blocks(q, k, v, block_lists(indices, q.shape[0]), scale)


def block_lists(indices: BlockIndices, batch: int) -> Any:
    """Make what its user makes once per mask."""
    lists = peer_lists(indices, batch)
    sparsity = importlib.import_module("flash_attn.cute.block_sparsity")
    # The lists of masked blocks must be there but are never read: their counts are 0.
    return sparsity.BlockSparseTensorsTorch(
        mask_block_cnt=torch.zeros_like(lists.full_count),
        mask_block_idx=lists.full,
        full_block_cnt=lists.full_count,
        full_block_idx=lists.full,
        block_size=(BLOCK, BLOCK),
    )


def attend_blocks(q: Tensor, k: Tensor, v: Tensor, lists: Any, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Do what attention() does, from lists that exist already; lists None is dense attention."""
    with on_device(q):
        out, lse = _interface().flash_attn_func(
            q, k, v, softmax_scale=scale, block_sparse_tensors=lists, return_lse=True
        )
    lse = lse.transpose(1, 2)
    return out, lse, lse


def _interface() -> Any:
    """Import it by name: kernels/ needs torch and Triton alone, and a peer may be absent."""
    return importlib.import_module("flash_attn.cute.interface")
