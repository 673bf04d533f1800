"""The Triton kernels in Triton's interpreter against FP64 and their torch twins; test_interpreter starts this file."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from dit_sparse.kernels import lists, triton_forward, triton_lists
from dit_sparse.kernels.backends import BACKENDS, choose
from dit_sparse.kernels.gate import CASES, Case, build, check
from dit_sparse.kernels.launch import Launch, launch_for
from tests.kernels.far_logits import check_far_logits

# Each tile path once: splits of queries and keys, and descriptors in place of pointers; with each the cases that it can
# break by short blocks, bit tiles or padding of head_dim. Hopper's gets every case; the smallest one is slow here.
PATHS = (
    (Launch(128, 128, 4, 2, tma=True, precision="ieee"), ("d72", "ragged_masks", "kv_lengths", "masks")),
    (launch_for(128, torch.bfloat16, "sm90"), tuple(case.name for case in CASES)),
    (
        launch_for(128, torch.bfloat16, "sm90", compensate=True),
        ("ragged_masks", "masks", "means_ragged", "means_masks"),
    ),
    (Launch(16, 32, 4, 1, tma=False, precision="ieee"), ("ragged_masks", "means_ragged")),
)
LAUNCH_CASES = [(launch, case) for launch, names in PATHS for case in CASES if case.name in names]


def test_the_interpreter_is_on() -> None:
    assert triton_forward._interpreted()
    q, k, v, indices, _ = build(CASES[0], torch.float32)
    assert choose("auto", q, k, v, indices).name == "triton"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)  # the interpreter has no bf16
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_triton_meets_fp64(case: Case, dtype: torch.dtype) -> None:
    outcome = check(BACKENDS["triton"].run, case, dtype)
    assert outcome.passed, outcome


@pytest.mark.parametrize(("launch", "case"), LAUNCH_CASES, ids=lambda x: x.name if isinstance(x, Case) else str(x))
def test_every_tile_path_meets_fp64(launch: Launch, case: Case) -> None:
    dtype = torch.float32 if launch.keep else torch.float16  # fp16 never keeps a shift
    outcome = check(partial(triton_forward.attention, launch=launch), case, dtype)
    assert outcome.passed, outcome


@pytest.mark.parametrize("compensate", [False, True])
@pytest.mark.parametrize("partial", [0.0, 0.5])
def test_logits_far_from_those_of_the_first_block(partial: float, compensate: bool) -> None:
    assert launch_for(64, torch.float32, "interpreter").keep
    check_far_logits(BACKENDS["triton"].run, 64, partial, compensate, torch.float32, "cpu")


def test_means_that_stand_for_nothing_change_nothing() -> None:
    q, k, v, indices, kv_lengths = build(next(case for case in CASES if case.name == "dense"), torch.float32)
    plain = triton_forward.attention(q, k, v, indices, 0.125, kv_lengths)
    compensated = triton_forward.attention(q, k, v, indices, 0.125, kv_lengths, compensate=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(compensated, plain, strict=True))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_compaction_equals_its_torch_twin(case: Case) -> None:
    _, _, _, indices, kv_lengths = build(case, torch.float32)
    ours, twin = triton_lists.compact(indices, kv_lengths), lists.compact(indices, kv_lengths)
    assert torch.equal(ours.full_count, twin.full_count)
    assert torch.equal(ours.partial_count, twin.partial_count)
    assert torch.equal(ours.row_of, twin.row_of)
    assert torch.equal(ours.items, twin.items)
    place = torch.arange(indices.key_blocks)
    written = place < (twin.full_count + twin.partial_count)[..., None]
    assert torch.equal(ours.blocks[written], twin.blocks[written])
    if ours.tiles is not None and twin.tiles is not None:
        partial_places = written & (place >= twin.full_count[..., None])
        assert torch.equal(ours.tiles[partial_places], twin.tiles[partial_places])
