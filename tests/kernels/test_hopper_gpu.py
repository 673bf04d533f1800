"""The Hopper backend on a real H100 or H200: every build of its kernel, and the edges of what it takes."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor

from dit_sparse.kernels import reference
from dit_sparse.kernels.backends import BACKENDS, block_attention, choose
from dit_sparse.kernels.gate import CASES, Case, build, check
from dit_sparse.kernels.indices import (
    BLOCK,
    BlockIndices,
    from_block_mask,
    from_token_mask,
    random_indices,
    segment_blocks,
)
from dit_sparse.kernels.row_errors import row_errors
from tests.kernels.far_logits import check_far_logits

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
    ),
]

TAKEN = tuple(case for case in CASES if case.head_dim in (64, 128))
HALF = (torch.bfloat16, torch.float16)


def case_of(head_dim: int, tiles: bool, ragged: bool, lengths: bool, compensate: bool) -> Case:
    """Make a case of one build; many rows, so that lists have none, one and several full and partial blocks."""
    segments = (300, 77, 640) if ragged else (1024,)
    case = Case(
        "build", "", head_dim, 2, 2, 2, segments, segments, density=0.35, partial=0.5 if tiles else 0.0,
        compensate=compensate,
    )  # fmt: skip
    return replace(case, kv_lengths=(sum(segments) - 90, 200)) if lengths else case


# Each is a build of its own, and an assembler has been seen to break one and spare the next.
BUILDS = [
    (head_dim, tiles, ragged, lengths, compensate)
    for head_dim, tiles, ragged, lengths, compensate in product((64, 128), *[(False, True)] * 4)
]


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("build", BUILDS, ids=str)
def test_every_build_meets_fp64(build: tuple[int, bool, bool, bool, bool], dtype: torch.dtype) -> None:
    outcome = check(BACKENDS["hopper"].run, case_of(*build), dtype, "cuda")
    assert outcome.passed, outcome


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("case", TAKEN, ids=lambda case: case.name)
def test_the_table_meets_fp64(case: Case, dtype: torch.dtype) -> None:
    outcome = check(BACKENDS["hopper"].run, case, dtype, "cuda")
    assert outcome.passed, outcome


@pytest.mark.parametrize("case", [case for case in CASES if case.head_dim not in (64, 128)], ids=lambda case: case.name)
def test_other_heads_are_refused(case: Case) -> None:
    q, k, v, indices, _ = build(case, torch.bfloat16)
    found = choose("auto", q.cuda(), k.cuda(), v.cuda(), indices.to("cuda"))
    assert found.name == "triton"
    with pytest.raises(ValueError, match="head_dim must be one of 64, 128"):
        block_attention(q.cuda(), k.cuda(), v.cuda(), indices.to("cuda"), backend="hopper")


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("compensate", [False, True])
@pytest.mark.parametrize("partial", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_logits_far_from_those_of_the_first_block(
    head_dim: int, partial: float, compensate: bool, dtype: torch.dtype
) -> None:
    check_far_logits(BACKENDS["hopper"].run, head_dim, partial, compensate, dtype, "cuda")


@pytest.mark.parametrize("head_dim", [64, 128])
def test_the_lse_of_visited_blocks_far_under_a_hidden_key(head_dim: int) -> None:
    """Means weigh enough for the sum of all, while the visible keys alone are lost under the shift."""
    q, k = (0.1 * torch.randn(1, tokens, 1, head_dim) for tokens in (BLOCK, 4 * BLOCK))
    v = torch.randn(1, 4 * BLOCK, 1, head_dim)
    scale = head_dim**-0.5
    q[..., 0] = 1.0 / scale
    k[..., 0] = torch.tensor([0.0] * BLOCK + [190.0] * (3 * BLOCK))[None, :, None]
    k[0, 0, 0, 0] = 200.0
    q, k, v = q.bfloat16(), k.bfloat16(), v.bfloat16()
    mask = torch.zeros(1, BLOCK, 4 * BLOCK, dtype=torch.bool)
    mask[..., 1:BLOCK] = True
    indices = from_token_mask(
        mask, torch.zeros(1, dtype=torch.int32), *segment_blocks([BLOCK]), *segment_blocks([4 * BLOCK])
    )
    _, lse, computed = reference.attention(q.double(), k.double(), v.double(), indices, scale, None, True)
    _, found, found_computed = BACKENDS["hopper"].run(
        q.cuda(), k.cuda(), v.cuda(), indices.to("cuda"), scale, None, True
    )
    torch.testing.assert_close(found.cpu().double(), lse, atol=1e-3, rtol=0)
    torch.testing.assert_close(found_computed.cpu().double(), computed, atol=1e-3, rtol=0)


SHARED = """
import torch
from dit_sparse.kernels.backends import BACKENDS
from dit_sparse.kernels.indices import random_indices

compensate = {compensate}
q, k, v = (torch.randn(1, 32768, 12, 128, device="cuda", dtype=torch.bfloat16) for _ in range(3))
indices = random_indices(1, 12, [32768], [32768], density=0.25, seed={seed}).to("cuda")
first, _, _ = BACKENDS["hopper"].run(q, k, v, indices, 128**-0.5, None, compensate)
for _ in range(150):
    again, _, _ = BACKENDS["hopper"].run(q, k, v, indices, 128**-0.5, None, compensate)
    assert torch.equal(again, first)
