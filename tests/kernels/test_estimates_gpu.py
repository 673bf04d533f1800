"""The Triton forms of pooling, choice and block mass on a real GPU: small against fp64, large against their twins."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch

from dit_sparse.kernels.block_scores import block_scores, slow_block_scores
from dit_sparse.kernels.choice import Choice, Rule, choose_blocks, slow_choose
from dit_sparse.kernels.indices import segment_blocks, unpack_bits
from dit_sparse.kernels.mass import block_log_mass, block_mass, slow_block_log_mass, slow_block_mass
from dit_sparse.kernels.pool import pool_blocks, pool_both, slow_pool_blocks
from tests.kernels.choice_cases import CHOICE_CASES, ChoiceCase, check_choice
from tests.kernels.estimate_cases import TOKEN_CASES, TokenCase, check_mass, check_pool, check_pool_both, check_scores

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU; deselected by default through the marker"),
]

BLOCKS, HEADS = 600, 40  # Wan at 720p


@pytest.mark.parametrize(
    ("dtype", "out_dtype"),
    # exact sums; what models hold, as scores and as compensation want it; the other half type
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
    ],
    ids=str,
)
@pytest.mark.parametrize("case", TOKEN_CASES, ids=lambda case: case.reason)
def test_pooling_meets_fp64(case: TokenCase, dtype: torch.dtype, out_dtype: torch.dtype) -> None:
    check_pool(pool_blocks, case, dtype, out_dtype, "cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)  # exact sums; what models hold
@pytest.mark.parametrize("case", TOKEN_CASES, ids=lambda case: case.reason)
def test_pooling_of_both_meets_fp64(case: TokenCase, dtype: torch.dtype) -> None:
    check_pool_both(pool_both, case, dtype, "cuda")


@pytest.mark.parametrize("case", TOKEN_CASES, ids=lambda case: case.reason)
def test_scores_of_blocks_meet_fp64(case: TokenCase) -> None:
    check_scores(block_scores, case, "cuda")


def test_scores_of_a_long_video_ignore_the_setting_of_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", True)
    mean_q, mean_k = torch.randn(2, 1, BLOCKS, HEADS, 128, device="cuda")
    start, length = (blocks.cuda() for blocks in segment_blocks((128 * BLOCKS - 50,)))
    found = block_scores(mean_q, mean_k, start, length, 128**-0.5)
    exact = slow_block_scores(mean_q.double(), mean_k.double(), start, length, 128**-0.5)
    assert float((found - exact).abs().max()) < 5e-6  # a single product of tf32 errs by about .001


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.int8], ids=str)  # all it takes
@pytest.mark.parametrize("case", TOKEN_CASES, ids=lambda case: case.reason)
def test_masses_meet_fp64(case: TokenCase, dtype: torch.dtype) -> None:
    check_mass(block_log_mass, block_mass, case, dtype, "cuda")


@pytest.mark.parametrize("case", CHOICE_CASES, ids=lambda case: f"{case.rule}: {case.reason}")
def test_choice_meets_its_definition(case: ChoiceCase) -> None:
    check_choice(case, "cuda")


def test_pooling_of_a_long_video() -> None:
    x = torch.randn(1, 128 * BLOCKS - 50, HEADS, 128, device="cuda", dtype=torch.bfloat16)
    start, length = (blocks.cuda() for blocks in segment_blocks((x.shape[1],)))
    torch.testing.assert_close(pool_blocks(x, start, length), slow_pool_blocks(x, start, length), rtol=1e-5, atol=1e-6)


def test_addresses_past_two_to_the_31() -> None:
    x = torch.zeros(1, 128 * 5000, 32, 128, device="cuda", dtype=torch.bfloat16)  # 2.6e9 elements
    start, length = (blocks.cuda() for blocks in segment_blocks((x.shape[1],)))
    x[:, -128:] = torch.randn(128, 32, 128, device="cuda")
    assert float(pool_blocks(x, start, length)[:, :-1].abs().max()) == 0.0
    torch.testing.assert_close(pool_blocks(x, start, length)[:, -1], x[:, -128:].float().mean(1), rtol=1e-5, atol=1e-6)
    ours = block_log_mass(x[:, -3:], x, start[-2:], length[-2:], 0.1)
    twin = slow_block_log_mass(x[:, -3:], x[:, -256:], start[:2], length[:2], 0.1)
    torch.testing.assert_close(ours, twin, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("rule", ["keep", "mass", "threshold"])
def test_choice_for_a_long_video(rule: str) -> None:
    score = torch.randn(HEADS, BLOCKS, BLOCKS, device="cuda") * 3
    rows = torch.arange(BLOCKS, device="cuda")
    tokens = torch.full((BLOCKS + 4,), 128, device="cuda", dtype=torch.int32)
    full = Rule(
        counted=BLOCKS - 4, q_len=tokens, kv_len=tokens[:BLOCKS],
        keep=torch.randint(0, BLOCKS, (HEADS, BLOCKS), device="cuda", dtype=torch.int32) if rule == "keep" else None,
        mass=0.9 if rule == "mass" else None, threshold=1.0 if rule == "threshold" else None, at_least=2,
        always=rows >= BLOCKS - 4, forced=rows[:, None] == rows,
    )  # fmt: skip
    ours, twin = choose_blocks(score, **vars(full)), slow_choose(score, full)
    differs = (unpack_bits(ours.bits, BLOCKS) != unpack_bits(twin.bits, BLOCKS)).sum(-1)
    # Where a sum meets the goal, or a score the threshold, to the last bit, the two may differ by that one block.
    assert int(differs.max()) <= (0 if rule == "keep" else 1)
    assert float((differs > 0).float().mean()) < 0.01
    assert float((ours.pairs - twin.pairs).abs().max()) <= 128 * 128 * int(differs.sum(-1).max())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8], ids=str)  # of models; of the low-bit estimate
def test_masses_of_a_long_video(dtype: torch.dtype) -> None:
    segments = (128 * BLOCKS - 50, 77)
    q, k = (torch.randn(1, size, HEADS, 128, device="cuda") for size in (200, sum(segments)))
    factors = {}
    if dtype == torch.int8:
        q, k = ((x * 40).round().clamp(-127, 127) for x in (q, k))
        factors = {"q_scale": torch.rand(q.shape[:3], device="cuda") / 40}
        factors |= {"k_scale": torch.rand(k.shape[:3], device="cuda") / 40}
    q, k = q.to(dtype), k.to(dtype)
    start, length = (blocks.cuda() for blocks in segment_blocks(segments))
    few, few_len = (blocks.cuda() for blocks in segment_blocks((200,)))
    kv_lengths = torch.tensor([sum(segments) - 30], device="cuda", dtype=torch.int32)
    given = (start, length, 128**-0.5, kv_lengths)
    ours = block_log_mass(q, k, *given, **factors)
    torch.testing.assert_close(ours, slow_block_log_mass(q, k, *given, **factors), rtol=1e-4, atol=1e-4)
    lse = ours.logsumexp(-1).transpose(1, 2)
    mass = block_mass(q, k, lse, few, few_len, *given, **factors)
    twin = slow_block_mass(q, k, lse, few, few_len, *given, **factors)
    torch.testing.assert_close(mass, twin, rtol=1e-3, atol=1e-5)


def _score_and_keep() -> tuple[torch.Tensor, Callable[[torch.Tensor], Choice]]:
    kv_len = torch.full((70,), 128, device="cuda", dtype=torch.int32)
    keep = torch.full((3,), 9, device="cuda", dtype=torch.int32)
    rule = partial(choose_blocks, counted=70, q_len=kv_len[:9], kv_len=kv_len, keep=keep)
    return torch.randn(3, 8, 70, device="cuda"), rule


def test_no_host_sync_and_one_cuda_graph() -> None:
    score, choose = _score_and_keep()
    x = torch.randn(1, 300, 2, 64, device="cuda", dtype=torch.bfloat16)
    start, length = (blocks.cuda() for blocks in segment_blocks((300,)))
    lse = torch.randn(1, 300, 2, device="cuda")

    def everything() -> tuple[torch.Tensor, ...]:
        blocks = (start, length)
        sums = block_mass(x, x, lse, *blocks, *blocks, 0.125)
        scores = block_scores(*pool_both(x, x, *blocks, 2), *blocks, 0.125)
        chosen = choose(score)
        return pool_blocks(x, *blocks), scores, chosen.bits, chosen.pairs, block_log_mass(x, x, *blocks, 0.125), sums

    expected = everything()
    torch.cuda.synchronize()
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        everything()
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = everything()
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(captured, expected, strict=True))
