"""Masks of text on a real GPU: against FP64, read once, and no waiting after that."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import dit_sparse as ds
from dit_sparse.attention import Layer, dense_attention
from dit_sparse.options import Options

pytestmark = pytest.mark.gpu

GRID = ds.Grid(5, 12, 20, prefix=150, suffix=40)  # text of two blocks
VIDEO = slice(GRID.prefix, GRID.prefix + GRID.video_tokens)
PATTERN = ds.Neighborhood(window=(3, 5, 7))


def text_mask(kind: str) -> Tensor:
    """Return which keys are real, bool [2, N]: text padded at its end, in front, or anywhere."""
    real = torch.ones(2, GRID.tokens, dtype=torch.bool, device="cuda")
    if kind == "end":
        real[0, -30:] = real[1, -7:] = False
    elif kind == "front":
        real[0, :100] = real[1, :3] = False
    else:
        scattered = torch.rand(real.shape, device="cuda") < 0.5
        scattered[:, VIDEO] = scattered[:, :1] = True
        real &= scattered
    return real


def bound_of(mask: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, float]:
    """Return the exact result and three times the error of torch's own masked attention."""
    exact = dense_attention(q.double(), k.double(), v.double(), mask)
    rough = dense_attention(q, k, v, mask if mask.dtype == torch.bool else mask.to(q.dtype))
    return exact, 3.0 * float((rough.double() - exact).abs().nan_to_num().max())


@pytest.mark.parametrize("queries", ["all", "video"])
@pytest.mark.parametrize("kind", ["end", "front", "anywhere"])
def test_padded_calls_meet_fp64_and_wait_only_once(kind: str, queries: str) -> None:
    real = text_mask(kind)
    schedule = ds.Schedule(ds.Plan.of(PATTERN), options=Options(min_tokens=0, strict=True, backend="triton"))
    layer, source = Layer("layer", 0, schedule, dense_attention), object()
    q, k, v = (torch.randn(2, GRID.tokens, 4, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    allowed = PATTERN.token_mask(GRID).cuda() & real[:, None]
    rows = real
    if queries == "video":
        q, allowed, rows = q[:, VIDEO], allowed[:, VIDEO], real[:, VIDEO]
    exact, bound = bound_of(allowed[:, None], q, k, v)
    poisoned_k, poisoned_v = (x.masked_fill(~real[:, :, None, None], torch.nan) for x in (k, v))
    schedule.start_forward(GRID, mask_source=source)
    out = schedule.attend(layer, q, poisoned_k, poisoned_v, real[:, None, None])
    assert float((out.double() - exact)[rows].abs().max()) <= bound
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        schedule.start_forward(GRID, mask_source=source)
        again = schedule.attend(layer, q, poisoned_k, poisoned_v, real[:, None, None])
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    assert torch.equal(again, out)


def test_biases_and_text_rows_of_their_own_meet_fp64() -> None:
    """Chroma's mask: 1 is added where query and key are real."""
    real = text_mask("anywhere").float()
    mask = real[:, None, :, None] * real[:, None, None]
    schedule = ds.Schedule(ds.Plan.of(PATTERN), options=Options(min_tokens=0, strict=True, backend="triton"))
    layer = Layer("layer", 0, schedule, dense_attention)
    q, k, v = (torch.randn(2, GRID.tokens, 4, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    exact, bound = bound_of(mask.double().masked_fill(~PATTERN.token_mask(GRID).cuda(), -torch.inf), q, k, v)
    schedule.start_forward(GRID, mask_source=object())
    out = schedule.attend(layer, q, k, v, mask.to(q.dtype))
    assert float((out.double() - exact).abs().max()) <= bound
