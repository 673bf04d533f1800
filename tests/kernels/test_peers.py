"""The peer backends: what they take, what they refuse, and FlexAttention's slow twin against FP64."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch

from dit_sparse.kernels import fa4, flex
from dit_sparse.kernels.backends import BACKENDS
from dit_sparse.kernels.gate import CASES, Case, build, check
from dit_sparse.kernels.indices import BLOCK, random_indices
from dit_sparse.kernels.lists import compact
from dit_sparse.kernels.peer_lists import peer_lists, refuse_call

# What the table's cases have that no peer takes; all else must run.
REFUSED = {
    "d72": "key blocks", "ragged": "query blocks", "ragged_masks": "query blocks", "kv_lengths": "kv_lengths",
    "kv_lengths_masks": "kv_lengths",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_flex_meets_fp64_or_says_why_not(case: Case) -> None:
    _, _, _, indices, lengths = build(case, torch.float32)
    reason = refuse_call(indices, lengths, case.compensate)
    expected = "compensation" if case.compensate else REFUSED.get(case.name)
    if expected is not None:
        assert reason is not None
        assert expected in reason
        return
    assert reason is None
    for dtype in (torch.float32, torch.bfloat16):  # one shows a wrong index, the other a sum kept in too few bits
        outcome = check(partial(flex.attention, compiled=False), case, dtype)
        assert outcome.passed, outcome


@pytest.mark.parametrize("masked", [False, True])
def test_the_compiled_rule_is_right_on_the_blocks_it_is_asked_about(masked: bool) -> None:
    indices = random_indices(1, 2, [300], [300], partial=0.5 if masked else 0.0, seed=int(torch.randint(1 << 30, ())))
    q = torch.zeros(1, 300, 2, 16)
    mask = flex.block_mask(q, q, indices)
    assert mask.kv_num_blocks.sum() == (indices.partial_mask().sum() if masked else 0)
    assert mask.full_kv_num_blocks is not None
    query, key = torch.arange(300)[:, None], torch.arange(300)
    for head in range(2):
        seen = mask.mask_mod(torch.tensor(0), torch.tensor(head), query, key).expand(300, 300)
        partial_pairs = indices.partial_mask()[head].repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)[:300, :300]
        assert torch.equal(seen[partial_pairs], indices.token_mask(head)[partial_pairs])


def test_lists_of_the_peers_are_those_of_the_kernels() -> None:
    indices = random_indices(2, 3, [640], [500], partial=0.4, unique=2, seed=int(torch.randint(1 << 30, ())))
    theirs, ours = peer_lists(indices, 2), compact(indices)
    rows = indices.head_of.long()
    for b in range(2):
        for h in range(3):
            row = int(rows[b * 3 + h])
            for block in range(indices.query_blocks):
                full, masked = int(theirs.full_count[b, h, block]), int(theirs.masked_count[b, h, block])
                mine = ours.blocks[row, block].tolist()
                short = [indices.key_blocks - 1]  # whole to a peer, partial to us
                listed = theirs.full[b, h, block, :full].tolist()
                assert listed == sorted(listed)
                found = sorted(listed + theirs.masked[b, h, block, :masked].tolist())
                count = int(ours.full_count[row, block] + ours.partial_count[row, block])
                assert found == sorted(mine[:count])
                assert set(mine[: int(ours.full_count[row, block])]) == set(listed) - set(short)


def test_only_whole_blocks_in_order_are_taken() -> None:
    indices = random_indices(1, 2, [300], [300])
    assert refuse_call(indices, None, False) is None
    shuffled = replace(indices, kv_start=indices.kv_start.flip(0), kv_len=indices.kv_len.flip(0))
    assert "key blocks must be whole" in str(refuse_call(shuffled, None, False))
    amid = random_indices(1, 2, [300, 100], [300])
    assert "query blocks must be whole" in str(refuse_call(amid, None, False))


def test_fa4_refuses_what_it_cannot_do(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnHopper(torch.Tensor):
        @property
        def device(self) -> torch.device:  # type: ignore[override]
            return torch.device("cuda")

    def refused(q: torch.Tensor, partial: float = 0.0) -> str | None:
        indices = random_indices(1, 1, [256], [256], partial=partial)
        q = q.as_subclass(OnHopper)
        return fa4.refusal(q, q, q, indices, None, False)

    half = torch.zeros(1, 256, 1, 128, dtype=torch.bfloat16)
    indices = random_indices(1, 1, [256], [256])
    assert fa4.refusal(half, half, half, indices, None, False) == "tensors must be on a GPU, got cpu"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (10, 0))
    assert "must be 9.x" in str(refused(half))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    assert "float16 or bfloat16, got float32" in str(refused(half.float()))
    assert "head_dim must be a multiple of 8 up to 128, got 256" in str(refused(half.repeat(1, 1, 1, 2)))
    monkeypatch.setattr(fa4.importlib.util, "find_spec", lambda name: None)
    assert "pip install flash-attn-4" in str(refused(half))
    monkeypatch.setattr(fa4.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(fa4, "_interface", lambda: object())
    assert refused(half) is None
    assert "no bit tiles" in str(refused(half, partial=1.0))

    def broken() -> object:
        raise ImportError("cutlass is too old")

    monkeypatch.setattr(fa4, "_interface", broken)
    assert "cannot be imported: ImportError: cutlass is too old" in str(refused(half))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU; deselected by default through the marker")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("backend", ["flex", "fa4"])
def test_peers_meet_fp64_on_a_gpu(backend: str, case: Case) -> None:
    q, k, v, indices, lengths = build(case, torch.bfloat16)
    there = (q.cuda(), k.cuda(), v.cuda(), indices.to("cuda"), None if lengths is None else lengths.cuda())
    if (reason := BACKENDS[backend].refusal(*there, case.compensate)) is not None:
        pytest.skip(reason)
    # compiled before torch.empty is poisoned
    BACKENDS[backend].run(*there[:4], case.head_dim**-0.5, there[4], case.compensate)
    outcome = check(BACKENDS[backend].run, case, torch.bfloat16, "cuda")
    assert outcome.passed, outcome
