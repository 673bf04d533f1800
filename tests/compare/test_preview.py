"""Pictures on the way: what they show, against the velocities that the scheduler got; what they must not change."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dit_sparse.options import Options
from dit_sparse.pipelines import preview
from dit_sparse.pipelines.generate import Job, generate, load_pipeline
from dit_sparse.pipelines.preview import MOST, middle_frame, previews
from dit_sparse.search.compare import measure_plans
from dit_sparse.search.metrics import psnr_db
from dit_sparse.search.request import Request
from dit_sparse.search.video import to_bytes
from tests.compare.test_compare import JOB


@pytest.fixture
def pipe(tiny_wan: Path) -> Any:
    pipe = load_pipeline(str(tiny_wan), "cpu", "float32")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def watched(pipe: Any, job: Job) -> tuple[np.ndarray, list[np.ndarray]]:
    """Return the final frames in 8 bits and the pictures on the way."""
    seen: list[np.ndarray] = []
    aside = previews(pipe, job.steps, seen.append)
    assert aside is not None
    return to_bytes(generate(pipe, job, on_latents=aside).frames), seen


def whole_clip(pipe: Any, latents: torch.Tensor) -> np.ndarray:
    """Decode all latents as the pipeline does: uint8 [T, H, W, 3]."""
    std, mean = torch.tensor(pipe.vae.config.latents_std), torch.tensor(pipe.vae.config.latents_mean)
    with torch.no_grad():
        pixels = pipe.vae.decode(latents * std[:, None, None, None] + mean[:, None, None, None]).sample
    return to_bytes((pixels[0].permute(1, 2, 3, 0) / 2 + 0.5).clamp(0, 1).numpy())


def test_pictures_are_estimates_from_the_true_velocity(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """x0 = x - sigma v with the v that the scheduler was given, the whole clip decoded, its middle frame taken."""
    wanted, stock = [], pipe.scheduler.step

    def step(velocity: torch.Tensor, t: torch.Tensor, x: torch.Tensor, **options: Any) -> Any:
        sigma = pipe.scheduler.sigmas[len(wanted)]
        wanted.append(whole_clip(pipe, x - sigma * velocity)[middle_frame(5, 2)])
        return stock(velocity, t, x, **options)

    monkeypatch.setattr(pipe.scheduler, "step", step)
    _, seen = watched(pipe, JOB)
    assert len(seen) == 2, "after steps 2 and 3: the first has no step before it, after the last the clip comes"
    assert seen[0].shape == (64, 96, 3)
    for picture, other in zip(seen, wanted[1:3], strict=True):
        assert np.abs(picture.astype(int) - other).max() <= 1
    assert not np.array_equal(seen[0], seen[1])


def test_a_scheduler_that_keeps_its_prediction(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers import UniPCMultistepScheduler

    settings = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    pipe.scheduler = UniPCMultistepScheduler(**settings)
    wanted, stock = [], pipe.scheduler.step

    def step(velocity: torch.Tensor, t: torch.Tensor, x: torch.Tensor, **options: Any) -> Any:
        wanted.append(whole_clip(pipe, x - pipe.scheduler.sigmas[len(wanted)] * velocity)[middle_frame(5, 2)])
        return stock(velocity, t, x, **options)

    monkeypatch.setattr(pipe.scheduler, "step", step)
    _, seen = watched(pipe, JOB)
    assert len(seen) == 3
    for picture, other in zip(seen, wanted, strict=False):
        assert np.abs(picture.astype(int) - other).max() <= 1


def test_late_pictures_of_the_bundled_model_are_near_the_clip() -> None:
    """12 latent frames, so that only a window of them is decoded."""
    pipe = load_pipeline("bundled", "cpu", "float32")
    pipe.set_progress_bar_config(disable=True)
    job = Job("a red circle bouncing on a white background", steps=8, frames=23, height=32, width=32, text_tokens=64)
    clip, seen = watched(pipe, job)
    shown = clip[middle_frame(12, 2)]
    near = [psnr_db(shown[None] / 255.0, picture[None] / 255.0) for picture in seen]
    assert len(seen) == 6
    assert near[-1] > 25
    assert near[-1] > near[0] + 3
    others = [psnr_db(frame[None] / 255.0, seen[-1][None] / 255.0) for frame in clip]
    assert int(np.argmax(others)) == middle_frame(12, 2), "it is that frame, and no other"


def test_kinds_that_are_not_known_give_none(pipe: Any) -> None:
    from diffusers import FlowMatchHeunDiscreteScheduler

    class OtherPipeline(type(pipe)):  # type: ignore[misc]
        pass

    other = OtherPipeline(**pipe.components)
    assert previews(other, 4, lambda frame: None) is None
    pipe.scheduler = FlowMatchHeunDiscreteScheduler()
    assert previews(pipe, 4, lambda frame: None) is None


@pytest.mark.parametrize("field", ["stochastic_sampling", "invert_sigmas"])
def test_steps_that_are_no_straight_line_give_none(field: str, pipe: Any) -> None:
    pipe.scheduler.register_to_config(**{field: True})
    assert watched(pipe, JOB)[1] == []


def test_large_frames_are_shrunk(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _, whole = watched(pipe, JOB)
    monkeypatch.setattr(preview, "MOST_SIDE", 48)
    _, small = watched(pipe, JOB)
    mean = whole[0].reshape(32, 2, 48, 2, 3).mean(axis=(1, 3))
    assert small[0].shape == (32, 48, 3)
    assert np.abs(small[0] - mean).max() <= 1


def test_pictures_change_nothing_and_do_not_count(tiny_wan: Path, tmp_path: Path, pipe: Any) -> None:
    """The same number for dense and sparse; a slow page, here 0.2 s a picture, costs the clip no seconds."""
    seen: list[str] = []

    def show(run: str, frame: np.ndarray) -> None:
        seen.append(run)
        time.sleep(0.2)

    asked = Request(JOB, ("topblocks:keep=0.3",), tmp_path, str(tiny_wan), "cpu", options=Options(min_tokens=0))
    start = time.perf_counter()
    found = measure_plans(asked, pipe=pipe, preview=show)
    wall = time.perf_counter() - start
    plain = measure_plans(asked, pipe=pipe)
    assert seen == ["dense"] * 2 + ["topblocks-keep-0.3"] * 2
    for name, run in found.runs.items():
        assert np.array_equal(run.clip.frames, plain.runs[name].clip.frames)
    assert sum(run.clip.seconds for run in found.runs.values()) < wall - 0.2 * len(seen)


@pytest.mark.parametrize("steps", [1, 2, 9, 16, 50])  # fewer and more than MOST, multiples and not
def test_pictures_are_few_and_spread(steps: int, pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[int] = []
    monkeypatch.setitem(preview.ESTIMATES, "FlowMatchEulerDiscreteScheduler", lambda s, done, *_: shown.append(done))
    aside = previews(pipe, steps, lambda frame: None)
    assert aside is not None
    for done in range(1, steps + 1):
        aside(done, torch.zeros(1))
    assert len(shown) == min(MOST, steps - 1)
    assert steps not in shown
    gaps = np.diff([0, *shown, steps]) if shown else np.array([1])
    assert gaps.max() - gaps.min() <= 1


@pytest.mark.gpu
def test_pictures_on_cuda() -> None:
    """Of the bundled model in bfloat16: the clip is the same bit for bit, and the last picture is near it."""
    pipe = load_pipeline("bundled", "cuda", "bfloat16")
    pipe.set_progress_bar_config(disable=True)
    job = Job("a red circle bouncing on a white background", steps=8, frames=23, height=64, width=64, text_tokens=64)
    plain = to_bytes(generate(pipe, job).frames)
    clip, seen = watched(pipe, job)
    assert np.array_equal(clip, plain)
    assert len(seen) == 6
    assert psnr_db(clip[middle_frame(12, 2)][None] / 255.0, seen[-1][None] / 255.0) > 25
