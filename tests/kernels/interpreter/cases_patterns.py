"""Every pattern through the Triton kernel in Triton's interpreter; test_other_processes starts this file."""

from __future__ import annotations

import pytest
import torch

import dit_sparse as ds
from tests.core.everything import EVERYTHING
from tests.core.examples import EXAMPLES

GRID = ds.Grid(3, 7, 11, prefix=4, suffix=9)


@pytest.mark.parametrize("pattern", [one for many in EVERYTHING.values() for one in many], ids=str)
def test_everything_is_dense(pattern: ds.Pattern) -> None:
    q, k, v = (torch.randn(1, GRID.tokens, heads, 16) for heads in (2, 1, 1))
    out = ds.sparse_attention(q, k, v, pattern, GRID, backend="triton")
    by_head = [x.double().transpose(1, 2) for x in (q, k, v)]
    expected = torch.nn.functional.scaled_dot_product_attention(*by_head, enable_gqa=True).transpose(1, 2)
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("pattern", [one for many in EXAMPLES.values() for one in many], ids=str)
def test_kernels_agree_on_what_a_pattern_keeps(pattern: ds.Pattern) -> None:
    q, k, v = (torch.randn(1, GRID.tokens, 2, 16) for _ in range(3))
    triton, reference = (ds.sparse_attention(q, k, v, pattern, GRID, backend=name) for name in ("triton", "reference"))
    torch.testing.assert_close(triton, reference, atol=1e-5, rtol=1e-5)
