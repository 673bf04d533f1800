"""Check sparse attention at full size: some rows against FP64, from the definition and not from the kernel's lists."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_sparse.attention import SparseAttention
from dit_sparse.grid import Grid
from dit_sparse.kernels.gate import ERROR_FACTOR
from dit_sparse.order import Layout
from dit_sparse.patterns import Pattern, PatternState, StaticPattern
from dit_sparse.patterns.base import variant_of
from dit_sparse.runner import exact_attention
from dit_sparse.selection import Selection

ROWS = 48


def check_rows(
    pattern: Pattern, grid: Grid, heads: int, head_dim: int, device: torch.device, dtype: torch.dtype = torch.bfloat16
) -> tuple[float, float]:
    """Return the largest error of sampled output rows on fresh random q, k, v [1, grid.tokens, heads, head_dim], and
    what is allowed: ERROR_FACTOR times the error of torch's own masked attention in this dtype, plus one rounding.
    """
    q, k, v = (torch.randn(1, grid.tokens, heads, head_dim, device=device, dtype=dtype) for _ in range(3))
    attend = SparseAttention(pattern)
    out = attend(q, k, v, grid)
    assert isinstance(out, Tensor)
    head = int(torch.randint(heads, ()))
    rows = torch.randperm(grid.video_tokens, device=device)[:ROWS]
    one_q, one_k, one_v = q[0, grid.prefix + rows, head], k[0, :, head], v[0, :, head]
    if isinstance(pattern, StaticPattern):
        bias, more_k, more_v = _static_bias(pattern, grid, heads, rows, head), one_k[:0], one_v[:0]
    else:
        bias, more_k, more_v = _chosen_bias(pattern, grid, q, k, v, rows, head)
    keys, values = torch.cat([one_k.double(), more_k.double()]), torch.cat([one_v.double(), more_v.double()])
    exact = (one_q.double() @ keys.T * head_dim**-0.5 + bias).softmax(-1).nan_to_num() @ values
    low_q, low_k, low_v, low_bias = (x.to(dtype)[None, None] for x in (one_q, keys, values, bias))
    rough = F.scaled_dot_product_attention(low_q, low_k, low_v, low_bias).nan_to_num()
    allowed = ERROR_FACTOR * float((rough[0, 0].double() - exact).abs().max())
    allowed += torch.finfo(dtype).eps * float(exact.abs().max())
    return float((out[0, grid.prefix + rows, head].double() - exact).abs().max()), allowed


def _static_bias(pattern: StaticPattern, grid: Grid, heads: int, rows: Tensor, head: int) -> Tensor:
    """Return 0 or -inf for each of the video tokens `rows` and each key in the grid's order: fp64 [rows, tokens]."""
    variants = pattern.variants(grid)
    rule = variants[variant_of(head, heads, len(variants))].token_rule(grid, rows.device)
    bias = torch.zeros(len(rows), grid.tokens, dtype=torch.float64, device=rows.device)
    if not pattern.reads_text:
        bias.fill_(-torch.inf)
    seen = rule(rows[:, None], torch.arange(grid.video_tokens, device=rows.device)[None])
    bias[:, grid.prefix : grid.prefix + grid.video_tokens].masked_fill_(~seen, -torch.inf)
    return bias


def _chosen_bias(
    pattern: Pattern, grid: Grid, q: Tensor, k: Tensor, v: Tensor, rows: Tensor, head: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the bias over keys in the grid's order and, after them, over block means: fp64 [rows, tokens + blocks].

    The means [blocks, D] of keys and values come along: none where skipped blocks are not stood for.
    """
    layout = pattern.token_order().layout(grid, q.device)
    q, k, v = layout.to_kernel(q), layout.to_kernel(k), layout.to_kernel(v)
    scale, shared = q.shape[-1] ** -0.5, {}  # type: ignore[var-annotated]
    exact = exact_attention(k, v, layout, scale, None, "auto", shared)
    selection = pattern.select(q, k, grid, PatternState(layout, scale, shared=shared, v=v, exact=exact))
    indices = selection.indices
    row_of_head = int(indices.head_of[head])
    # kernel position and, where a head has an order of its own, place in it, of every token
    of_query, of_key = _places(selection, layout, head)
    blocks = indices.key_blocks if selection.compensate else 0
    bias = torch.full((len(rows), grid.tokens + blocks), -torch.inf, dtype=torch.float64, device=q.device)
    visited = indices.block_mask()[row_of_head]
    for number, row in enumerate((grid.prefix + rows).tolist()):
        place = int(of_query[row])
        block = int(((indices.q_start <= place) & (place < indices.q_start + indices.q_len)).nonzero())
        seen = indices.token_rows(row_of_head, block)[place - int(indices.q_start[block])][of_key]
        bias[number, : grid.tokens].masked_fill_(seen, 0.0)
        if blocks:
            bias[number, grid.tokens :] = indices.kv_len.double().log().masked_fill(visited[block], -torch.inf)
    if not blocks:
        return bias, k[0, :0, head], v[0, :0, head]
    by_place = torch.argsort(of_key)  # token in the grid's order of every place
    order = torch.arange(grid.tokens, device=q.device) if layout.order is None else layout.order
    token = torch.argsort(order)[by_place]  # its kernel position
    means = []
    for x in (k, v):
        sums = torch.zeros(blocks, x.shape[-1], dtype=torch.float64, device=q.device)
        owner = torch.repeat_interleave(torch.arange(blocks, device=q.device), indices.kv_len.long())
        means.append(sums.index_add_(0, owner, x[0, token, head].double()) / indices.kv_len.double()[:, None])
    return bias, means[0], means[1]


def _places(selection: Selection, layout: Layout, head: int) -> tuple[Tensor, Tensor]:
    """Return for each token in the grid's order its place among the kernel's queries and keys: int64 [tokens] each."""
    tokens, device = layout.grid.tokens, layout.start.device
    kernel_place = torch.arange(tokens, device=device) if layout.inverse is None else layout.inverse
    order = selection.head_order
    if order is None:
        return kernel_place, kernel_place
    found = []
    for one in (order.q, order.k):
        place = torch.arange(tokens, device=device)
        place[: one.shape[2]] = torch.argsort(one[0, head])
        found.append(place[kernel_place])
    return found[0], found[1]
