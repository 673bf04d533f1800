"""The step and the branch are right in pipelines that do not tell them, and nothing crosses where nobody can know."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from dit_sparse.patterns import TopBlocks
from dit_sparse.pipelines.enable import enable
from tests.pipelines import tiny
from tests.pipelines.conftest import Told
from tests.pipelines.tiny_more import (
    GRID,
    PIPELINES,
    TOKENS,
    FakeVAE,
    Tiny,
    allegro,
    chroma,
    easy_animate,
    flux_image_to_image,
    framepack,
    helios,
    hunyuan_dit,
    kandinsky5,
    krea2,
    lumina2,
    pixart,
    sd3,
    skyreels,
    z_image,
)


def enabled(made: Tiny) -> Tiny:
    enable(made.pipe, TopBlocks(keep=0.5), grid=GRID)
    return made


def steps(told: list[Told]) -> list[tuple[int | None, int | None]]:
    return [(one.step, one.total_steps) for one in told]


def branches(told: list[Told]) -> list[str | None]:
    return [one.branch for one in told]


def runs(told: list[Told]) -> int:
    return len({id(one.run) for one in told})


@pytest.mark.parametrize("name", sorted(PIPELINES))
def test_each_pipeline_with_and_without_guidance(told: list[Told], name: str) -> None:
    made = enabled(PIPELINES[name]())
    for guided in (False, True, False):
        told.clear()
        made.run(3, guided=guided)
        forwards = made.forwards if guided else 1
        assert steps(told) == [(step, 3) for step in range(3) for _ in range(forwards)]
        assert branches(told) == branches(told[:forwards]) * 3
        assert len(set(branches(told))) == forwards
        assert runs(told) == 1


def test_a_window_is_the_same_share_of_4_and_of_50_steps(told: list[Told]) -> None:
    made = enabled(kandinsky5())
    shares = []
    for number in (4, 50):
        told.clear()
        made.run(number)
        assert steps(told) == [(step, number) for step in range(number)]
        shares.append(sum(0.25 <= (one.step or 0) / number < 0.75 for one in told) / number)
    assert shares == [0.5, 0.5]


# a view into the schedule; the same with two entries a step; the timestep that the pipeline notes
@pytest.mark.parametrize("form", ["sd3", "sd3-heun", "flux"])
def test_image_to_image_begins_late(told: list[Told], form: str) -> None:
    image = torch.randn(1, 4, 16, 16)
    if form == "flux":
        made, image = flux_image_to_image(), torch.rand(1, 3, 128, 128)
    else:
        scheduler = diffusers.FlowMatchHeunDiscreteScheduler() if form == "sd3-heun" else None
        made = sd3(diffusers.StableDiffusion3Img2ImgPipeline, vae=FakeVAE(), scheduler=scheduler)
    enabled(made).run(10, image=image, strength=0.3)
    first, total = (14, 19) if form == "sd3-heun" else (7, 10)
    assert steps(told) == [(step, total) for step in range(first, total)]


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_video_to_video_begins_late(told: list[Told], guidance: float) -> None:
    """The pipeline cuts the schedule and tells the scheduler nothing."""
    components = {name: part for name, part in tiny.wan().components.items() if name != "transformer_2"}
    components["scheduler"] = diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    pipe = diffusers.WanVideoToVideoPipeline(**components)
    pipe.set_progress_bar_config(disable=True)
    enable(pipe, TopBlocks(keep=0.5))
    pipe(
        video=[torch.zeros(3, 64, 64)] * 5, prompt=tiny.PROMPT, height=64, width=64, num_inference_steps=10,
        strength=0.3, guidance_scale=guidance, output_type="latent", max_sequence_length=TOKENS,
    )  # fmt: skip
    expected = ["call 0"] if guidance == 1 else ["call 0", "call 1"]
    assert [(one.step, one.branch) for one in told] == [(step, name) for step in (7, 8, 9) for name in expected]
    assert {one.total_steps for one in told} == {10}


# by the view, and by the counter
@pytest.mark.parametrize("build", [lambda scheduler: sd3(scheduler=scheduler), kandinsky5], ids=["sd3", "kandinsky5"])
def test_a_scheduler_of_order_two_counts_its_own_entries(told: list[Told], build: Any) -> None:
    made = enabled(build(diffusers.FlowMatchHeunDiscreteScheduler()))
    made.run(4, guided=True)
    assert steps(told) == [(step, 7) for step in range(7) for _ in range(made.forwards)]
    assert runs(told) == 1


# the schedule that is iterated is not the scheduler's, which has no counter; nothing but the calls can be counted
@pytest.mark.parametrize("build", [allegro, easy_animate], ids=["allegro", "easy_animate"])
def test_a_scheduler_without_a_counter(told: list[Told], build: Any) -> None:
    made = enabled(build(diffusers.DDIMScheduler()))
    made.run(4, guided=True)
    made.run(3)
    assert steps(told) == [(0, 4), (1, 4), (2, 4), (3, 4), (0, 3), (1, 3), (2, 3)]
    assert runs(told) == 2


@pytest.mark.parametrize("build", [chroma, lumina2, sd3])
def test_two_prompts_in_a_batch(told: list[Told], build: Any) -> None:
    made = enabled(build())
    call = {**made.call, **made.guided}
    twice = {key: torch.cat([value, value]) for key, value in call.items() if isinstance(value, Tensor)}
    made.run(2, **{**call, **twice})
    assert steps(told) == [(step, 2) for step in range(2) for _ in range(made.forwards)]
    assert len(set(branches(told))) == made.forwards


@pytest.mark.parametrize("build", [krea2, pixart, z_image])
def test_two_images_of_one_prompt(told: list[Told], build: Any) -> None:
    made = enabled(build())
    made.run(2, guided=True, num_images_per_prompt=2)
    assert steps(told) == [(step, 2) for step in range(2) for _ in range(made.forwards)]
    assert len(set(branches(told))) == made.forwards


def test_guidance_that_ends_early_leaves_the_conditional_branch(told: list[Told]) -> None:
    enabled(lumina2()).run(4, guided=True, cfg_trunc_ratio=0.5)
    assert [one.step for one in told] == [0, 0, 1, 1, 2, 3]
    assert branches(told)[-1] == branches(told)[0]


def test_skipped_layers_are_a_branch_of_their_own(told: list[Told]) -> None:
    enabled(sd3()).run(3, guided=True, skip_guidance_layers=[1], skip_layer_guidance_stop=0.5)
    assert [one.step for one in told] == [0, 1, 1, 2]
    assert branches(told) == ["cond_uncond", "cond_uncond", "call 1", "cond_uncond"]


class StoppedError(Exception):
    pass


# by the counter, which the next run resets; by the noted timestep; by the calls; at the first step and a later one
@pytest.mark.parametrize("build", [kandinsky5, krea2, hunyuan_dit])
@pytest.mark.parametrize("forwards", [1, 4])
def test_a_run_that_raised_does_not_shift_the_next(told: list[Told], build: Any, forwards: int) -> None:
    made = enabled(build())

    def stop(*call: Any) -> None:
        if len(told) == forwards:
            raise StoppedError

    handle = made.pipe.transformer.register_forward_hook(stop)
    with pytest.raises(StoppedError):
        made.run(5, guided=True)
    handle.remove()
    broken = told[-1].run
    told.clear()
    made.run(3, guided=True)
    assert steps(told) == [(step, 3) for step in range(3) for _ in range(made.forwards)]
    assert runs(told) == 1
    assert told[0].run is not broken


def test_the_sections_of_framepack_are_runs(told: list[Told]) -> None:
    """Its second prompt is another branch, although the table knows it as a model of one forward a step."""
    enabled(framepack()).run(2, guided=True)
    assert steps(told) == [(0, 2), (0, 2), (1, 2), (1, 2)] * 2
    assert len(set(branches(told))) == 2
    assert runs(told) == 2


# every frame at the same time, and frames that lag behind: then there are more steps than the schedule has
@pytest.mark.parametrize(("lag", "rows"), [({}, 4), ({"ar_step": 2, "causal_block_size": 1}, 8)])
def test_the_sections_of_diffusion_forcing_are_runs(told: list[Told], lag: dict[str, int], rows: int) -> None:
    enabled(skyreels()).run(4, guided=True, **lag)
    section = [(step, branch) for step in range(rows) for branch in ("cond", "uncond")]
    first = told[: len(section)]
    assert [(one.step, one.branch) for one in first] == section
    assert {one.total_steps for one in first} == {rows}
    assert [one.step for one in told].count(0) == 2 * runs(told) > 2


def test_the_stages_of_helios_are_runs(told: list[Told]) -> None:
    """Its distilled scheduler never moves its counter: calls of each named branch count."""
    made = enabled(helios(tiny.wan().vae))
    sizes = {"height": 128, "width": 128, "output_type": "latent", "pyramid_num_inference_steps_list": [2, 3, 2]}
    made.pipe(**{**sizes, **made.call, **made.guided, "num_frames": 5})
    expected = [
        (step, number, branch) for number in (2, 3, 2) for step in range(number) for branch in ("cond", "uncond")
    ]
    assert [(one.step, one.total_steps, one.branch) for one in told] == expected
    assert runs(told) == 3
