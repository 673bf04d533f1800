"""Estimates of the log attention mass of every pair of blocks, from pooled tokens.

Every score has one form: (q [B, S, H, D], k [B, S, Hkv, D], blocks, number) -> fp32 [B, H, Q, K] over the scored query
blocks and all key blocks, defined up to a constant in each row; -inf where a key block holds no visible key. `number`
is the one after the colon. Costs are for N tokens, blocks of 128, head dim d, per head; n = N/128.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dit_sparse.estimate.blocks import Blocks, mean_of_rows, pieces, products
from dit_sparse.kernels.block_scores import block_scores
from dit_sparse.kernels.indices import BLOCK
from dit_sparse.kernels.pool import log_counts, pool_blocks, pool_both, visible_counts

# Sub-blocks of each block in the scores of a proxy head: it is worth a finer look than a head of its own.
PROXY_PARTS = 8


def mean_score(q: Tensor, k: Tensor, blocks: Blocks, number: int = 1) -> Tensor:
    """Multiply the mean query and the mean key: scale * mean(q_i) . mean(k_j) + log n_j.

    A lower bound of the log-mean-exp that it stands for (Jensen), tight where a block's tokens are alike: use it with
    an order that makes them so. Cost: q and k read once, 2 n^2 d FLOPs. The default, and the cheapest.

    Paper: MoBA (arXiv 2502.13189), section 2.2
    """
    start, length, lengths = blocks.layout.start, blocks.layout.length, blocks.kv_lengths
    mean_q, mean_k = pool_both(q, k, start, length, blocks.scored, lengths)
    return block_scores(mean_q, mean_k, start, length, blocks.scale, lengths)


def lse_score(q: Tensor, k: Tensor, blocks: Blocks, parts: int) -> Tensor:
    """Sum the exponentials of sub-block means: log sum_ab (n_a/n_i) n_b exp(scale * mean(q_a) . mean(k_b)).

    a and b run over `parts` equal runs of tokens of the two blocks. Sees a few strong keys in an otherwise weak block,
    which the mean washes out. Cost: q and k read once, 2 (parts n)^2 d FLOPs and as many exponentials / d; with 4 parts
    still under a hundredth of attention. Use it where the estimate may cost a little, above all at low density.

    Paper: none; SubBlock of sglang's diffusion engine, pull request 34148
    """
    layout = blocks.layout
    q_start, q_length = sub_blocks(blocks.q_start, blocks.q_length, parts)
    k_start, k_length = sub_blocks(layout.start, layout.length, parts)
    fine_q = pool_blocks(q, q_start, q_length)
    fine_k = pool_blocks(k, k_start, k_length, blocks.kv_lengths)
    return _summed(fine_q, fine_k, blocks, parts, log_counts(k_start, k_length, blocks.kv_lengths, q.shape[0]))


def antidiagonal_score(q: Tensor, k: Tensor, blocks: Blocks, stride: int) -> Tensor:
    """Sum the softmax over strided antidiagonals: each pair of groups of `stride` tokens is its antidiagonal's mean.

    A pair of groups has the logit scale / stride * sum_r q_(stride-1-r) . k_r + log(keys); rows of groups are
    normalised, then summed in blocks. A group that is short (the end of a block, hidden keys) repeats its tokens. Every
    token takes part once per group, so that vertical and slanted lines are met. Cost: 2 N^2 d / stride FLOPs, an eighth
    of the first product of attention at stride 8, and N^2 / stride^2 exponentials: use it where a selection serves
    several steps.

    Paper: XAttention (arXiv 2503.16428)
    """
    layout, batch = blocks.layout, q.shape[0]
    parts = -(-BLOCK // stride)
    q_start, q_length = groups(blocks.q_start, blocks.q_length, stride)
    k_start, k_length = groups(layout.start, layout.length, stride)
    q_count = q_length.expand(batch, -1)
    k_count = visible_counts(k_start, k_length, blocks.kv_lengths, batch)
    bias, lane = k_count.float().log(), torch.arange(stride, device=q.device)
    log_weight = (q_length.view(-1, parts) / blocks.q_length[:, None]).log()
    score = q.new_empty(batch, q.shape[2], blocks.scored, layout.blocks, dtype=torch.float32)
    keys_held = parts * layout.blocks
    for of_q, of_k, some in pieces(q.shape[2], k.shape[2], blocks.scored, batch * parts * keys_held):
        fine = slice(some.start * parts, some.stop * parts)
        queries = _strided(q[:, :, of_q], q_start[fine], q_count[:, fine], lane.flip(0))
        keys = _strided(k[:, :, of_k], k_start, k_count, lane)
        logits = products(queries, keys, blocks.scale / stride, bias)  # [B, h, c * parts, K * parts]
        mass = logits.unflatten(-1, (-1, parts)).logsumexp(-1).unflatten(2, (-1, parts))
        score[:, of_q, some] = mean_of_rows(mass, log_weight[some])
    return score


def proxy_score(q: Tensor, k: Tensor, blocks: Blocks, group: int) -> Tensor:
    """Score one proxy head for each `group` neighbouring heads, whose q and k are the means of theirs.

    The proxy head is scored as `lse` with 8 sub-blocks, and its scores serve all heads of the group: finer than a
    head of its own could be for the cost, and right as far as neighbouring heads look at the same places. The paper
    gives every head a budget of its own; here `mass` gives those of a group the same. Cost: q and k read once,
    2 (8 n)^2 d / group FLOPs.

    Paper: ProxyAttn (arXiv 2509.24745)
    """
    layout, (heads, kv_heads) = blocks.layout, (q.shape[2], k.shape[2])
    q_start, q_length = sub_blocks(blocks.q_start, blocks.q_length, PROXY_PARTS)
    k_start, k_length = sub_blocks(layout.start, layout.length, PROXY_PARTS)
    head = torch.arange(heads, device=q.device)
    proxy = head // group
    member = (torch.arange(-(-heads // group), device=q.device)[:, None] == proxy).float()
    member = member / member.sum(-1, keepdim=True)  # [G, H]
    of_key = torch.arange(kv_heads, device=q.device)[:, None] == head // (heads // kv_heads)  # [Hkv, H]
    fine_q = torch.einsum("gh,bqhd->bqgd", member, pool_blocks(q, q_start, q_length))
    fine_k = pool_blocks(k, k_start, k_length, blocks.kv_lengths)
    fine_k = torch.einsum("gh,bkhd->bkgd", member @ of_key.float().T, fine_k)
    counts = log_counts(k_start, k_length, blocks.kv_lengths, q.shape[0])
    return _summed(fine_q, fine_k, blocks, PROXY_PARTS, counts).index_select(1, proxy)


def region_score(q: Tensor, k: Tensor, blocks: Blocks, size: int) -> Tensor:
    """Score regions of `size` consecutive blocks by their mean tokens; a block inherits, plus the log of its tokens.

    Blocks of a region rank alike, but for their tokens, so that choices fall in runs: long reads, coarse picture. No
    region holds both video and text. The paper keeps whole regions; here the last one may be cut, lower blocks first.
    Cost: q and k read once, 2 (n / size)^2 d FLOPs. Use it with an order whose runs of blocks are near in space.

    Paper: BiFormer (arXiv 2303.08810)
    """
    layout, batch = blocks.layout, q.shape[0]
    region = _regions(layout.video_blocks, layout.blocks, size, q.device)
    of_q = region[: blocks.scored]
    visible = visible_counts(layout.start, layout.length, blocks.kv_lengths, batch)
    mean_q, mean_k = pool_both(q, k, layout.start, layout.length, blocks.scored, blocks.kv_lengths)
    last = _regions_in(layout.video_blocks, layout.blocks, size)
    rows = _region_means(mean_q, blocks.q_length.expand(batch, -1), of_q, last)
    columns = _region_means(mean_k, visible, region, last)
    score = products(rows, columns, blocks.scale, rows.new_zeros(batch, last))
    counts = blocks.log_counts(batch)[:, None, None]
    return score.index_select(2, of_q).index_select(3, region) + counts


def sub_blocks(start: Tensor, length: Tensor, parts: int) -> tuple[Tensor, Tensor]:
    """Cut every block, int32 [n], in `parts` runs as equal as they get: start and length, int32 [n * parts].

    Runs of a block that has fewer tokens than parts may be empty.
    """
    edge = length[:, None] * torch.arange(parts + 1, dtype=torch.int32, device=start.device) // parts
    return (start[:, None] + edge[:, :-1]).flatten(), edge.diff(dim=1).flatten()


def groups(start: Tensor, length: Tensor, stride: int) -> tuple[Tensor, Tensor]:
    """Cut every block, int32 [n], in runs of `stride` tokens: start and length, int32 [n * ceil(128 / stride)].

    The last run of a block may be short; those behind it are empty.
    """
    edge = torch.arange(0, BLOCK, stride, dtype=torch.int32, device=start.device)
    return (start[:, None] + edge).flatten(), (length[:, None] - edge).clamp(0, stride).flatten()


def _summed(fine_q: Tensor, fine_k: Tensor, blocks: Blocks, parts: int, bias: Tensor) -> Tensor:
    """Sum exponentials of sub-block products over both blocks: fine_q [B, Q*parts, H, D], bias [B, K*parts]."""
    batch, _, heads, _ = fine_q.shape
    q_length = sub_blocks(blocks.q_start, blocks.q_length, parts)[1].view(-1, parts)
    log_weight = (q_length / blocks.q_length[:, None]).log()[..., None]  # [Q, parts, 1]
    keys = blocks.layout.blocks
    score = fine_q.new_empty(batch, heads, blocks.scored, keys)
    for of_q, of_k, some in pieces(heads, fine_k.shape[2], blocks.scored, batch * parts * parts * keys):
        rows = fine_q[:, some.start * parts : some.stop * parts, of_q]
        logits = products(rows, fine_k[:, :, of_k], blocks.scale, bias)
        mass = logits.unflatten(-1, (keys, parts)).logsumexp(-1).unflatten(2, (-1, parts))
        score[:, of_q, some] = (mass + log_weight[some]).logsumexp(3)
    return score


def _strided(x: Tensor, start: Tensor, count: Tensor, lane: Tensor) -> Tensor:
    """Lay the tokens of every group side by side in the order of lane [stride]: [B, G, H, stride * D], as x.

    x [B, S, H, D], start int32 [G], count int32 [B, G]: tokens that count; a group with fewer than stride repeats
    them, one without any is 0.
    """
    token = start[:, None] + lane % count.clamp(min=1)[..., None]  # [B, G, stride]
    token = torch.where(count[..., None] > 0, token, 0)
    sample = torch.arange(x.shape[0], device=x.device)[:, None, None]
    found = x[sample, token].masked_fill(count[..., None, None, None] == 0, 0.0)
    return found.transpose(2, 3).flatten(3)


def _regions_in(video_blocks: int, blocks: int, size: int) -> int:
    """Count the regions of a layout."""
    return -(-video_blocks // size) + -(-(blocks - video_blocks) // size)


def _regions(video_blocks: int, blocks: int, size: int, device: torch.device) -> Tensor:
    """Name the region of every block, int64 [blocks]."""
    block = torch.arange(blocks, device=device)
    of_text = -(-video_blocks // size) + (block - video_blocks) // size
    return torch.where(block < video_blocks, block // size, of_text)


def _region_means(means: Tensor, count: Tensor, region: Tensor, regions: int) -> Tensor:
    """Average block means [B, n, H, D] over their regions, weighted by count [B, n]: [B, regions, H, D]."""
    weight = (torch.arange(regions, device=means.device)[:, None] == region) * count[:, None].float()
    weight = weight / weight.sum(-1, keepdim=True).clamp(min=1.0)
    return torch.einsum("brn,bnhd->brhd", weight, means)
