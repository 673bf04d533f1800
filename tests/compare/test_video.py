"""The mp4 files: what a browser needs, no resizing, no invented pixels."""

from __future__ import annotations

import subprocess
from pathlib import Path

import imageio.v3 as iio
import imageio_ffmpeg
import numpy as np
import pytest

from dit_sparse.search.video import CAPTION_PIXELS, GAP_PIXELS, enlarge, side_by_side, stills, to_bytes, write_mp4


def frames(count: int = 5, height: int = 34, width: int = 46) -> np.ndarray:
    rows, columns = np.mgrid[0:height, 0:width]
    clip = [np.stack([rows * 4 + t * 3, columns * 4, np.full_like(rows, 90)], -1) for t in range(count)]
    return np.stack(clip).clip(0, 255).astype(np.uint8)


def probe(path: Path) -> str:
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", "-i", str(path)]
    return subprocess.run(command, capture_output=True, text=True).stderr


# even, odd in both sizes, and one frame: libx264 refuses odd sizes in yuv420p
@pytest.mark.parametrize("shape", [(5, 34, 46), (4, 33, 45), (1, 16, 16)])
def test_mp4_is_what_browsers_play(tmp_path: Path, shape: tuple[int, int, int]) -> None:
    path = tmp_path / "clip.mp4"
    clip = frames(*shape)
    write_mp4(path, clip, fps=8)
    said = probe(path)
    assert "h264" in said
    assert "yuv420p" in said
    data = path.read_bytes()
    assert data.index(b"moov") < data.index(b"mdat"), "faststart puts the index first"
    back = iio.imread(path, plugin="FFMPEG")
    assert back.shape == (shape[0], shape[1] + shape[1] % 2, shape[2] + shape[2] % 2, 3)
    error = np.abs(back[:, : shape[1], : shape[2]].astype(int) - clip).mean()
    assert error < 4, "padded, not resized: pixels stay where they were"


def test_enlarge_repeats_pixels() -> None:
    small = frames(2, 64, 80)
    large = enlarge(small)
    assert large.shape == (2, 256, 320, 3)
    assert np.array_equal(large[:, ::4, ::4], small)
    assert enlarge(frames(1, 300, 40)).shape == (1, 300, 40, 3)


def test_side_by_side_keeps_the_clips() -> None:
    a, b = frames(3, 40, 60), 255 - frames(3, 40, 60)
    canvas = side_by_side([a, b], ["dense 1.2 s", "a name that is far too long for the width of this clip"])
    assert np.array_equal(canvas[:, -40:, :60], a)
    assert np.array_equal(canvas[:, -40:, -60:], b)
    assert canvas[:, :-40].max() > 200, "captions are drawn"


def test_stills_hold_the_first_and_the_last_frame_of_each_clip() -> None:
    a, b = frames(9, 64, 64), 255 - frames(9, 64, 64)
    sheet = np.asarray(stills([a, b], ["dense", "sparse"], columns=3))
    assert sheet.shape[1] == 3 * 128 + 2 * GAP_PIXELS
    rows = np.split(sheet, 2)
    for clip, row in zip((a, b), rows, strict=True):
        assert np.array_equal(row[CAPTION_PIXELS::2, :128:2], clip[0])
        assert np.array_equal(row[CAPTION_PIXELS::2, -128::2], clip[-1])


def test_rounding() -> None:
    values = np.array([0.0, 0.5 / 255 + 1e-4, 1.0], dtype=np.float32)
    assert to_bytes(np.broadcast_to(values, (1, 1, 1, 3))).ravel().tolist() == [0, 1, 255]


@pytest.mark.parametrize("fps", [0, -1.0, float("nan")])
def test_bad_fps(tmp_path: Path, fps: float) -> None:
    with pytest.raises(ValueError, match="fps"):
        write_mp4(tmp_path / "x.mp4", frames(), fps)
    assert not list(tmp_path.iterdir())
