"""A pattern that keeps everything is dense attention, on every backend that runs here."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import dit_sparse as ds
from dit_sparse.patterns import PATTERNS
from tests.core.everything import CANNOT, EVERYTHING

GRID = ds.Grid(3, 7, 11, prefix=4, suffix=9)  # primes; two blocks of video


def test_every_pattern_is_there_or_says_why_not() -> None:
    assert set(EVERYTHING) | set(CANNOT) == set(PATTERNS)
    assert not set(EVERYTHING) & set(CANNOT)


@pytest.mark.parametrize("backend", ["cpu", "reference"])  # Triton: tests/kernels/interpreter, and the gpu tests
@pytest.mark.parametrize("pattern", [one for many in EVERYTHING.values() for one in many], ids=str)
def test_everything_is_dense(pattern: ds.Pattern, backend: str) -> None:
    q, k, v = (torch.randn(2, GRID.tokens, heads, 16) for heads in (4, 2, 2))
    out, lse = ds.sparse_attention(q, k, v, pattern, GRID, backend=backend, return_lse=True)
    by_head = [x.double().transpose(1, 2) for x in (q, k, v)]
    expected = F.scaled_dot_product_attention(*by_head, enable_gqa=True).transpose(1, 2)
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)
    logits = torch.einsum("bqhd,bkhd->bqhk", q, k.repeat_interleave(2, 2)) / 4
    torch.testing.assert_close(lse, logits.logsumexp(-1), atol=1e-5, rtol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("pattern", [one for many in EVERYTHING.values() for one in many], ids=str)
def test_everything_is_dense_on_a_gpu(pattern: ds.Pattern) -> None:
    q, k, v = (torch.randn(2, GRID.tokens, heads, 64, device="cuda", dtype=torch.bfloat16) for heads in (4, 2, 2))
    out = ds.sparse_attention(q, k, v, pattern, GRID, backend="triton")
    exact, rough = (
        F.scaled_dot_product_attention(*(x.to(dtype).transpose(1, 2) for x in (q, k, v)), enable_gqa=True)
        for dtype in (torch.float64, torch.bfloat16)
    )
    allowed = 3 * (rough.double() - exact).abs().max() + torch.finfo(torch.bfloat16).eps * exact.abs().max()
    assert isinstance(out, torch.Tensor)
    assert (out.double().transpose(1, 2) - exact).abs().max() <= allowed
