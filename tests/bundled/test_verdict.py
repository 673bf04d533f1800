"""The judge of samples: right about true clips, not about wrong captions, and blind to what no caption says."""

from __future__ import annotations

import json
import random
from dataclasses import asdict, replace

import pytest
import torch
from diffusers import WanPipeline
from torch import Tensor

from dit_sparse.assets.train import breaks, measure, outlines, score, tracks
from dit_sparse.assets.train.clips import CLIP_FRAMES, OBJECTS, Scene, scene
from dit_sparse.assets.train.verdict import CHECKS, Verdict, aggregate, judge_clip, wilson
from dit_sparse.assets.train.words import CAMERAS, COLOURS, MOTIONS, SHAPES

FIRST = random.randrange(1 << 20)  # a new stretch of held-out clips every time; failures print it


def _draw(count: int) -> Scene:
    return scene(measure.HELD_OUT_SEED, torch.arange(FIRST, FIRST + count))


def _calm(count: int) -> Scene:
    """Return clips of one plain object in the middle of a plain background."""
    clips, off = _draw(count), torch.zeros(count, dtype=torch.bool)
    none = torch.zeros(count, dtype=torch.long)
    middle = torch.zeros(count, OBJECTS)
    clips = replace(clips, count=none + 1, twin=off, blink=off, light=off, bar=off, background=none, camera=none)
    return replace(clips, texture=torch.zeros_like(clips.texture), x=middle, y=middle, radius=middle + 0.36)


def _all(values: list[int]) -> Tensor:
    return torch.tensor(values)[:, None].expand(-1, OBJECTS)


def _videos(clips: Scene, height: int = 64) -> Tensor:
    return measure.true_videos(clips, height)


def _judge(videos: Tensor, clips: Scene) -> list[list[Verdict]]:
    return [judge_clip(video, clips, b) for b, video in enumerate(videos)]


def _share(verdicts: list[list[Verdict]], name: str) -> float:
    return aggregate(verdicts).overall[name].share


def test_true_clips_are_right_and_wrong_words_are_not() -> None:
    clips = _draw(16)
    videos, draw = _videos(clips), torch.Generator().manual_seed(FIRST)
    truth = _judge(videos, clips)
    # 200 clips: 98.6 % and 97.1 %
    assert _share(truth, "colour") >= 0.8, FIRST
    assert _share(truth, "shape") >= 0.7, FIRST
    # 200 clips: 6 %, 0 % and 2 %
    assert _share(_judge(videos, score.misnamed(clips, "colour", draw)), "colour") <= 0.4, FIRST
    assert _share(_judge(videos, score.misnamed(clips, "shape", draw)), "shape") <= 0.2, FIRST
    assert _share(_judge(videos, score.misnamed(clips, "motion", draw)), "motion") <= 0.4, FIRST
    assert _share(_judge(videos.roll(1, 0), clips), "shape") <= 0.4, FIRST


def test_no_more_is_read_than_the_caption_says() -> None:
    clips = _draw(6)
    hidden = ("radius", "x", "y", "reach", "rate", "phase", "background_angle", "background_waves", "camera_speed")
    hidden += ("bar_centre", "bar_width", "phrasing")
    blind = replace(clips, **{name: torch.full_like(getattr(clips, name), float("nan")) for name in hidden})
    videos = _videos(clips, 32)
    assert _judge(videos, clips) == _judge(videos, blind), FIRST


def test_every_shape_is_told_from_the_others() -> None:
    clips = replace(_calm(len(SHAPES)), shape=_all(list(range(len(SHAPES)))), motion=_all([0] * len(SHAPES)))
    for verdicts, name in zip(_judge(_videos(clips), clips), SHAPES, strict=True):
        checks = {check.name: check for check in verdicts[0].checks}
        assert checks["shape"].seen == name, FIRST
        assert verdicts[0].overlap > 0.9, (name, FIRST)


