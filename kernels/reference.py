"""Eager oracle: attention by its definition, from the token mask of every query block."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_sparse.kernels.indices import BlockIndices


def attention(
    q: Tensor,  # [B, Sq, H, D]
    k: Tensor,  # [B, Sk, Hkv, D]
    v: Tensor,  # [B, Sk, Hkv, D]
    indices: BlockIndices,
    scale: float,
    kv_lengths: Tensor | None,  # int32 [B]
    round_weights: bool = False,
) -> tuple[Tensor, Tensor]:
    """Compute out [B, Sq, H, D] in q.dtype and the natural-log LSE [B, Sq, H], in fp32 or, for fp64 inputs, in fp64.

    Keys that no query token of a block may see are left out of its products, so what they hold cannot matter.
    round_weights rounds the softmax weights to q.dtype before their product with v, as a fast kernel must: the
    independent low-precision result from which tolerances are derived.
    """
    batch, _, heads, _ = q.shape
    compute = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = torch.zeros(q.shape, dtype=compute, device=q.device)
    lse = torch.full(q.shape[:3], -torch.inf, dtype=compute, device=q.device)
    kv_head = torch.arange(heads, device=q.device) // (heads // k.shape[2])
    head_of = indices.head_of.view(batch, heads)
    key_index = torch.arange(k.shape[1], device=q.device)
    for row in range(indices.rows):
        for block in range(indices.query_blocks):
            keep_row = indices.token_rows(row, block)
            start = int(indices.q_start[block])
            tokens = slice(start, start + keep_row.shape[0])
            for b in range(batch):
                mine = (head_of[b] == row).nonzero().flatten()
                keep = keep_row if kv_lengths is None else keep_row & (key_index < kv_lengths[b])
                columns = keep.any(0).nonzero().flatten()
                if mine.numel() == 0 or columns.numel() == 0:
                    continue
                queries = q[b, tokens, mine].transpose(0, 1).to(compute)  # [heads of this row, q_len, D]
                keys = k[b, columns[:, None], kv_head[mine]].transpose(0, 1).to(compute)
                values = v[b, columns[:, None], kv_head[mine]].transpose(0, 1).to(compute)
                logits = (queries @ keys.transpose(1, 2) * scale).masked_fill(~keep[:, columns], -torch.inf)
                top = logits.amax(-1, keepdim=True)
                weights = torch.exp(logits - top.masked_fill(top == -torch.inf, 0.0))
                total = weights.sum(-1, keepdim=True)
                if round_weights:
                    weights = weights.to(q.dtype).to(compute)
                product = weights @ values / total.masked_fill(total == 0.0, 1.0)
                out[b, tokens, mine] = product.transpose(0, 1)
                lse[b, tokens, mine] = (top + total.log()).squeeze(-1).transpose(0, 1)
    return out.to(q.dtype), lse