"""


@pytest.mark.parametrize("compensate", [False, True])
def test_processes_that_share_the_gpu_leave_each_other_alone(compensate: bool) -> None:
    """The GPU goes from one process to another in the middle of a launch, and everything on chip with it."""
    scripts = [SHARED.format(compensate=compensate, seed=int(torch.randint(1 << 30, ()))) for _ in range(3)]
    running = [
        subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True) for script in scripts
    ]
    try:
        said = [process.communicate(timeout=120)[1] for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0, 0, 0], said


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("partial", [0.0, 0.4])
def test_programs_go_from_item_to_item(head_dim: int, partial: float) -> None:
    """More items than multiprocessors, of all lengths, some without a block; twice the same bits."""
    heads, tokens = 6, 96 * BLOCK
    q, k, v = (torch.randn(2, tokens, heads, head_dim, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    seed = int(torch.randint(1 << 30, ()))
    indices = random_indices(
        2, heads, [tokens], [tokens], density=0.15, partial=partial, empty_row=True, seed=seed
    ).to("cuda")  # fmt: skip
    out, lse = block_attention(q, k, v, indices, backend="hopper")
    twin, twin_lse = block_attention(q, k, v, indices, backend="triton")
    assert torch.equal(lse.isinf(), twin_lse.isinf())
    assert float((out.float() - twin.float()).abs().max()) < 0.05
    assert float((lse - twin_lse)[lse.isfinite()].abs().max()) < 1e-4
    for _ in range(2):
        again, again_lse = block_attention(q, k, v, indices, backend="hopper")
        assert torch.equal(again, out)
        assert torch.equal(again_lse, lse)


def test_tensors_of_more_than_two_to_the_31_elements() -> None:
    heads, head_dim, blocks = 48, 128, 2912
    tokens = BLOCK * blocks
    assert tokens * heads * head_dim > 2**31
    q, k, v = (torch.randn(1, tokens, heads, head_dim, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    place = torch.arange(blocks, device="cuda")
    band = ((place[:, None] - place).abs() < 2)[None]
    start, length = segment_blocks([tokens])
    indices = from_block_mask(band, torch.zeros(heads, dtype=torch.int32), start, length, start, length)
    out, _ = block_attention(q, k, v, indices, backend="hopper")
    error, allowed = row_errors(out, q, k, v, indices, head_dim**-0.5, False)
    assert error <= allowed
    last = _rows(q, k, v, slice(tokens - BLOCK, tokens), slice(tokens - 2 * BLOCK, tokens), heads - 1)
    torch.testing.assert_close(out[0, -BLOCK:, -1].double(), last, atol=0.02, rtol=0.02)


@pytest.mark.parametrize("by_head", [False, True])
def test_what_lies_behind_a_slice_does_not_matter(by_head: bool) -> None:
    shape = (2, 2, 512, 64) if by_head else (2, 512, 2, 64)
    whole = torch.full(shape, torch.nan, device="cuda", dtype=torch.bfloat16)
    x = whole.transpose(1, 2)[:, :300] if by_head else whole[:, :300]
    x.copy_(torch.randn(2, 300, 2, 64))
    out, lse = block_attention(x, x, x, everything(4, 300, 300), backend="hopper")
    assert not bool(out.isnan().any())
    assert not bool(lse.isnan().any())


@pytest.mark.parametrize(("q_tokens", "k_tokens"), [(1, 1), (1, 700), (700, 1), (129, 127)])
def test_very_short_sides(q_tokens: int, k_tokens: int) -> None:
    q = torch.randn(1, q_tokens, 2, 128, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(1, k_tokens, 2, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    indices = everything(2, q_tokens, k_tokens)
    out, lse = block_attention(q, k, v, indices, backend="hopper")
    for head in range(2):
        exact = _rows(q, k, v, slice(None), slice(None), head)
        torch.testing.assert_close(out[0, :, head].double(), exact, atol=0.02, rtol=0.02)
        logits = q[0, :, head].double() @ k[0, :, head].double().T * 128**-0.5
        torch.testing.assert_close(lse[0, :, head].double(), logits.logsumexp(-1), atol=1e-3, rtol=1e-4)


def everything(heads: int, q_tokens: int, k_tokens: int) -> BlockIndices:
    (q_start, q_len), (k_start, k_len) = segment_blocks([q_tokens]), segment_blocks([k_tokens])
    mask = torch.ones(1, len(q_start), len(k_start), dtype=torch.bool, device="cuda")
    return from_block_mask(mask, torch.zeros(heads, dtype=torch.int32), q_start, q_len, k_start, k_len)


def _rows(q: Tensor, k: Tensor, v: Tensor, queries: slice, keys: slice, head: int) -> Tensor:
    logits = q[0, queries, head].double() @ k[0, keys, head].double().T * q.shape[-1] ** -0.5
    return logits.softmax(-1) @ v[0, keys, head].double()
