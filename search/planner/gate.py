"""The promise that a plan must keep: limits on how far its clips may be from the dense ones."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dit_sparse.nearest import did_you_mean
from dit_sparse.search import lpips
from dit_sparse.search.metrics import SSIM_WINDOW, Metrics

# name -> (metric, worst clip instead of the mean, more is better)
LIMITS = {
    "psnr_db": ("psnr_db", False, True),
    "worst_psnr_db": ("psnr_db", True, True),
    "ssim": ("ssim", False, True),
    "worst_ssim": ("ssim", True, True),
    "flicker": ("flicker", False, False),
    "worst_flicker": ("flicker", True, False),
    "warp_error": ("warp_error", False, False),
    "lpips": ("lpips", False, False),
    "worst_lpips": ("lpips", True, False),
}
USUAL = "psnr_db>=25,worst_psnr_db>=20"
MOST_DB = 100.0  # stands for identical clips
ENOUGH_DB = 60.0  # of a clip in a mean, where the limit is not above it: one that is nearly dense excuses no other


@dataclass(frozen=True)
class Gate:
    """Hold limits by the names of LIMITS: at least for PSNR (dB) and SSIM, at most for the rest."""

    limits: Mapping[str, float]

    @classmethod
    def parse(cls, text: str) -> Gate:
        """Read `psnr_db>=25,worst_psnr_db>=20,flicker<=0.01`.

        Raises: ValueError for an unknown metric, a comparison the wrong way round or a limit that is no number.
        """
        limits: dict[str, float] = {}
        for part in filter(None, (piece.strip() for piece in text.split(","))):
            sign = ">=" if ">=" in part else "<="
            name, found, limit = part.partition(sign)
            name = name.strip()
            if name not in LIMITS:
                near = did_you_mean(name, LIMITS)
                raise ValueError(f"gate {text!r}: unknown metric {name!r}{near}; known: {', '.join(LIMITS)}")
            wanted = ">=" if LIMITS[name][2] else "<="
            if not found or sign != wanted:
                raise ValueError(f"gate {text!r}: write {name}{wanted}LIMIT, got {part!r}")
            try:
                limits[name] = float(limit)
            except ValueError:
                raise ValueError(f"gate {text!r}: the limit of {name} must be a number, got {limit!r}") from None
            if not math.isfinite(limits[name]):
                raise ValueError(f"gate {text!r}: the limit of {name} must be finite, got {limit!r}")
        if not limits:
            raise ValueError(f"a gate needs at least one limit, e.g. {USUAL!r}, got {text!r}")
        return cls(limits)

    def __str__(self) -> str:
        return ",".join(f"{name}{'>=' if LIMITS[name][2] else '<='}{limit:g}" for name, limit in self.limits.items())

    @property
    def metrics(self) -> frozenset[str]:
        """Return the metrics that the limits are on, as Metrics names them."""
        return frozenset(LIMITS[name][0] for name in self.limits)

    def margin_db(self, clips: Sequence[Metrics]) -> float:
        """Return by how much these clips pass, in dB of squared error; negative: the worst limit fails by so much.

        SSIM counts as 1 - SSIM, and it, flicker, warp error and LPIPS as amplitudes or powers alike: ten decades of
        ten.

        Raises: ValueError for a metric that these clips do not have.
        """
        if all(clip.identical for clip in clips):
            return MOST_DB
        return min(self._margin(name, limit, clips) for name, limit in self.limits.items())

    def check(self, frames: int | None, height: int, width: int) -> None:
        """Refuse, before any work, limits on what clips of this size do not have.

        Raises: ValueError that says what is missing, or that what is installed is damaged.
        """
        for name in self.limits:
            metric = LIMITS[name][0]
            if metric in ("flicker", "warp_error") and (frames or 1) < 2:
                raise ValueError(f"gate {self}: {name} needs a clip of at least 2 frames, got {frames}")
            if metric == "ssim" and min(height, width) < SSIM_WINDOW:
                raise ValueError(f"gate {self}: {name} needs sides of at least {SSIM_WINDOW} pixels")
            if metric == "warp_error" and importlib.util.find_spec("cv2") is None:
                raise ValueError(f"gate {self}: {name} needs OpenCV: pip install 'dit-sparse[metrics]'")
            if metric == "lpips":
                if min(height, width) < lpips.MIN_SIDE:
                    raise ValueError(f"gate {self}: {name} needs sides of at least {lpips.MIN_SIDE} pixels")
                files = lpips.find_weights()
                if files is None:
                    raise ValueError(f"gate {self}: {name} needs weights that are not installed: {lpips.HOW_TO_GET}")
                lpips.load(files)

    def _margin(self, name: str, limit: float, clips: Sequence[Metrics]) -> float:
        metric, worst, more = LIMITS[name]
        values = [_value(clip, metric) for clip in clips]
        if metric == "psnr_db":
            values = [min(value, max(ENOUGH_DB, limit)) for value in values]
        value = (min(values) if more else max(values)) if worst else sum(values) / len(values)
        if metric == "psnr_db":
            return value - limit
        if metric == "ssim":
            return _decibels(1.0 - limit, 1.0 - value)
        return _decibels(limit, value)


def _value(clip: Metrics, metric: str) -> float:
    found: Any = getattr(clip, metric)
    if metric == "psnr_db" and clip.identical:
        return MOST_DB
    if found is None:
        raise ValueError(
            f"the gate asks for {metric}, which these clips do not have: frames too small or too few, or (warp_error) "
            f"OpenCV is not installed: pip install 'dit-sparse[metrics]', or (lpips) no weights are: {lpips.HOW_TO_GET}"
        )
    return min(float(found), MOST_DB)


def _decibels(limit: float, value: float) -> float:
    """Compare two distances, of which less is better, in dB; what is negative or 0 is as good as can be."""
    tiny = 10 ** (-MOST_DB / 10)
    return 10.0 * math.log10(max(limit, tiny) / max(value, tiny))
