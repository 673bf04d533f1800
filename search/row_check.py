"""Check sparse attention at full size: some rows against FP64, from the definition and not from block lists."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_sparse.attention import SparseAttention
from dit_sparse.grid import Grid
from dit_sparse.kernels.gate import ERROR_FACTOR
from dit_sparse.patterns import Pattern, PatternState, StaticPattern

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
    seen = _seen(pattern, grid, q, k, rows, head)
    one_q, one_k, one_v = q[0, grid.prefix + rows, head], k[0, :, head], v[0, :, head]
    score = one_q.double() @ one_k.double().T * head_dim**-0.5
    exact = score.masked_fill(~seen, -torch.inf).softmax(-1) @ one_v.double()
    rough = F.scaled_dot_product_attention(one_q[None, None], one_k[None, None], one_v[None, None], seen[None, None])
    allowed = ERROR_FACTOR * float((rough[0, 0].double() - exact).abs().max())
    allowed += torch.finfo(dtype).eps * float(exact.abs().max())
    return float((out[0, grid.prefix + rows, head].double() - exact).abs().max()), allowed


def _seen(pattern: Pattern, grid: Grid, q: Tensor, k: Tensor, rows: Tensor, head: int) -> Tensor:
    """Return which keys, in the grid's order, the video tokens `rows` of one head see: bool [rows, grid.tokens]."""
    video = slice(grid.prefix, grid.prefix + grid.video_tokens)
    seen = torch.ones(len(rows), grid.tokens, dtype=torch.bool, device=q.device)
    if isinstance(pattern, StaticPattern):
        pattern_rule = pattern.token_rule(grid, q.device)
        seen[:, video] = pattern_rule(rows[:, None], torch.arange(grid.video_tokens, device=q.device)[None])
        return seen
    layout = pattern.token_order().layout(grid, q.device)
    state = PatternState(layout, q.shape[-1] ** -0.5)
    indices = pattern.select(layout.to_kernel(q), layout.to_kernel(k), grid, state).indices
    kernel_place = torch.arange(grid.tokens, device=q.device) if layout.inverse is None else layout.inverse
    for number, row in enumerate((grid.prefix + rows).tolist()):
        place = int(kernel_place[row])
        block = int(((indices.q_start <= place) & (place < indices.q_start + indices.q_len)).nonzero())
        in_kernel_order = indices.token_rows(int(indices.head_of[head]), block)[place - int(indices.q_start[block])]
        seen[number] = in_kernel_order[kernel_place]
    return seen
