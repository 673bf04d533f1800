"""CPU backend: gathers the kept key blocks of a few query blocks at a time and multiplies them in batches."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dit_sparse.kernels.indices import BLOCK, BlockIndices
from dit_sparse.kernels.lists import BlockLists, compact, has_partial, tile_masks
from dit_sparse.kernels.pool import log_counts, pool_blocks

# The softmax runs in powers of two: torch's exp2 is several times faster here than its exp on masked values.
LOG2_E = math.log2(math.e)
LN_2 = math.log(2.0)
# Logits of one batch of query blocks: small enough to stay in the cache between the products and the softmax.
CHUNK_LOGITS = 1 << 19


def attention(
    q: Tensor,  # [B, Sq, H, D]
    k: Tensor,  # [B, Sk, Hkv, D]
    v: Tensor,  # [B, Sk, Hkv, D]
    indices: BlockIndices,
    scale: float,
    kv_lengths: Tensor | None,  # int32 [B]
    compensate: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute out [B, Sq, H, D] in q.dtype, and the natural-log LSE and that of the visited blocks, fp32 [B, Sq, H].

    Products are fp32. compensate lets the means of the other blocks stand for them.
    """
    batch, _, heads, dim = q.shape
    lists = compact(indices, kv_lengths)
    queries = _blocked(q, indices.q_start, indices.q_len, None) * (scale * LOG2_E)
    keys = _blocked(k, indices.kv_start, indices.kv_len, kv_lengths)
    values = _blocked(v, indices.kv_start, indices.kv_len, kv_lengths)
    group = heads // k.shape[2]
    items = batch * heads * indices.query_blocks
    sums = _Sums(
        out=queries.new_zeros((items, BLOCK, dim)),
        top=queries.new_full((items, BLOCK, 1), -torch.inf),
        total=queries.new_zeros((items, BLOCK, 1)),
    )
    masks = None
    if has_partial(indices, k.shape[1], kv_lengths):
        masks = _Masks(tile_masks(indices), _visible_lanes(indices, batch, kv_lengths))
    for item, full, partial in _chunks(lists):
        head, block = item // indices.query_blocks, item % indices.query_blocks
        row = lists.row_of[head].long()
        blocks = lists.blocks[row, block, : full + partial].long()  # [n, c]
        source = (head // group * indices.key_blocks)[:, None] + blocks
        gathered = source.flatten()
        count = (full + partial) * BLOCK
        chunk_keys = keys.index_select(0, gathered).view(-1, count, dim)
        logits = torch.bmm(queries.index_select(0, item), chunk_keys.transpose(1, 2))
        if partial and masks is not None:
            tile = None if lists.tiles is None else lists.tiles[row, block, full : full + partial].long()
            hidden = masks.hidden(tile, head // heads, blocks[:, full:])
            logits[..., full * BLOCK :].unflatten(-1, (partial, BLOCK)).masked_fill_(hidden, -torch.inf)
        top = logits.amax(-1, keepdim=True)
        total = logits.sub_(_finite(top) if partial else top).exp2_().sum(-1, keepdim=True)
        sums.top[item], sums.total[item] = top, total
        if partial:
            total.masked_fill_(total == 0.0, 1.0)
        chunk_values = values.index_select(0, gathered).view(-1, count, dim)
        sums.out[item] = torch.bmm(logits, chunk_values).div_(total)
    shape = (batch, heads, indices.query_blocks, BLOCK)
    computed_lse = lse = _unblocked(sums.lse().view(shape), indices, q)
    if compensate:
        _add_means(sums, queries, k, v, indices, kv_lengths)
        lse = _unblocked(sums.lse().view(shape), indices, q)
    return _unblocked(sums.out.view(*shape, dim), indices, q).to(q.dtype), lse, computed_lse


@dataclass(frozen=True)
class _Sums:
    """Hold a softmax in powers of two of every query, item by item of (head, query block)."""

    out: Tensor  # fp32 [items, 128, D], divided by total
    top: Tensor  # fp32 [items, 128, 1]: largest logit so far, -inf for none
    total: Tensor  # fp32 [items, 128, 1]: sum of the weights, relative to top

    def lse(self) -> Tensor:
        """Give the natural-log LSE [items, 128, 1] of what is in."""
        return (self.top + self.total.log2()).mul_(LN_2)


def _finite(top: Tensor) -> Tensor:
    """Replace -inf, the top of nothing, by 0: -inf - -inf would be NaN."""
    return top.masked_fill(top == -torch.inf, 0.0)


def _add_means(
    sums: _Sums,  # of the visited blocks, changed in place
    queries: Tensor,  # fp32 [items, 128, D], scaled to powers of two
    k: Tensor,
    v: Tensor,
    indices: BlockIndices,
    kv_lengths: Tensor | None,
) -> None:
    """Bring the means of all blocks that a query block does not visit into its softmax."""
    batch, _, kv_heads, _ = k.shape
    heads = indices.heads // batch
    pooled = (pool_blocks(x, indices.kv_start, indices.kv_len, kv_lengths, k.dtype) for x in (k, v))
    mean_k, mean_v = (x.float().transpose(1, 2).flatten(0, 1) for x in pooled)  # [B*Hkv, K, D]
    weight = log_counts(indices.kv_start, indices.kv_len, kv_lengths, batch) * LOG2_E
    visited = indices.block_mask()
    step = max(1, CHUNK_LOGITS // (BLOCK * indices.key_blocks))
    for item in torch.arange(queries.shape[0]).split(step):
        head, block = item // indices.query_blocks, item % indices.query_blocks
        source = head // (heads // kv_heads)
        added = weight[head // heads].masked_fill(visited[indices.head_of[head].long(), block], -torch.inf)
        logits = torch.baddbmm(added[:, None], queries[item], mean_k[source].transpose(1, 2))
        old_top, old_total = sums.top[item], sums.total[item]
        top = torch.maximum(old_top, logits.amax(-1, keepdim=True))
        weights = logits.sub_(_finite(top)).exp2_()
        kept = old_total * (old_top - _finite(top)).exp2_()
        total = kept + weights.sum(-1, keepdim=True)
        sums.top[item], sums.total[item] = top, total
        product = torch.baddbmm(sums.out[item] * kept, weights, mean_v[source])
        sums.out[item] = product.div_(total.masked_fill(total == 0.0, 1.0))


@dataclass(frozen=True)
class _Masks:
    tiles: Tensor  # bool [M + 1, 128, 128], the last all ones
    lanes: Tensor  # bool [B, K, 128]: lanes that hold a visible key

    def hidden(self, tile: Tensor | None, b: Tensor, blocks: Tensor) -> Tensor:
        """Mark the pairs not to be seen: bool [n, 128 or 1, p, 128] for partial blocks [n, p] of batches [n]."""
        lanes = self.lanes[b[:, None], blocks].unsqueeze(1)
        if tile is None:
            return ~lanes
        return ~(self.tiles[tile].transpose(1, 2) & lanes)


def _blocked(x: Tensor, start: Tensor, length: Tensor, lengths: Tensor | None) -> Tensor:
    """Copy x [B, S, H, D] into fp32 blocks [B*H*blocks, 128, D]; lanes without a visible token become 0."""
    batch, tokens, heads, dim = x.shape
    by_head = x.transpose(1, 2)
    lane = torch.arange(BLOCK)
    if tokens == BLOCK * start.numel() and bool((start == torch.arange(0, tokens, BLOCK)).all()):
        blocked = by_head.to(torch.float32, memory_format=torch.contiguous_format, copy=lengths is not None)
        blocked = blocked.contiguous().view(batch, heads, -1, BLOCK, dim)
        missing = None
    else:
        token = (start[:, None] + lane).clamp_max_(tokens - 1).flatten()
        blocked = by_head.index_select(2, token).float().view(batch, heads, -1, BLOCK, dim)
        missing = lane >= length[:, None]
    if missing is not None:
        blocked.masked_fill_(missing[:, :, None], 0.0)
    if lengths is not None:
        late = start[:, None] + lane >= lengths[:, None, None]
        blocked.masked_fill_(late[:, None, :, :, None], 0.0)
    return blocked.view(-1, BLOCK, dim)


def _unblocked(x: Tensor, indices: BlockIndices, q: Tensor) -> Tensor:
    """Put blocks [B, H, Q, 128, ...] back as tokens [B, Sq, H, ...]."""
    tokens = q.shape[1]
    start = indices.q_start
    if tokens == BLOCK * start.numel() and bool((start == torch.arange(0, tokens, BLOCK)).all()):
        return x.flatten(2, 3).transpose(1, 2).contiguous()
    lane = torch.arange(BLOCK)
    present = lane < indices.q_len[:, None]
    result = x.new_empty((x.shape[0], tokens, x.shape[1], *x.shape[4:]))
    result[:, (start[:, None] + lane)[present].long()] = x[:, :, present].transpose(1, 2)
    return result


def _visible_lanes(indices: BlockIndices, batch: int, kv_lengths: Tensor | None) -> Tensor:
    """Mark the lanes of every key block that hold a visible key: bool [B, K, 128]."""
    lane = torch.arange(BLOCK)
    present = (lane < indices.kv_len[:, None]).expand(batch, -1, -1)
    if kv_lengths is None:
        return present
    return present & (indices.kv_start[:, None] + lane < kv_lengths[:, None, None])


def _chunks(lists: BlockLists) -> Iterator[tuple[Tensor, int, int]]:
    """Yield (items int64 [n], full blocks, partial blocks): query blocks with equal counts, few enough for the cache.

    An item numbers (head, query block); those without a key block are never yielded.
    """
    rows = lists.row_of.long()
    full, partial = lists.full_count[rows].flatten(), lists.partial_count[rows].flatten()
    width = int(partial.max()) + 1
    key = full.long() * width + partial
    order = torch.argsort(key, stable=True)
    counts, sizes = torch.unique_consecutive(key[order], return_counts=True)
    begin = 0
    for code, size in zip(counts.tolist(), sizes.tolist(), strict=True):
        n_full, n_partial = divmod(code, width)
        items = order[begin : begin + size]
        begin += size
        if code == 0:
            continue
        step = max(1, CHUNK_LOGITS // ((n_full + n_partial) * BLOCK * BLOCK))
        for first in range(0, size, step):
            yield items[first : first + step], n_full, n_partial
