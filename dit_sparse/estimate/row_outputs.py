"""How far the output of some rows is from exact, at every number of key blocks that they might keep."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_sparse.estimate import blocks
from dit_sparse.estimate.blocks import Blocks
from dit_sparse.kernels.indices import BLOCK
from dit_sparse.kernels.pool import pool_blocks, visible_counts


def error_curve(
    q: Tensor,  # [B, S, H, D]
    k: Tensor,  # [B, S, Hkv, D]
    v: Tensor,
    rows: Tensor,  # int64 [Q, P]: some rows of each scored query block
    share: Tensor,  # fp32 [Q, P]: the part of its block that each of them stands for
    ranked: Tensor,  # int64 [B, H, Q, K]: key blocks, best first, always read ones last
    always: Tensor,  # bool [K]
    scored: Blocks,
    compensate: bool,
) -> tuple[Tensor, Tensor]:
    """Return the relative L2 error of these rows by number of blocks kept, and the standard error of its square.

    Both fp32 [B, H, K], from 1 block on. The standard error is that of a ratio of sums over rows drawn without
    replacement: 0 where all rows are there. That the rows are stratified makes it an upper bound.
    Keeping one more block adds its numerator and denominator to a running sum, so one pass over the keys gives all
    numbers at once. With compensate, it takes those of its mean key and value away. Costs 4 N d FLOPs per row in fp32,
    one head and some rows at a time: with thousands of rows as much as a dense call or two, so use it under `Cached`.
    """
    layout, (batch, heads), kv_heads = scored.layout, (q.shape[0], q.shape[2]), k.shape[2]
    lane = torch.arange(BLOCK, device=q.device)
    token = (layout.start[:, None] + lane).clamp(max=k.shape[1] - 1)  # [K, 128]
    visible = visible_counts(layout.start, layout.length, scored.kv_lengths, batch)  # [B, K]
    means = [
        pool_blocks(x, layout.start, layout.length, scored.kv_lengths).to(x.dtype).float() if compensate else None
        for x in (k, v)
    ]
    tiny = torch.finfo(torch.float32).tiny
    curve = torch.empty(batch, heads, layout.blocks, dtype=torch.float32, device=q.device)
    spread = torch.empty_like(curve)
    weight = (share * scored.q_length[:, None]).flatten()
    # one of `weight` tokens was drawn: the variance of the sum over them is that of drawing without replacement
    variance = weight * (weight - 1.0).clamp(min=0.0)
    owner = torch.arange(len(rows), device=q.device).repeat_interleave(rows.shape[1])
    step = max(1, blocks.PIECE_ELEMENTS // (layout.blocks * (BLOCK + 2 * q.shape[3])))
    for b in range(batch):
        hidden = lane >= visible[b, :, None]
        for head in range(heads):
            of_k = head // (heads // kv_heads)
            keys, values = (x[b, token, of_k].float().masked_fill(hidden[..., None], 0.0) for x in (k, v))
            mean_k, mean_v = (None if mean is None else mean[b, :, of_k] for mean in means)
            wrong, norm = torch.zeros_like(curve[b, head]), torch.zeros_like(curve[b, head, 0])
            moments = torch.zeros(3, layout.blocks, device=q.device)
            for first in range(0, len(owner), step):
                some = slice(first, first + step)
                queries = q[b, rows.flatten()[some], head].float() * scored.scale
                stood_for = None
                if mean_k is not None and mean_v is not None:
                    stood_for = queries @ mean_k.T + visible[b].float().log(), mean_v
                off, full = _squares(
                    queries, keys, values, hidden, ranked[b, head, owner[some]], always, stood_for
                )  # [c, K], [c]
                wrong += weight[some] @ off
                norm += weight[some] @ full
                products = torch.stack([off.square(), off * full[:, None], full.square()[:, None].expand_as(off)])
                moments += variance[some] @ products
            norm.clamp_(min=tiny)
            square = wrong / norm
            curve[b, head] = square.sqrt()
            deviation = moments[0] - 2 * square * moments[1] + square.square() * moments[2]
            spread[b, head] = deviation.clamp(min=0.0).sqrt() / norm
    return curve, spread


def _squares(
    queries: Tensor,  # fp32 [R, D], scaled
    keys: Tensor,  # fp32 [K, 128, D]
    values: Tensor,
    hidden: Tensor,  # bool [K, 128]
    ranked: Tensor,  # int64 [R, K]
    always: Tensor,
    stood_for: tuple[Tensor, Tensor] | None,  # logits of mean keys [R, K], mean values [K, D]
) -> tuple[Tensor, Tensor]:
    """Return the squared output error of each row by number of blocks kept, [R, K], and its squared output, [R]."""
    logits = torch.einsum("rd,kld->rkl", queries, keys).masked_fill(hidden, -torch.inf)
    top = logits.amax((1, 2), keepdim=True)
    top = top.masked_fill(top == -torch.inf, 0.0)
    weights = (logits - top).exp()
    mass = weights.sum(-1)  # [R, K]
    value = torch.bmm(weights.transpose(0, 1), values).transpose(0, 1)  # [R, K, D]
    tiny = torch.finfo(torch.float32).tiny
    exact = value.sum(1) / mass.sum(1, keepdim=True).clamp(min=tiny)
    kept_mass, kept_value = (mass * always).sum(1), (value * always[:, None]).sum(1)
    if stood_for is not None:
        # A mean key's logit is at most the block's largest (Jensen), so this never outgrows the mass it stands for.
        mean_mass = (stood_for[0] - top[..., 0]).exp() * ~always
        mean_value = mean_mass[..., None] * stood_for[1]
        kept_mass, kept_value = kept_mass + mean_mass.sum(1), kept_value + mean_value.sum(1)
        mass, value = mass - mean_mass, value - mean_value
    # always read blocks stand last in ranked and would count twice: past the competitors nothing is added
    mass, value = mass * ~always, value * ~always[:, None]
    mass = mass.gather(1, ranked).cumsum(1) + kept_mass[:, None]
    value = value.gather(1, ranked[..., None].expand_as(value)).cumsum(1) + kept_value[:, None]
    # Where what is kept weighs nothing beside the rest, the output is 0 here and some mean value in the kernel: off by
    # about the whole output either way.
    out = value / mass.clamp(min=tiny)[..., None]
    return (out - exact[:, None]).square().sum(-1), exact.square().sum(-1)
