"""The slow forms of pooling, choice and block mass against plain loops, and what their callers are told."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_sparse.kernels.block_scores import block_scores
from dit_sparse.kernels.choice import choose_blocks
from dit_sparse.kernels.indices import unpack_bits
from dit_sparse.kernels.mass import block_log_mass, block_mass
from dit_sparse.kernels.pool import log_counts, pool_blocks, pool_both
from tests.kernels.choice_cases import CHOICE_CASES, ChoiceCase, check_choice, draw_choice
from tests.kernels.estimate_cases import TOKEN_CASES, TokenCase, check_mass, check_pool, check_pool_both, check_scores

KV_LEN = torch.tensor([128, 128, 5], dtype=torch.int32)
START = torch.tensor([0, 128, 256], dtype=torch.int32)


@pytest.mark.parametrize(
    ("dtype", "out_dtype"),
    # exact sums; halves kept in fp32 for scores; halves rounded to halves for compensation
    [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.float16, torch.float16)],
    ids=str,
)
@pytest.mark.parametrize("case", TOKEN_CASES, ids=lambda case: case.reason)
def test_pooling_meets_fp64(case: TokenCase, dtype: torch.dtype, out_dtype: torch.dtype) -> None:
    check_pool(pool_blocks, case, dtype, out_dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)  # exact sums; what models hold
@pytest.mark.parametrize("case", TOKEN_CASES, ids=lambda case: case.reason)
def test_pooling_of_both_meets_fp64(case: TokenCase, dtype: torch.dtype) -> None:
    check_pool_both(pool_both, case, dtype)


@pytest.mark.parametrize("case", TOKEN_CASES, ids=lambda case: case.reason)
def test_scores_of_blocks_meet_fp64(case: TokenCase) -> None:
    check_scores(block_scores, case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)  # plain, rounded, with factors
@pytest.mark.parametrize("case", TOKEN_CASES, ids=lambda case: case.reason)
def test_masses_meet_fp64(case: TokenCase, dtype: torch.dtype) -> None:
    check_mass(block_log_mass, block_mass, case, dtype)


@pytest.mark.parametrize("case", CHOICE_CASES, ids=lambda case: f"{case.rule}: {case.reason}")
def test_choice_meets_its_definition(case: ChoiceCase) -> None:
    check_choice(case)


@settings(max_examples=40, deadline=None)
@given(
    rule=st.sampled_from([("keep", 0.0), ("mass", 0.6), ("mass", 0.97), ("threshold", 0.4)]),
    keys=st.integers(1, 40),
    at_least=st.integers(0, 5),
    shares=st.tuples(*[st.sampled_from([0.0, 0.2, 0.9])] * 3),
    ties=st.booleans(),
)
def test_choice_meets_its_definition_for_any_mixture(
    rule: tuple[str, float], keys: int, at_least: int, shares: tuple[float, float, float], ties: bool
) -> None:
    always, forced, hidden = shares
    check_choice(ChoiceCase("any", *rule, keys, 2, 2, 1, at_least, always, forced, hidden, ties))


def test_more_mass_keeps_what_less_keeps() -> None:
    score, keywords = draw_choice(ChoiceCase("nested", "mass", 0.5, forced=0.1))
    kept = []
    for mass in (0.2, 0.5, 0.9, 1.0):
        keywords["mass"] = mass
        kept.append(unpack_bits(choose_blocks(score, **keywords).bits, score.shape[2]))
    assert all((larger | ~smaller).all() for smaller, larger in pairwise(kept))
    assert kept[-1].all()
    assert not kept[0].all()


def test_masses_of_blocks_add_up_to_the_rows() -> None:
    q, k = torch.randn(2, 261, 4, 16), torch.randn(2, 261, 2, 16)
    log_mass = block_log_mass(q, k, START, KV_LEN, 0.25)
    lse = log_mass.logsumexp(-1).transpose(1, 2)
    total = block_mass(q, k, lse, START, KV_LEN, START, KV_LEN, 0.25).sum(-1)
    torch.testing.assert_close(total, KV_LEN.float().expand(2, 4, 3))


def test_log_counts() -> None:
    counts = log_counts(START, KV_LEN, torch.tensor([130, 0], dtype=torch.int32), 2).exp()
    torch.testing.assert_close(counts, torch.tensor([[128.0, 2.0, 0.0], [0.0, 0.0, 0.0]]))
    torch.testing.assert_close(log_counts(START, KV_LEN, None, 2).exp(), KV_LEN.float().expand(2, -1))


@pytest.mark.parametrize(
    ("given_", "message"),
    [
        ({}, "exactly one"),
        ({"mass": 0.5, "threshold": 1.0}, "exactly one"),
        ({"mass": 0.0}, r"mass must be in \(0, 1\]"),
        ({"mass": 0.5, "at_least": -1}, "at_least"),
        ({"mass": 0.5, "counted": 4}, "counted"),
        ({"mass": 0.5, "q_len": KV_LEN[:1]}, "q_len must hold"),
        ({"threshold": float("nan")}, "finite"),
        ({"mass": 0.5, "always": torch.ones(2, dtype=torch.bool)}, "always must have shape"),
    ],
    ids=lambda x: x if isinstance(x, str) else ",".join(x),
)
def test_choice_says_what_is_wrong(given_: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choose_blocks(torch.randn(1, 2, 3), **{"counted": 3, "q_len": KV_LEN[:2], "kv_len": KV_LEN} | given_)


def test_choice_wants_float32() -> None:
    with pytest.raises(TypeError, match="float32"):
        choose_blocks(torch.randn(1, 2, 3).half(), counted=3, q_len=KV_LEN, kv_len=KV_LEN, mass=0.5)


def test_tensors_that_do_not_fit() -> None:
    x = torch.randn(1, 261, 2, 16)
    with pytest.raises(ValueError, match="start and length"):
        pool_blocks(x, START, KV_LEN[:2])
    with pytest.raises(TypeError, match="start must be"):
        pool_blocks(x, START.long(), KV_LEN)
    with pytest.raises(ValueError, match="kv_lengths"):
        pool_blocks(x, START, KV_LEN, KV_LEN)
    with pytest.raises(ValueError, match="q and k must be"):
        pool_both(x[..., :8], x, START, KV_LEN, 3)
    with pytest.raises(ValueError, match="q_blocks must be 1 to 3"):
        pool_both(x, x, START, KV_LEN, 4)
    means = torch.randn(1, 3, 2, 16)
    with pytest.raises(TypeError, match="means must be float32"):
        block_scores(means.double(), means, START, KV_LEN, 1.0)
    with pytest.raises(ValueError, match="means must be"):
        block_scores(means[:, :, :1], means, START, KV_LEN, 1.0)
    with pytest.raises(ValueError, match="length must be int32"):
        block_scores(means, means, START, KV_LEN[:2], 1.0)
    with pytest.raises(ValueError, match="heads of q"):
        block_log_mass(torch.randn(1, 9, 3, 16), x, START, KV_LEN, 1.0)
    with pytest.raises(ValueError, match="q_scale and k_scale"):
        block_log_mass(x.to(torch.int8), x.to(torch.int8), START, KV_LEN, 1.0)
    with pytest.raises(ValueError, match="scale must be positive"):
        block_log_mass(x, x, START, KV_LEN, 0.0)
    with pytest.raises(ValueError, match="lse must be"):
        block_mass(x, x, torch.randn(1, 2, 261), START, KV_LEN, START, KV_LEN, 1.0)