def test_the_bank_holds_outlines_of_one_area() -> None:
    bank = outlines.outline_bank()
    assert bank.shape == (len(SHAPES), outlines.ROTATIONS, outlines.GRID, outlines.GRID)
    assert (bank >= 0).all()
    assert (bank <= 1).all()
    # as many points as pixels in a square of one root of the area
    points = (outlines.GRID / 2 / 1.06) ** 2
    torch.testing.assert_close(bank.sum(dim=(2, 3)), torch.full(bank.shape[:2], points), rtol=0.03, atol=0)
    assert not any(torch.allclose(bank[i, 0], bank[j, 0], atol=0.3) for i in range(9) for j in range(i))


def test_every_motion_is_told_from_the_others() -> None:
    """tracks.py restates how render.py moves things: the two must agree."""
    clips = replace(_calm(len(MOTIONS)), motion=_all(list(range(len(MOTIONS)))))
    clips = replace(clips, shape=_all([list(SHAPES).index("heart")] * len(MOTIONS)))
    videos = _videos(clips)
    for verdicts, motion in zip(_judge(videos, clips), MOTIONS, strict=True):
        wrong = [check for check in verdicts[0].checks if not check.right]
        assert not wrong, (motion, wrong, FIRST)
    drifts = [i for i, motion in enumerate(MOTIONS) if motion.startswith("drifting")]
    left, right, up, down = drifts
    turned = clips.motion.clone()
    for a, b in ((left, right), (up, down)):
        turned[a], turned[b] = b, a
    verdicts = _judge(videos, replace(clips, motion=turned))
    checks = [check for i in drifts for check in verdicts[i][0].checks if check.name == "direction"]
    assert len(checks) == 4
    assert not any(check.right for check in checks), FIRST


def test_a_panning_camera_carries_what_stands_still_the_other_way() -> None:
    pans = [f"panning {way}" for way in ("left", "right", "up", "down")]
    cameras = torch.tensor([list(CAMERAS).index(pan) for pan in pans])
    clips = replace(_calm(4), motion=_all([0] * 4), camera=cameras)
    checks = [check for (verdict,) in _judge(_videos(clips), clips) for check in verdict.checks]
    assert [c.seen for c in checks if c.name == "camera"] == ["right", "left", "down", "up"], FIRST


@pytest.mark.parametrize("colour", [None, "black", "pink"])  # the background alone, and frames of one odd colour
def test_an_empty_clip_shows_nothing(colour: str | None) -> None:
    clips = _draw(6)
    palette = (torch.tensor(list(COLOURS.values())) * 255).round().to(torch.uint8)
    for b in range(len(clips)):
        fill = palette[clips.background_colours[b, 0]] if colour is None else palette[list(COLOURS).index(colour)]
        for verdict in judge_clip(fill.expand(CLIP_FRAMES, 32, 32, 3), clips, b):
            assert not any(check.right for check in verdict.checks), (b, FIRST)
            assert verdict.overlap == 0


def test_noise_does_no_harm() -> None:
    clips = _draw(4)
    noise = torch.randint(0, 256, (4, CLIP_FRAMES, 32, 48, 3), dtype=torch.uint8)
    assert json.dumps(asdict(aggregate(_judge(noise, clips))), allow_nan=False)


@pytest.mark.parametrize("shape", [(33, 3, 16, 16), (2, 16, 16, 3)])  # channels first, and too short to move
def test_odd_videos_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"video must be uint8 \[T >= 3, H, W, 3\], got torch.uint8"):
        judge_clip(torch.zeros(shape, dtype=torch.uint8), _draw(1), 0)


def test_rates_and_intervals_add_up() -> None:
    assert wilson(0, 0) == (0.0, 1.0)
    assert wilson(50, 100) == pytest.approx((0.4038, 0.5962), abs=1e-3)
    assert wilson(100, 100) == pytest.approx((0.963, 1.0), abs=1e-3)
    judged = {i: score.judge_truth(32, i, 3) for i in range(3)}
    report = score.summary(judged)
    assert set(report) == {"right captions", "shuffled captions", "wrong colour", "wrong shape", "wrong motion"}
    right = report["right captions"]
    assert right["clips"] == 3
    assert set(CHECKS) < set(right["overall"])
    assert right["overall"]["colour"]["judged"] == int(scene(measure.HELD_OUT_SEED, torch.arange(3)).count.sum())
    assert json.dumps(report, allow_nan=False)


