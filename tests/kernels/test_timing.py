"""How contenders take turns, how clocks are read, and how rows are checked at the size at which they are timed."""

from __future__ import annotations

import datetime

import pytest
import torch

from dit_sparse.kernels import bench, timing
from dit_sparse.kernels.backends import block_attention, compensated_attention
from dit_sparse.kernels.gate import CASES, Case, build
from dit_sparse.kernels.row_errors import row_errors


def test_every_other_round_is_reversed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert timing.turns("ab", 4) == [["a", "b"], ["b", "a"], ["a", "b"], ["b", "a"]]
    order: list[str] = []

    def milliseconds(call: timing.Call, repeats: int) -> float:
        call()
        return 5.0 if repeats == 1 else 4.0 + len(order) / 100

    monkeypatch.setattr(timing, "milliseconds", milliseconds)
    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    found = timing.time_contenders(calls, 3, round_ms=20.0)
    assert "".join(order) == "abc" + "abc" + "cba" + "abc"  # the first three tell how often to repeat
    assert {one.repeats for one in found.values()} == {4}
    assert found["c"].ms_low == 4.06
    assert found["c"].ms == 4.07
    assert found["c"].ms_high == 4.12
    assert found["a"].sm_mhz is None


def test_clocks_are_those_of_the_contenders_own_spans() -> None:
    samples = [timing.Sample(float(t), 1000.0 + t, 500.0, 40.0) for t in range(10)]
    found = timing.summary([3.0, 1.0, 2.0], 7, [(0.5, 2.5), (6.9, 8.1)], samples)
    assert (found.ms, found.ms_low, found.ms_high, found.rounds, found.repeats) == (2.0, 1.0, 3.0, 3, 7)
    assert found.sm_mhz == 1004.5  # of seconds 1, 2, 7 and 8
    assert (found.watts, found.celsius) == (500.0, 40.0)


def test_a_line_of_nvidia_smi_is_read() -> None:
    when = datetime.datetime(2025, 11, 22, 18, 3, 22, 123000)
    found = timing.parse_sample("2025/11/22 18:03:22.123, 1980, 512.30, 45\n")
    assert found == timing.Sample(when.timestamp(), 1980.0, 512.30, 45.0)
    for line in (
        "",
        "No devices were found",
        "2025/11/22 18:03:22.123, 1980, [N/A], 45",
        "2025/11/22 18:03:22.123, 19",
    ):
        assert timing.parse_sample(line) is None


@pytest.mark.parametrize("case", [case for case in CASES if case.kv_lengths is None], ids=lambda case: case.name)
def test_rows_of_a_right_result_pass_and_wrong_ones_do_not(case: Case) -> None:
    torch.set_num_threads(1)
    q, k, v, indices, _ = build(case, torch.bfloat16, seed=int(torch.randint(1 << 30, ())))
    attend = compensated_attention if case.compensate else block_attention
    out = attend(q, k, v, indices, backend="cpu")[0]
    scale = case.head_dim**-0.5
    error, allowed = row_errors(out, q, k, v, indices, scale, case.compensate)
    assert error <= allowed
    for wrong in (out + 0.1, torch.full_like(out, torch.nan)):
        error, allowed = row_errors(wrong, q, k, v, indices, scale, case.compensate)
        assert error > allowed


def test_lists_drawn_for_benchmarks_keep_what_they_are_asked_to() -> None:
    kept = bench.kept_blocks([1, 5, 12, 99], 12, "cpu")
    assert kept.shape == (4, 12, 12)
    assert torch.equal(kept.sum(-1), torch.tensor([1, 5, 12, 12])[:, None].expand(4, 12))
    assert bool(kept[1].diagonal().all())  # the band
    idx, cnt = bench.local_and_random(2, 20, 0.25, "cpu")
    assert idx.shape == (1, 2, 20, 5)
    assert bool((cnt == 5).all())
    assert bool((idx.diff(dim=-1) > 0).all())
