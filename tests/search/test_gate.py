"""Gates: what they read, what they refuse, and how far clips are from them."""

from __future__ import annotations

import math

import pytest

from dit_sparse.search.metrics import Metrics
from dit_sparse.search.planner.gate import USUAL, Gate

CLIPS = [Metrics(28.0, 0.9, 0.01, 0.001, False), Metrics(22.0, 0.8, 0.03, -0.002, False)]


@pytest.mark.parametrize("text", [USUAL, "ssim>=0.9", "flicker<=0.01, worst_flicker <= 0.02"])
def test_what_a_gate_reads_it_writes(text: str) -> None:
    gate = Gate.parse(text)
    assert Gate.parse(str(gate)) == gate


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("pnsr_db>=25", "did you mean 'psnr_db'"),
        ("psnr_db<=25", "write psnr_db>=LIMIT"),
        ("flicker>=0.1", "write flicker<=LIMIT"),
        ("psnr_db", "write psnr_db>=LIMIT"),
        ("psnr_db>=loud", "must be a number"),
        ("psnr_db>=nan", "finite"),
        ("", "at least one limit"),
    ],
)
def test_what_is_no_gate_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Gate.parse(text)


@pytest.mark.parametrize(
    ("text", "margin"),
    [
        ("psnr_db>=24", 1.0),
        ("worst_psnr_db>=24", -2.0),
        ("psnr_db>=20,worst_psnr_db>=21.5", 0.5),
        ("ssim>=0.7", 10 * math.log10(0.3 / 0.15)),
        ("worst_ssim>=0.9", 10 * math.log10(0.1 / 0.2)),
        ("flicker<=0.02", 0.0),
        ("worst_flicker<=0.003", -10.0),
    ],
)
def test_the_margin_is_that_of_the_tightest_limit(text: str, margin: float) -> None:
    assert Gate.parse(text).margin_db(CLIPS) == pytest.approx(margin)


def test_identical_clips_pass_everything() -> None:
    same = [Metrics(None, 1.0, 0.0, 0.0, True)] * 2
    for text in ("psnr_db>=80", "ssim>=0.999", "flicker<=0.0001", "warp_error<=0"):
        assert Gate.parse(text).margin_db(same) >= 0


def test_a_clip_that_is_nearly_dense_excuses_no_other() -> None:
    clips = [Metrics(None, 1.0, 0.0, 0.0, True), Metrics(12.0, 0.5, 0.1, 0.0, False)]
    assert Gate.parse("psnr_db>=36").margin_db(clips) == 0.0  # the mean of 60 and 12
    assert Gate.parse("psnr_db>=70").margin_db([Metrics(75.0, 1.0, 0.0, 0.0, False)]) == 0.0


@pytest.mark.parametrize(
    ("text", "size", "message"),
    [
        ("flicker<=1", (1, 64, 64), "2 frames"),
        ("worst_ssim>=0.5", (9, 8, 64), "sides"),
        ("warp_error<=1", (1, 64, 64), "2"),
    ],
)
def test_limits_on_what_a_clip_lacks_are_refused_beforehand(
    text: str, size: tuple[int, int, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Gate.parse(text).check(*size)
    Gate.parse("psnr_db>=5").check(*size)


def test_a_metric_that_clips_lack_is_named() -> None:
    with pytest.raises(ValueError, match=r"asks for warp_error.*dit-sparse\[metrics\]"):
        Gate.parse("warp_error<=0.1").margin_db([Metrics(20.0, None, None, None, False)])
