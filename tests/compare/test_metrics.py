"""Metrics against closed forms and an independent implementation."""

from __future__ import annotations

import importlib.util
import math

import numpy as np
import pytest

from dit_sparse.search.metrics import Frames, flicker, measure, psnr_db, ssim, warp_error


def clip(frames: int = 4, height: int = 32, width: int = 40, seed: int = 0) -> Frames:
    return np.random.default_rng(seed).random((frames, height, width, 3), dtype=np.float32)


def pan(frames: int = 5, shift: int = 2) -> Frames:
    """A smooth texture that moves by `shift` pixels a frame."""
    rows, columns = np.mgrid[0:64, 0:96]
    clips = [
        0.5 + 0.25 * np.sin((columns - shift * t) / 5.0) * np.cos(rows / 7.0) + 0.2 * np.sin(rows / 3.0 + columns / 11)
        for t in range(frames)
    ]
    return np.repeat(np.stack(clips)[..., None], 3, axis=-1).astype(np.float32).clip(0, 1)


def test_psnr_of_a_constant_offset() -> None:
    dense = np.full((3, 16, 16, 3), 0.5, dtype=np.float32)
    assert psnr_db(dense, dense + np.float32(0.1)) == pytest.approx(20.0, abs=1e-4)
    assert psnr_db(dense, dense) == math.inf


def test_ssim_against_the_formula() -> None:
    """The textbook definition, written out with an explicit Gaussian window."""
    a, b = clip(1, 20, 20, seed=1)[0], clip(1, 20, 20, seed=2)[0]
    axis = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
    window = np.outer(axis, axis) / axis.sum() ** 2

    def mean(x: Frames) -> Frames:
        patches = np.lib.stride_tricks.sliding_window_view(x, (11, 11), axis=(0, 1))
        return np.einsum("hwcij,ij->hwc", patches, window)

    ma, mb = mean(a.astype(np.float64)), mean(b.astype(np.float64))
    va, vb, cov = mean(a**2.0) - ma**2, mean(b**2.0) - mb**2, mean(a.astype(np.float64) * b) - ma * mb
    c1, c2 = 0.01**2, 0.03**2
    wanted = ((2 * ma * mb + c1) * (2 * cov + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2))).mean()
    assert ssim(a[None], b[None]) == pytest.approx(wanted, abs=1e-4)


def test_identical_clips() -> None:
    found = measure(clip(), clip())
    assert found.identical
    assert found.psnr_db is None
    assert found.ssim == pytest.approx(1.0)
    assert found.flicker == 0.0


def test_flicker_sees_what_psnr_does_not() -> None:
    dense = np.full((4, 16, 16, 3), 0.5, dtype=np.float32)
    steady, blinking = dense + np.float32(0.1), dense.copy()
    blinking[::2] += np.float32(0.1)
    blinking[1::2] -= np.float32(0.1)
    assert psnr_db(dense, steady) == pytest.approx(psnr_db(dense, blinking), abs=1e-3)
    assert flicker(dense, steady) == pytest.approx(0.0, abs=1e-6)
    assert flicker(dense, blinking) == pytest.approx(0.2, abs=1e-6)


@pytest.mark.skipif(importlib.util.find_spec("cv2") is None, reason="needs the metrics extra (OpenCV)")
def test_warp_error_follows_motion() -> None:
    dense = pan()
    offset = (dense * 0.9).astype(np.float32)
    noisy = (dense + np.random.default_rng(0).normal(0, 0.05, dense.shape)).clip(0, 1).astype(np.float32)
    assert warp_error(dense, dense) == 0.0
    assert abs(warp_error(dense, offset)) < 0.005
    assert warp_error(dense, noisy) > 0.02


@pytest.mark.parametrize(
    ("dense", "sparse", "message"),
    [
        (clip(4), clip(3), "one shape"),  # a plan must not change the number of frames
        (clip(4), clip(4) * np.float32(np.nan), "sparse frame 0"),  # NaN is a broken kernel, not a bad score
        (clip(4) * 255, clip(4), r"dense frame 0 must lie in \[0, 1\]"),  # 8-bit values by mistake
        (clip(4)[..., :2], clip(4), r"\[T, H, W, 3\]"),  # two channels
    ],
)
def test_bad_frames(dense: Frames, sparse: Frames, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        measure(dense, sparse)


def test_sizes_without_a_value() -> None:
    """One frame has no flicker, and a side under 11 pixels no SSIM window."""
    found = measure(clip(1, 8, 8), clip(1, 8, 8, seed=3))
    assert found.ssim is None
    assert found.flicker is None
    assert found.warp_error is None
    assert found.psnr_db is not None
