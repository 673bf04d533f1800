"""Check a result at the size at which it is timed: some rows against FP64, with a bound derived from those rows."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_sparse.kernels.gate import ERROR_FACTOR
from dit_sparse.kernels.indices import BlockIndices, token_owner, unpack_bits

CHECKED_BLOCKS = 4


def row_errors(
    out: Tensor,  # [B, Sq, H, D]
    q: Tensor,  # [B, Sq, H, D]
    k: Tensor,  # [B, Sk, Hkv, D]
    v: Tensor,  # [B, Sk, Hkv, D]
    indices: BlockIndices,
    scale: float,
    compensate: bool = False,
) -> tuple[float, float]:
    """Return the largest error of the rows of some query blocks of the first batch entry, and what is allowed.

    Allowed is ERROR_FACTOR times the error of the same rows in torch with the weights rounded to q.dtype, plus one
    rounding of the largest value. The first and the last block of the heads' ends are among them, the rest is drawn.
    NaN in the output counts as an infinite error.
    """
    heads, blocks = q.shape[2], indices.query_blocks
    drawn = torch.rand(CHECKED_BLOCKS - 2, 2).tolist()
    places = [(0, 0), (heads - 1, blocks - 1), *((int(a * heads), int(b * blocks)) for a, b in drawn)]
    found: list[tuple[float, float]] = []
    for head, block in places:
        start = int(indices.q_start[block])
        rows = slice(start, start + int(indices.q_len[block]))
        exact, rough = _rows(q, k, v, indices, scale, compensate, head, block, rows)
        error = float((out[0, rows, head].double() - exact).abs().max().nan_to_num(torch.inf, torch.inf))
        bound = ERROR_FACTOR * float((rough - exact).abs().max()) + torch.finfo(q.dtype).eps * float(exact.abs().max())
        found.append((error, max(bound, torch.finfo(torch.float32).tiny)))
    return max(found, key=lambda pair: pair[0] / pair[1])


def _rows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: BlockIndices,
    scale: float,
    compensate: bool,
    head: int,
    block: int,
    rows: slice,
) -> tuple[Tensor, Tensor]:
    """Compute one query block in FP64 and with low-precision weights: fp64 [q_len, D] each."""
    row, kv_head = int(indices.head_of[head]), head // (q.shape[2] // k.shape[2])
    seen = indices.token_rows(row, block)
    columns = seen.any(0).nonzero().flatten()
    keys, values = k[0, columns, kv_head].double(), v[0, columns, kv_head].double()
    bias = torch.zeros(seen.shape[0], len(columns), dtype=torch.float64, device=q.device)
    bias.masked_fill_(~seen[:, columns], -torch.inf)
    if compensate:
        skipped = (~unpack_bits(indices.bits[row, block], indices.key_blocks)).nonzero().flatten()
        means = [_means(x[0, :, kv_head].double(), indices)[skipped] for x in (k, v)]
        keys, values = torch.cat([keys, means[0]]), torch.cat([values, means[1]])
        many = indices.kv_len[skipped].double().log().expand(seen.shape[0], -1)
        bias = torch.cat([bias, many], 1)
    exact = (q[0, rows, head].double() @ keys.T * scale + bias).softmax(-1).nan_to_num() @ values
    low_keys, low_values = keys.to(q.dtype).float(), values.to(q.dtype).float()
    logits = q[0, rows, head].float() @ low_keys.T * scale + bias.float()
    rough = (logits.softmax(-1).nan_to_num().to(q.dtype).float() @ low_values).to(q.dtype)
    return exact, rough.double()


def _means(x: Tensor, indices: BlockIndices) -> Tensor:
    """Average the tokens of every key block of x [Sk, D]: [K, D]."""
    block, _ = token_owner(indices.kv_start, indices.kv_len)
    return x.new_zeros(indices.key_blocks, x.shape[1]).index_add_(0, block, x) / indices.kv_len.double()[:, None]
