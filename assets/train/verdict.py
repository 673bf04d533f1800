"""Judge samples of the procedural world: does a clip show the colours, shapes and motions that its caption names?

Only what the caption says is read from the scene, never its hidden numbers (places, sizes, rates, phases), so the same
judge serves samples of a model and the true clips, whose score is the judge's own ceiling.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dit_sparse.assets.train import outlines, tracks
from dit_sparse.assets.train.clips import Scene
from dit_sparse.assets.train.words import CAMERAS, COLOURS, MOTIONS, SHAPES

EVERY = 2  # frames 0, 2, 4 ... are judged
NONE = "none"
CHECKS = {  # name -> what chance alone gets right, None where that depends on the mix of captions
    "colour": None,
    "shape": 1 / len(SHAPES),
    "direction": 1 / 4,
    "growth": 1 / 2,
    "motion": None,
    "spin": 1 / 2,
    "camera": 1 / 4,
}
SHAPE_FRAMES, TOUCHED_FRAMES = 9, 5
LEAST_SEEN, LEAST_SEEN_MOVING = 0.6, 1 / 3  # of the frames show an object, under a static camera and else
LEAST_NAMED = 0.22  # of an object's pixels show the named colour itself; 99 % of the true objects have more
_TURNS = {"square": 4, "triangle": 3, "star": 5, "heart": 1, "cross": 4, "flower": 6, "moon": 1}  # equal ones a round


@dataclass(frozen=True)
class Check:
    """One statement of the caption about one object, and what the clip shows."""

    name: str  # a key of CHECKS
    named: str
    seen: str

    @property
    def right(self) -> bool:
        return self.named == self.seen


@dataclass(frozen=True)
class Verdict:
    """What a clip shows of object `k` of its caption."""

    k: int
    checks: tuple[Check, ...]
    overlap: float  # with the best shape, mean over frames, in [0, 1]; 0 where the object is not seen
    held: float  # fraction of the compared frames whose own best shape is the named one
    seen_frames: int  # of those judged

    @property
    def present(self) -> bool:
        return any(check.name == "colour" and check.right for check in self.checks)


@dataclass(frozen=True)
class Rate:
    """How many statements are right, with the 95 % interval of Wilson, as if objects of one clip were independent."""

    right: int
    judged: int
    share: float
    low: float
    high: float


@dataclass(frozen=True)
class Score:
    """Rates over clips by name of the check, and over the clips with a single object."""

    clips: int
    overall: dict[str, Rate]
    single: dict[str, Rate]
    overlap: float  # mean over the objects that are seen
    held: float  # mean over all objects


def judge_clip(video: Tensor, clips: Scene, b: int) -> list[Verdict]:
    """Judge one clip against caption `b` of `clips`: one verdict an object.

    Args:
        video: uint8 [T, H, W, 3], frames 0, 1, 2 ... of a clip

    Raises:
        ValueError: the video is no uint8 [T, H, W, 3] of at least 3 frames.
    """
    if video.dtype != torch.uint8 or video.ndim != 4 or video.shape[-1] != 3 or len(video) < 3:
        raise ValueError(f"video must be uint8 [T >= 3, H, W, 3], got {video.dtype} {list(video.shape)}")
    owners, itself = outlines.owners(video[::EVERY], clips, b)
    twin = bool(clips.twin[b])
    verdicts = []
    for k in range(1 if twin else int(clips.count[b])):
        masks = outlines.clean(owners == k, pieces=2 if twin else 1)
        # Bars and objects of a lower number lie in front; one of a higher number only touches.
        others = (owners != k) & (owners < outlines.BACKGROUND)
        for piece, mask in enumerate(masks):
            verdicts.append(_judge_object(mask, itself, others, clips, b, k + piece))
    return verdicts


def aggregate(verdicts: Sequence[Sequence[Verdict]]) -> Score:
    """Sum up the verdicts of clips, one sequence a clip."""
    every = [verdict for clip in verdicts for verdict in clip]
    seen = [verdict.overlap for verdict in every if verdict.overlap]
    return Score(
        clips=len(verdicts),
        overall=_rates(every),
        single=_rates([clip[0] for clip in verdicts if len(clip) == 1]),
        overlap=sum(seen) / max(1, len(seen)),
        held=sum(verdict.held for verdict in every) / max(1, len(every)),
    )


def wilson(right: int, judged: int) -> tuple[float, float]:
    """Return the 95 % interval of a share after Wilson; (0, 1) where nothing was judged."""
    if judged == 0:
        return 0.0, 1.0
    z = 1.96
    share, spread = right / judged, z * z / judged
    centre = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / judged + spread / judged / 4) / (1 + spread)
    return max(0.0, centre - half), min(1.0, centre + half)


def area_range(clips: Scene, b: int, k: int, height: int) -> tuple[float, float]:
    """Return the pixels that object `k` of clip `b` may fill: a third of the smallest and three times the largest.

    Smallest and largest are over all shapes and radii in the middle of a clip; the factor 3 leaves room for what size
    and zoom do to them (half to twice the width at the most) and for the model's own taste.
    """
    bonus = 0.13 if clips.count[b] == 1 else 0.06 if k == 0 or clips.twin[b] else 0.0
    low, high = (0.20 + bonus) * height / 2, (0.32 + bonus) * height / 2
    areas = outlines.shape_areas()
    return float(areas.min()) * low**2 / 3, float(areas.max()) * high**2 * 3


def _judge_object(mask: Tensor, itself: Tensor, others: Tensor, clips: Scene, b: int, k: int) -> Verdict:
    height, width = mask.shape[1:]
    x, y, area = outlines.centroids(mask)
    low, high = area_range(clips, b, k, height)
    touched = outlines.contact(mask, others)
    at_border = outlines.contact(mask, torch.zeros_like(mask))
    seen = (area >= low) & (area <= high) & (at_border < 0.5)
    track = tracks.Track(
        x=(x - width / 2) / (height / 2),
        y=(y - height / 2) / (height / 2),
        size=area.clamp(min=1).log() / 2,
        seen=seen,
        whole=seen & (touched < 0.03),
    )
    # Blinking darkens half of the frames: the better half tells.
    named = ((mask & itself).sum(dim=(1, 2)) / area.clamp(min=1))[seen].sort(descending=True).values
    named = named[: (len(named) + 1) // 2]
    steady = clips.camera[b] == list(CAMERAS).index("static") and not clips.twin[b]  # twins may cross
    least = LEAST_SEEN if steady else LEAST_SEEN_MOVING
    present = int(seen.sum()) >= len(seen) * least and float(named.mean()) >= LEAST_NAMED
    colour, shape = list(COLOURS)[clips.colour[b, k]], list(SHAPES)[clips.shape[b, k]]
    best, overlap, held, angles = NONE, 0.0, 0.0, torch.zeros(0, len(SHAPES))
    if present:
        frames, whole = _clear_frames(track, touched)
        overlaps, angles = outlines.match(mask[frames], others[frames], whole)
        mean = overlaps.mean(dim=0)
        best, overlap = list(SHAPES)[int(mean.argmax())], float(mean.max())
        held = float((overlaps.argmax(dim=1) == clips.shape[b, k]).float().mean())
    checks = [Check("colour", colour, colour if present else NONE), Check("shape", shape, best)]
    checks += _moves(track, clips, b, k, present, angles)
    return Verdict(k, tuple(checks), overlap, held, int(seen.sum()))


def _moves(track: tracks.Track, clips: Scene, b: int, k: int, present: bool, angles: Tensor) -> list[Check]:
    """Check the motion of an object; what twins do is not judged, for one mirrors the other."""
    motion, camera = list(MOTIONS)[clips.motion[b, k]], list(CAMERAS)[clips.camera[b]]
    if clips.twin[b]:
        return []
    if camera.startswith("panning") and len(camera.split()) == 2:
        if motion not in ("still", "spinning", "pulsing"):
            return []
        # What stands still in the world goes the other way on the screen.
        opposite = {"left": "right", "right": "left", "up": "down", "down": "up"}
        return [Check("camera", opposite[camera.split()[1]], tracks.direction(track) if present else NONE)]
    if camera != "static":
        return []
    shape = list(SHAPES)[clips.shape[b, k]]
    kind = "still" if motion == "spinning" else motion
    checks = [Check("motion", kind, tracks.kind(track) if present else NONE)]
    if motion.startswith("drifting"):
        checks.append(Check("direction", motion.split()[1], tracks.direction(track) if present else NONE))
    if motion in ("growing", "shrinking"):
        checks.append(Check("growth", motion, tracks.growth(track) if present else NONE))
    if motion in ("still", "spinning") and shape in _TURNS:
        spins = present and tracks.spins(angles[:, clips.shape[b, k]], _TURNS[shape])
        checks.append(Check("spin", motion, ("spinning" if spins else "still") if present else NONE))
    return checks


def _clear_frames(track: tracks.Track, touched: Tensor) -> tuple[Tensor, bool]:
    """Pick up to SHAPE_FRAMES frames spread over the whole ones, or the least touched ones where few are whole.

    Returns:
        the frames, and whether they are whole
    """
    whole = track.whole.nonzero()[:, 0]
    if len(whole) < 3:
        order = torch.where(track.seen, touched, 2.0).argsort()
        return order[: min(TOUCHED_FRAMES, int(track.seen.sum()))], False
    return whole[torch.linspace(0, len(whole) - 1, min(SHAPE_FRAMES, len(whole))).round().long()], True


def _rates(verdicts: Sequence[Verdict]) -> dict[str, Rate]:
    rights = {
        name: [check.right for verdict in verdicts for check in verdict.checks if check.name == name] for name in CHECKS
    }
    rights["shape where the colour is right"] = [
        check.right for verdict in verdicts if verdict.present for check in verdict.checks if check.name == "shape"
    ]
    return {
        name: Rate(sum(values), len(values), sum(values) / max(1, len(values)), *wilson(sum(values), len(values)))
        for name, values in rights.items()
    }
