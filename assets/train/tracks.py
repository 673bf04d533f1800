"""What moves how: the track of an object's centre and size, against the tracks that the generator can draw."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dit_sparse.assets.train.clips import CLIP_FRAMES
from dit_sparse.assets.train.words import MOTIONS

DRAWS = 256  # tracks a motion
LEAST_WAY = 0.2  # half frame heights over a clip; the shortest drift is .65
LEAST_GROWTH = 0.25  # of the logarithm of the size over a clip; growing from half to one and a half is 1.1

KINDS = tuple(motion for motion in MOTIONS if motion != "spinning")  # which shares the track of "still"


@dataclass(frozen=True)
class Track:
    """Centre and size of one object over frames 0, 2, 4 ... of a clip, all [T]."""

    x: Tensor  # half frame heights to the right of the middle
    y: Tensor  # half frame heights below the middle
    size: Tensor  # logarithm of the root of the area
    seen: Tensor  # bool: the object is there
    whole: Tensor  # bool: and neither cut nor covered

    def usable(self) -> Tensor:
        """Return the frames [T] to trust: the whole ones, or all seen ones where few are whole."""
        return self.whole if int(self.whole.sum()) >= 6 else self.seen


def direction(track: Track) -> str:
    """Name where the centre goes by its least-squares slopes: left, right, up, down, or none for short ways."""
    across, down = _slope(track.x, track.usable()), _slope(track.y, track.usable())
    if max(abs(across), abs(down)) < LEAST_WAY:
        return "none"
    if abs(across) >= abs(down):
        return "right" if across > 0 else "left"
    return "down" if down > 0 else "up"


def growth(track: Track) -> str:
    """Name the trend of the size: growing, shrinking, or none for a small one."""
    slope = _slope(track.size, track.usable())
    if abs(slope) < LEAST_GROWTH:
        return "none"
    return "growing" if slope > 0 else "shrinking"


def kind(track: Track) -> str:
    """Name the motion of KINDS with the nearest track under a static camera, its position left out."""
    weight = track.usable().float()
    if weight.sum() < 4:
        return "none"
    weight = (weight / weight.sum())[:, None]
    path = torch.stack([track.x, track.y, track.size], dim=1)
    bank = track_bank(len(path))
    gap = torch.where(weight > 0, bank - path, 0.0)
    gap = gap - (gap * weight).sum(dim=-2, keepdim=True)
    distance = (gap.square() * weight).sum(dim=(-2, -1))
    return KINDS[int(distance.amin(dim=1).argmin())]


def spins(angle: Tensor, fold: int) -> bool:
    """Return whether the angles [T] of an outline with `fold` equal turns wander instead of staying."""
    return bool(torch.polar(torch.ones_like(angle), angle * fold).mean().abs() < 0.6)


@functools.cache
def track_bank(frames: int) -> Tensor:
    """Draw the tracks of every motion of KINDS with random reach, rate and phase: [KINDS, DRAWS, frames, 3]."""
    random = torch.Generator().manual_seed(0)
    reach, rate, phase, sign = torch.rand(4, DRAWS, 1, generator=random)
    reach, rate = 0.5 + 0.5 * reach, (0.75 + 0.5 * rate) * torch.where(sign < 0.5, -1.0, 1.0)
    time = torch.arange(0, 2 * frames, 2) / (CLIP_FRAMES - 1)
    theta, centred = 2 * math.pi * rate * time + 2 * math.pi * phase, time - 0.5
    none, drift, swing = torch.zeros_like(theta), 1.3 * reach * centred, 0.9 * theta.sin()
    scale = (1 + centred).log().expand_as(theta)
    tracks = {  # x, y and size as render._object moves things; tests/bundled/test_verdict.py holds the two together
        "still": (none, none, none),
        "drifting left": (-drift, none, none),
        "drifting right": (drift, none, none),
        "drifting up": (none, -drift, none),
        "drifting down": (none, drift, none),
        "bouncing": (0.4 * rate * centred, -0.9 * reach * theta.sin().abs(), none),
        "circling": (0.4 * theta.cos(), 0.4 * theta.sin(), none),
        "swinging": (0.6 * swing.sin(), 0.6 * swing.cos(), none),
        "pulsing": (none, none, (1 + 0.35 * (2 * theta).sin()).log()),
        "growing": (none, none, scale),
        "shrinking": (none, none, (1 - centred).log().expand_as(theta)),
    }
    assert set(tracks) == set(MOTIONS) - {"spinning"}
    return torch.stack([torch.stack(tracks[name], dim=-1) for name in KINDS])


def _slope(value: Tensor, used: Tensor) -> float:
    """Return the change of `value` [T] over a clip by least squares on the frames `used` [T]; 0 with under 3."""
    if int(used.sum()) < 3:
        return 0.0
    time = torch.arange(0, 2 * len(value), 2)[used] / (CLIP_FRAMES - 1)
    time = time - time.mean()
    return float((time * value[used]).sum() / time.square().sum())
