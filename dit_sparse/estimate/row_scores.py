"""Estimates of block mass from exactly computed rows: some of each query block, or all of them.

The form is that of `scores`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dit_sparse.estimate.blocks import Blocks, mean_of_rows, pieces
from dit_sparse.kernels.indices import BLOCK
from dit_sparse.kernels.mass import block_log_mass, block_mass
from dit_sparse.kernels.pool import pool_blocks, visible_counts
from dit_sparse.selection import HeadOrder

# Steps of two Weyl sequences, which spread the drawn rows evenly over runs of tokens and over seeds.
ROW_STEP, SEED_STEP = 0.6180339887498949, 0.7548776662466927


def rows_of_blocks(start: Tensor, length: Tensor, per_block: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw per_block rows of every block, one in each of as many runs of its tokens: int64 [Q, P], share fp32 [Q, P].

    start, length: int32 [Q]. The runs are as equal as they get, and a row's share is that of its run in the block. A
    block with fewer tokens gives each of them once; the places left over repeat its last one, with a share of 0.
    """
    runs = length.clamp(max=per_block)[:, None]
    edge = length[:, None] * torch.minimum(torch.arange(per_block + 1, device=start.device), runs) // runs
    size = edge.diff(dim=1)
    number = torch.arange(size.numel(), device=start.device).view(size.shape)
    within = (number.double() * ROW_STEP + seed * SEED_STEP) % 1.0
    offset = torch.minimum(edge[:, :-1] + (within * size).long(), length[:, None] - 1)
    return start[:, None] + offset, size / length[:, None]


def sampled_score(q: Tensor, k: Tensor, blocks: Blocks, per_block: int) -> Tensor:
    """Compute some rows of each query block exactly: log mean_r sum_j exp(scale q_r . k_j - lse_r).

    Never misses a key, but only knows the rows that it drew: use it where the rows of a block agree, as they do in
    3-D tiles. Cost: k read for every 128 rows, 2 N n d per_block FLOPs, per_block / 128 of the products of attention.

    Paper: Sparse VideoGen (arXiv 2502.01776), which samples rows to choose between two masks
    """
    return _row_score(q, k, blocks, per_block)


def exact_score(q: Tensor, k: Tensor, blocks: Blocks, number: int = 1) -> Tensor:
    """Compute the mass of every block pair exactly: log mean_r sum_j exp(scale q_r . k_j - lse_r) over all rows.

    The first search of a run remembers the LSE of its rows in memory["lse"]; later ones make one pass with that, which
    is off by what the LSE drifted and alters a row's weight in its block, not its ranking of keys. Cost: 2 N^2 d
    FLOPs, the first product of attention. Use it under `Cached` with few refreshes, or as the oracle of the others.

    Paper: AdaSpa (arXiv 2502.21079)
    """
    layout, tokens = blocks.layout, blocks.scored_tokens
    if "lse" not in blocks.memory:
        lse = torch.empty(q.shape[0], tokens, q.shape[2], dtype=torch.float32, device=q.device)
        score = _row_score(q, k, blocks, BLOCK, lse=lse)
        blocks.memory["lse"] = lse if blocks.order is None else HeadOrder.from_kernel(lse, blocks.order)
        return score
    lse = blocks.memory["lse"]
    lse = lse if blocks.order is None else HeadOrder.to_kernel(lse, blocks.order)
    mass = block_mass(
        q[:, :tokens], k, lse, blocks.q_start, blocks.q_length, layout.start, layout.length, blocks.scale,
        blocks.kv_lengths,
    )  # fmt: skip
    # A remembered LSE may be so far off that a sum leaves the range of fp32; -inf must mean hidden alone.
    bounds = torch.finfo(torch.float32)
    score = mass.float().clamp(bounds.tiny, bounds.max).log() - blocks.q_length[:, None].log()
    hidden = visible_counts(layout.start, layout.length, blocks.kv_lengths, q.shape[0]) == 0
    return score.masked_fill(hidden[:, None, None], -torch.inf)


def lowbit_score(q: Tensor, k: Tensor, blocks: Blocks, bits: int) -> Tensor:
    """Compute the mass of every block pair from q and k that were quantised to `bits` per number, token by token.

    Keys are centred first: that shifts all logits of a row alike and spares the range. As `exact`, without its memory
    and with integer products. Cost: 2 N^2 d integer operations; numbers of any width travel as int8, half the bytes of
    bf16. Use it where `exact` is wanted at every step.

    Paper: SALE (arXiv 2505.24179)
    """
    layout, batch = blocks.layout, q.shape[0]
    visible = visible_counts(layout.start, layout.length, blocks.kv_lengths, batch).float()
    if blocks.kv_lengths is not None:
        hidden = torch.arange(k.shape[1], device=k.device) >= blocks.kv_lengths[:, None]
        k = k.masked_fill(hidden[..., None, None], 0.0)
    means = pool_blocks(k, layout.start, layout.length, blocks.kv_lengths)
    share = visible / visible.sum(-1, keepdim=True).clamp(min=1.0)
    centre = torch.einsum("bk,bkhd->bhd", share, means)
    low_q, q_scale = quantised(q[:, : blocks.scored_tokens].float(), bits)
    low_k, k_scale = quantised(k.float() - centre[:, None], bits)
    return _row_score(low_q, low_k, blocks, BLOCK, q_scale, k_scale)


def quantised(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Round x [B, S, H, D] to symmetric integers of `bits`, one scale per token and head.

    Returns int8 like x, and the scales, fp32 [B, S, H].
    """
    most = 2 ** (bits - 1) - 1
    scale = x.abs().amax(-1).clamp(min=torch.finfo(torch.float32).tiny * most) / most
    return (x / scale[..., None]).round().clamp(-most, most).to(torch.int8), scale


def _row_score(
    q: Tensor,
    k: Tensor,
    blocks: Blocks,
    per_block: int,
    q_scale: Tensor | None = None,  # fp32 [B, S, H]
    k_scale: Tensor | None = None,  # fp32 [B, S, Hkv]
    lse: Tensor | None = None,  # fp32 [B, scored tokens, H]: takes the LSE of the rows
) -> Tensor:
    """Average the exact softmax of per_block rows of each query block over key blocks, in logs: fp32 [B, H, Q, K]."""
    layout, (batch, heads) = blocks.layout, (q.shape[0], q.shape[2])
    rows, share = rows_of_blocks(blocks.q_start, blocks.q_length, per_block, blocks.seed)
    log_weight = share.log()
    score = torch.empty(batch, heads, blocks.scored, layout.blocks, dtype=torch.float32, device=q.device)
    for of_q, of_k, some in pieces(heads, k.shape[2], blocks.scored, batch * per_block * layout.blocks):
        at = rows[some].flatten()
        scales = {}
        if q_scale is not None and k_scale is not None:
            scales = {"q_scale": q_scale[:, at, of_q], "k_scale": k_scale[:, :, of_k]}
        mass = block_log_mass(
            q[:, at, of_q], k[:, :, of_k], layout.start, layout.length, blocks.scale, blocks.kv_lengths, **scales
        )
        if lse is not None:
            lse[:, at, of_q] = mass.logsumexp(-1).transpose(1, 2).float()  # places left over repeat what they repeat
        score[:, of_q, some] = mean_of_rows(mass.unflatten(2, (-1, per_block)), log_weight[some])
    return score
