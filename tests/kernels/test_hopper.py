"""The host side of the Hopper backend: where heads lie in a plane, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton exists for Linux only")

from dit_sparse.kernels.hopper import block_means, finite_values, plane_of, refusal
from dit_sparse.kernels.indices import BLOCK, random_indices

BATCH, TOKENS, HEADS, DIM = 2, 40, 3, 64


def fused(which: int) -> Tensor:
    """One of q, k and v as a fused projection leaves them."""
    return torch.randn(BATCH, TOKENS, 3, HEADS, DIM, dtype=torch.bfloat16)[:, :, which]


LAYOUTS = {
    "token by token": torch.randn(BATCH, TOKENS, HEADS, DIM, dtype=torch.bfloat16),
    "head by head": torch.randn(BATCH, HEADS, TOKENS, DIM, dtype=torch.bfloat16).transpose(1, 2),
    "fused, first": fused(0),
    "fused, last": fused(2),
    "the first tokens of more": torch.randn(BATCH, 2 * TOKENS, HEADS, DIM, dtype=torch.bfloat16)[:, :TOKENS],
    "one sample for all": torch.randn(1, TOKENS, HEADS, DIM, dtype=torch.bfloat16).expand(BATCH, -1, -1, -1),
    "one head": torch.randn(BATCH, TOKENS, 1, DIM, dtype=torch.bfloat16),
    "one token": torch.randn(BATCH, 1, HEADS, DIM, dtype=torch.bfloat16),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_plane_holds_every_token_where_it_says(name: str) -> None:
    x = LAYOUTS[name]
    plane = plane_of(x)
    assert plane is not None
    assert plane.matrix.data_ptr() == x.data_ptr(), "nothing is copied"
    batch, tokens, heads, dim = x.shape
    for b in range(batch):
        for h in range(heads):
            row, column = b * plane.rows_b + h * plane.rows_h, h * plane.columns_h
            assert torch.equal(plane.matrix[row : row + tokens, column : column + dim], x[b, :, h])


@pytest.mark.parametrize("name", LAYOUTS)
def test_tiles_that_reach_past_a_block_meet_values_of_the_call_alone(name: str) -> None:
    x = LAYOUTS[name]
    values = finite_values(x, None)
    assert torch.equal(values, x)
    plane = plane_of(values)
    assert plane is not None
    assert plane.matrix.numel() <= x.numel(), "every element of the plane is one of x"
    assert (values is x) == (name != "the first tokens of more"), "only what has to be is copied"


def test_hidden_values_become_zero() -> None:
    x = torch.full((2, 10, 1, 64), torch.nan)
    x[0, :4], x[1, :7] = 1.0, 2.0
    values = finite_values(x, torch.tensor([4, 7], dtype=torch.int32))
    assert values.sum((1, 2, 3)).tolist() == [4 * 64.0, 14 * 64.0]
    assert bool(x.isnan().any()), "the caller's tensor stays as it is"


def test_what_is_no_plane_is_none() -> None:
    whole = torch.randn(BATCH * TOKENS * HEADS * DIM + 8, dtype=torch.bfloat16)
    shifted = whole[1 : 1 + BATCH * TOKENS * HEADS * DIM].view(BATCH, TOKENS, HEADS, DIM)
    assert plane_of(shifted) is None, "the copy engine wants 16 bytes"
    narrow = torch.randn(BATCH, TOKENS, HEADS * DIM + 4, dtype=torch.bfloat16)[..., : HEADS * DIM]
    assert plane_of(narrow.unflatten(-1, (HEADS, DIM))) is None, "so do its rows"
    repeated = torch.randn(BATCH, 1, HEADS, DIM, dtype=torch.bfloat16).expand(-1, TOKENS, -1, -1)
    assert plane_of(repeated) is None, "rows must follow one another"


def test_a_cpu_is_refused_with_a_reason() -> None:
    q = LAYOUTS["token by token"]
    indices = random_indices(BATCH, HEADS, [TOKENS], [TOKENS])
    assert refusal(q, q, q, indices) == "tensors must be on an NVIDIA GPU, got cpu"


def test_means_are_padded_to_whole_tiles_that_weigh_nothing() -> None:
    tokens = 3 * BLOCK + 20
    k, v = (torch.randn(BATCH, tokens, HEADS, DIM) for _ in range(2))
    indices = random_indices(BATCH, HEADS, [tokens], [tokens])
    means = block_means(k, v, indices, None)
    assert means.k.shape == means.v.shape == (BATCH, HEADS, BLOCK, DIM)
    torch.testing.assert_close(means.k[:, :, 3], k[:, 3 * BLOCK :].mean(1))
    torch.testing.assert_close(means.v[:, :, 0], v[:, :BLOCK].mean(1))
    assert torch.equal(means.log_counts[:, :4].exp().round(), torch.tensor([[128.0, 128.0, 128.0, 20.0]] * BATCH))
    assert bool((means.log_counts[:, 4:] == -torch.inf).all())
    assert not bool(means.v[:, :, 4:].any()), "what has no weight must still be finite"
