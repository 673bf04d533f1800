"""The Triton forms of pooling, choice and block mass in Triton's interpreter; test_other_processes starts this file."""

from __future__ import annotations

import pytest
import torch

from dit_sparse.kernels import choice, triton_block_scores, triton_choice, triton_mass, triton_pool
from tests.kernels.choice_cases import CHOICE_CASES, ChoiceCase, check_choice
from tests.kernels.estimate_cases import TOKEN_CASES, TokenCase, check_mass, check_pool, check_pool_both, check_scores


@pytest.mark.parametrize(
    ("dtype", "out_dtype"),
    [(torch.float32, torch.float32), (torch.float16, torch.float16)],  # exact sums; both ends rounded
    ids=str,
)
@pytest.mark.parametrize("case", TOKEN_CASES, ids=lambda case: case.reason)
def test_pooling_meets_fp64(case: TokenCase, dtype: torch.dtype, out_dtype: torch.dtype) -> None:
    check_pool(triton_pool.pool_blocks, case, dtype, out_dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)  # exact sums; rounded
@pytest.mark.parametrize("case", TOKEN_CASES, ids=lambda case: case.reason)
def test_pooling_of_both_meets_fp64(case: TokenCase, dtype: torch.dtype) -> None:
    check_pool_both(triton_pool.pool_both, case, dtype)


@pytest.mark.parametrize("case", TOKEN_CASES, ids=lambda case: case.reason)
def test_scores_of_blocks_meet_fp64(case: TokenCase) -> None:
    check_scores(triton_block_scores.block_scores, case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int8], ids=str)  # every kind of product
@pytest.mark.parametrize("case", TOKEN_CASES, ids=lambda case: case.reason)
def test_masses_meet_fp64(case: TokenCase, dtype: torch.dtype) -> None:
    check_mass(triton_mass.block_log_mass, triton_mass.block_mass, case, dtype)


@pytest.mark.parametrize("case", TOKEN_CASES[1:3], ids=lambda case: case.reason)  # many tiles; tiles without a key
def test_masses_of_small_tiles_and_long_spans_meet_fp64(case: TokenCase, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_mass, "WANTED_PROGRAMS", 1)  # every program walks all key blocks
    hopper = triton_mass.launch_for(128, torch.bfloat16, "sm90")
    monkeypatch.setattr(triton_mass, "launch_for", lambda *_: hopper)
    assert (hopper.block_m, hopper.block_n) == (64, 64)
    check_mass(triton_mass.block_log_mass, triton_mass.block_mass, case, torch.float16)


@pytest.mark.parametrize("case", CHOICE_CASES, ids=lambda case: f"{case.rule}: {case.reason}")
def test_choice_meets_its_definition(case: ChoiceCase, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    monkeypatch.setattr(choice, "runs_triton", lambda _: True)
    plain = triton_choice.choose
    monkeypatch.setattr(triton_choice, "choose", lambda *given: taken.append(1) or plain(*given))
    check_choice(case)
    assert taken == [1]