def test_a_track_with_gaps_still_has_a_direction() -> None:
    time = torch.linspace(-0.5, 0.5, 17)
    seen = torch.rand(17) < 0.7
    seen[:4] = True
    track = tracks.Track(x=torch.where(seen, time, 9.0), y=0.1 * time, size=0 * time, seen=seen, whole=seen)
    assert tracks.direction(track) == "right"
    assert tracks.growth(track) == "none"
    nowhere = replace(track, seen=seen & False, whole=seen & False)
    assert (tracks.direction(nowhere), tracks.kind(nowhere)) == ("none", "none")


def test_samples_do_not_depend_on_their_batch(pipe: WanPipeline) -> None:
    settings = score.Settings(captions=3, height=16, steps=2, guidance=4.0, seed=3, batch=2)
    both, alone = score.sample(pipe, [1, 2], settings), score.sample(pipe, [2], settings)
    assert both.shape == (2, CLIP_FRAMES, 16, 16, 3)
    assert (both[1].int() - alone[0].int()).abs().max() <= 1
    assert (both[0].int() - both[1].int()).abs().max() > 1


def test_true_clips_hold_what_windows_break() -> None:
    """Twins mirror each other, bars hide no outline for good, and what was panned away comes back."""
    every = scene(measure.HELD_OUT_SEED, FIRST + torch.arange(1500))
    for kind, which in breaks.kinds(every).items():
        indices = FIRST + which.nonzero()[:8, 0]
        assert len(indices) == 8, (kind, FIRST)
        clips = scene(measure.HELD_OUT_SEED, indices)
        figures = [breaks.figure(kind, video, clips, b) for b, video in enumerate(_videos(clips))]
        assert sum(figures) / 8 > 0.4, (kind, figures, FIRST)  # single clips of bars and twins reach from 0 to 1
        if kind == "away and back":
            for b, video in enumerate(_videos(clips)):  # another picture in the end, also in a colour nobody named
                unnamed = set(range(len(COLOURS))) - {int(c) for c in clips.background_colours[b]}
                unnamed -= {int(c) for c in clips.colour[b]} | {int(clips.bar_colour[b])}
                fill = torch.tensor(list(COLOURS.values())[min(unnamed)]) * 255
                video[-1] = fill.round().to(torch.uint8)
                assert breaks.figure(kind, video, clips, b) < 0.2, (b, FIRST)
        if kind == "twins":
            shifted = [breaks.figure(kind, v.roll(9, 2), clips, b) for b, v in enumerate(_videos(clips))]
            assert sum(shifted) < 0.5 * sum(figures), FIRST
            alone = [
                breaks.figure(kind, v[:, :, :32].repeat(1, 1, 2, 1), clips, b) for b, v in enumerate(_videos(clips))
            ]
            assert sum(alone) < sum(figures), FIRST


def test_breaks_compare_plans_with_dense_and_truth(pipe: WanPipeline) -> None:
    settings = score.Settings(captions=1, height=16, steps=1, guidance=1.0, seed=0, batch=1)
    report, rows = breaks.run(pipe, ["neighborhood:window=0.3"], 1, settings)
    assert rows.shape == (6, CLIP_FRAMES, 16, 16, 3)
    for kind in report["kinds"].values():
        assert list(kind["results"]) == ["truth", "dense", "neighborhood:window=0.3"]
        sparse = kind["results"]["neighborhood:window=0.3"]
        assert 0 < sparse["computed_density"] <= 1
        assert sparse["psnr_db"] > 0
    assert json.dumps(report, allow_nan=False)
