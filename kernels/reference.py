"""Eager oracle: attention by its definition, from the token mask of every query block."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_sparse.kernels.indices import BlockIndices, token_owner, unpack_bits
from dit_sparse.kernels.pool import visible_counts


def attention(
    q: Tensor,  # [B, Sq, H, D]
    k: Tensor,  # [B, Sk, Hkv, D]
    v: Tensor,  # [B, Sk, Hkv, D]
    indices: BlockIndices,
    scale: float,
    kv_lengths: Tensor | None,  # int32 [B]
    compensate: bool = False,
    round_weights: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute out [B, Sq, H, D] in q.dtype, and the natural-log LSE and that of the visited blocks, both [B, Sq, H].

    All is done in fp32 or, for fp64 inputs, in fp64. Keys that no query token of a block may see are left out of its
    products, so what they hold cannot matter. compensate adds, as one more key, the mean of every block that is not
    visited; means are rounded to q.dtype, so for fp64 inputs they are not rounded. round_weights rounds the softmax
    weights to q.dtype before their product with v, as a fast kernel must: the independent low-precision result from
    which tolerances are derived.
    """
    batch, _, heads, _ = q.shape
    compute = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = torch.zeros(q.shape, dtype=compute, device=q.device)
    lse = torch.full(q.shape[:3], -torch.inf, dtype=compute, device=q.device)
    computed_lse = lse.clone()
    count = visible_counts(indices.kv_start, indices.kv_len, kv_lengths, batch)
    mean_k, mean_v = (_means(x.to(compute), indices, count, kv_lengths).to(q.dtype) for x in (k, v))
    kv_head = torch.arange(heads, device=q.device) // (heads // k.shape[2])
    head_of = indices.head_of.view(batch, heads)
    key_index = torch.arange(k.shape[1], device=q.device)
    for row in range(indices.rows):
        skipped = ~unpack_bits(indices.bits[row], indices.key_blocks) & compensate  # [Q, K]
        for block in range(indices.query_blocks):
            keep_row = indices.token_rows(row, block)
            start = int(indices.q_start[block])
            tokens = slice(start, start + keep_row.shape[0])
            for b in range(batch):
                mine = (head_of[b] == row).nonzero().flatten()
                keep = keep_row if kv_lengths is None else keep_row & (key_index < kv_lengths[b])
                columns = keep.any(0).nonzero().flatten()
                means = (skipped[block] & (count[b] > 0)).nonzero().flatten()
                if mine.numel() == 0 or columns.numel() + means.numel() == 0:
                    continue
                queries = q[b, tokens, mine].transpose(0, 1).to(compute)  # [heads of this row, q_len, D]
                keys = torch.cat((k[b, columns], mean_k[b, means]))[:, kv_head[mine]].transpose(0, 1).to(compute)
                values = torch.cat((v[b, columns], mean_v[b, means]))[:, kv_head[mine]].transpose(0, 1).to(compute)
                hidden = torch.zeros_like(keep[:, columns], dtype=compute).masked_fill(~keep[:, columns], -torch.inf)
                many = count[b, means].to(compute).log().expand(keep.shape[0], -1)
                logits = queries @ keys.transpose(1, 2) * scale + torch.cat((hidden, many), -1)
                top = logits.amax(-1, keepdim=True)
                weights = torch.exp(logits - top.masked_fill(top == -torch.inf, 0.0))
                total = weights.sum(-1, keepdim=True)
                if round_weights:
                    weights = weights.to(q.dtype).to(compute)
                product = weights @ values / total.masked_fill(total == 0.0, 1.0)
                out[b, tokens, mine] = product.transpose(0, 1)
                lse[b, tokens, mine] = (top + total.log()).squeeze(-1).transpose(0, 1)
                visited_lse = logits[..., : columns.numel()].logsumexp(-1)
                computed_lse[b, tokens, mine] = visited_lse.transpose(0, 1)
    return out.to(q.dtype), lse, computed_lse


def _means(x: Tensor, indices: BlockIndices, count: Tensor, kv_lengths: Tensor | None) -> Tensor:
    """Average the visible tokens of every key block of x [B, Sk, Hkv, D] by their count [B, K]: [B, K, Hkv, D]."""
    if kv_lengths is not None:
        hidden = torch.arange(x.shape[1], device=x.device) >= kv_lengths[:, None]
        x = x.masked_fill(hidden[:, :, None, None], 0.0)
    block, _ = token_owner(indices.kv_start, indices.kv_len)
    total = x.new_zeros((x.shape[0], indices.key_blocks, *x.shape[2:])).index_add_(1, block, x)
    return total / count.clamp_min(1)[:, :, None, None]
