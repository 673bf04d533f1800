"""How far one clip is from another: measured on raw frames, never on an encoded video."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dit_sparse.search.lpips import lpips

Frames = NDArray[np.float32]  # [T, H, W, 3] in [0, 1]
SSIM_WINDOW = 11


@dataclass(frozen=True)
class Metrics:
    """Hold the distance of a clip from its dense twin; None where a metric does not apply."""

    psnr_db: float | None  # None: the clips are identical, PSNR is infinite
    ssim: float | None  # None: a side is shorter than the window
    flicker: float | None  # None: a single frame
    warp_error: float | None  # None: a single frame, or OpenCV is not installed
    identical: bool
    lpips: float | None = None  # None: no weights are installed, or a side is too short; measured by older versions


def measure(dense: Frames, sparse: Frames) -> Metrics:
    """Compare two clips of one shape [T, H, W, 3] in [0, 1].

    Raises:
        ValueError: shapes differ, a value is not a finite number in [0, 1], or installed LPIPS weights are damaged.
    """
    check_frames(dense, "dense")
    check_frames(sparse, "sparse")
    if dense.shape != sparse.shape:
        raise ValueError(f"clips must have one shape, got dense={dense.shape}, sparse={sparse.shape}")
    identical = bool(np.array_equal(dense, sparse))
    return Metrics(
        psnr_db=None if identical else psnr_db(dense, sparse),
        ssim=ssim(dense, sparse),
        flicker=flicker(dense, sparse),
        warp_error=warp_error(dense, sparse),
        identical=identical,
        lpips=lpips(dense, sparse),
    )


def mean_metrics(clips: Sequence[Metrics]) -> Metrics:
    """Return the mean of each metric, None where a clip lacks it; PSNR is that of the clips that are not identical."""

    def mean(name: str) -> float | None:
        values = [value for clip in clips if (value := getattr(clip, name)) is not None]
        whole = len(values) == len(clips) or name == "psnr_db"
        return float(np.mean(values)) if values and whole else None

    identical = all(clip.identical for clip in clips)
    return Metrics(mean("psnr_db"), mean("ssim"), mean("flicker"), mean("warp_error"), identical, mean("lpips"))


def check_frames(frames: Frames, name: str) -> None:
    """Refuse what is not a clip [T, H, W, 3] of finite values in [0, 1].

    Raises:
        ValueError: names the clip, and the first frame that is wrong.
    """
    if frames.ndim != 4 or frames.shape[-1] != 3 or 0 in frames.shape:
        raise ValueError(f"{name} frames must be [T, H, W, 3], got shape {frames.shape}")
    for i, frame in enumerate(frames):
        low, high = float(frame.min()), float(frame.max())
        # NaN fails both comparisons, so it is caught here too
        if not (low >= 0.0 and high <= 1.0):
            raise ValueError(f"{name} frame {i} must lie in [0, 1], got values from {low} to {high}")


def psnr_db(a: Frames, b: Frames) -> float:
    """Return the peak signal-to-noise ratio over the whole clip, in dB; infinite for equal clips."""
    error = float(np.mean(np.square(a.astype(np.float64) - b.astype(np.float64))))
    return math.inf if error == 0.0 else -10.0 * math.log10(error)


def ssim(a: Frames, b: Frames) -> float | None:
    """Return the mean structural similarity over frames, Gaussian window of 11 pixels, sigma 1.5.

    Paper: Image Quality Assessment: From Error Visibility to Structural Similarity (Wang et al., 2004), section III.
    """
    from skimage.metrics import structural_similarity

    if min(a.shape[1:3]) < SSIM_WINDOW:
        return None
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    scores = [
        structural_similarity(x, y, data_range=1.0, channel_axis=-1, **options) for x, y in zip(a, b, strict=True)
    ]
    return float(np.mean(scores))


def flicker(dense: Frames, sparse: Frames) -> float | None:
    """Return the mean absolute difference between the clips' frame-to-frame changes; 0 when they move alike."""
    if len(dense) < 2:
        return None
    return float(np.mean(np.abs(np.diff(sparse, axis=0) - np.diff(dense, axis=0)), dtype=np.float64))


def warp_error(dense: Frames, sparse: Frames) -> float | None:
    """Return how much more than its dense twin a clip changes along the motion of the dense clip.

    Each sparse frame is fetched along the dense clip's optical flow and compared with its successor; the same for the
    dense clip itself is subtracted, so occlusions and flow errors cancel. Negative: steadier than dense.
    Needs OpenCV (the `metrics` extra); None without it.

    Paper: Learning Blind Video Temporal Consistency (arXiv 1808.00449), the warping error; no occlusion mask here.
    """
    if len(dense) < 2 or min(dense.shape[1:3]) < 16 or importlib.util.find_spec("cv2") is None:
        return None
    import cv2

    flow_of = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    gray = [cv2.cvtColor((f * 255).round().astype(np.uint8), cv2.COLOR_RGB2GRAY) for f in dense]
    height, width = gray[0].shape
    rows, columns = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    excess = []
    for i in range(len(dense) - 1):
        flow = flow_of.calc(gray[i + 1], gray[i], None)  # where each pixel of frame i + 1 was in frame i
        x, y = (columns + flow[..., 0]).astype(np.float32), (rows + flow[..., 1]).astype(np.float32)
        change = [
            np.abs(cv2.remap(clip[i], x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE) - clip[i + 1]).mean()
            for clip in (dense, sparse)
        ]
        excess.append(change[1] - change[0])
    return float(np.mean(excess))
