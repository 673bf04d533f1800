"""Scores of pairs of blocks in one launch, the log of the visible keys included."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_sparse.kernels.device import arch_of, on_device
from dit_sparse.kernels.launch import launch_for

TILE = 64
# Head dimensions of one step: two tiles of fp32 then take 16 KB.
STEP = 32


def block_scores(
    mean_q: Tensor,  # fp32 [B, Q, H, D]
    mean_k: Tensor,  # fp32 [B, K, Hkv, D]
    start: Tensor,  # int32 [K]
    length: Tensor,  # int32 [K]
    scale: float,
    kv_lengths: Tensor | None = None,  # int32 [B]
) -> Tensor:
    """Do what block_scores.block_scores does. CUDA-graph safe: shapes alone decide every size."""
    batch, q_blocks, heads, dim = mean_q.shape
    k_blocks, kv_heads = mean_k.shape[1:3]
    out = torch.empty((batch, heads, q_blocks, k_blocks), dtype=torch.float32, device=mean_q.device)
    with on_device(mean_q):
        _scores[(triton.cdiv(k_blocks, TILE), triton.cdiv(q_blocks, TILE), batch * heads)](
            mean_q.contiguous(),
            mean_k.contiguous(),
            start.contiguous(),
            length.contiguous(),
            None if kv_lengths is None else kv_lengths.contiguous(),
            out,
            scale,
            q_blocks,
            k_blocks,
            heads,
            kv_heads,
            D=dim,
            STEP=STEP,
            TILE=TILE,
            PRECISION=launch_for(dim, torch.float32, arch_of(mean_q.device)).precision,
            num_warps=4,
            num_stages=2,
        )
    return out


@triton.jit
def _scores(
    mean_q_ptr,  # fp32 [B, Q, H, D], contiguous
    mean_k_ptr,  # fp32 [B, K, Hkv, D], contiguous
    start_ptr,
    length_ptr,
    kv_lengths_ptr,  # int32 [B] or None
    out_ptr,  # fp32 [B, H, Q, K], written
    scale,
    q_blocks,
    k_blocks,
    heads,
    kv_heads,
    D: tl.constexpr,
    STEP: tl.constexpr,
    TILE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Score TILE query blocks against TILE key blocks of one head."""
    row = tl.program_id(2)
    batch = row // heads
    head = row % heads
    query = tl.program_id(1) * TILE + tl.arange(0, TILE)
    key = tl.program_id(0) * TILE + tl.arange(0, TILE)
    queries = ((batch.to(tl.int64) * q_blocks + query) * heads + head) * D
    keys = ((batch.to(tl.int64) * k_blocks + key) * kv_heads + head // (heads // kv_heads)) * D
    total = tl.zeros([TILE, TILE], tl.float32)
    for first in range(0, D, STEP):
        lane = first + tl.arange(0, STEP)
        of_q = (query[:, None] < q_blocks) & (lane[None, :] < D)
        of_k = (key[None, :] < k_blocks) & (lane[:, None] < D)
        mean_q = tl.load(mean_q_ptr + queries[:, None] + lane[None, :], mask=of_q, other=0.0)
        mean_k = tl.load(mean_k_ptr + keys[None, :] + lane[:, None], mask=of_k, other=0.0)
        total = tl.dot(mean_q, mean_k, total, input_precision=PRECISION)
    visible = tl.load(length_ptr + key, mask=key < k_blocks, other=0)
    if kv_lengths_ptr is not None:
        start = tl.load(start_ptr + key, mask=key < k_blocks, other=0)
        visible = tl.minimum(visible, tl.load(kv_lengths_ptr + batch) - start)
    count = tl.log(tl.maximum(visible, 1).to(tl.float32))
    score = tl.where((visible > 0)[None, :], total * scale + count[None, :], float("-inf"))
    place = (row.to(tl.int64) * q_blocks + query)[:, None] * k_blocks + key[None, :]
    tl.store(out_ptr + place, score, mask=(query[:, None] < q_blocks) & (key[None, :] < k_blocks))
