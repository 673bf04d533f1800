"""The Schedule is told the right grid, step, number of steps, branch and run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import CogVideoXDPMScheduler, UniPCMultistepScheduler

from dit_sparse.grid import Grid
from dit_sparse.patterns import TopBlocks
from dit_sparse.pipelines.compat import schedule_index
from dit_sparse.pipelines.enable import enable
from dit_sparse.schedule import Schedule
from tests.pipelines.conftest import Told
from tests.pipelines.tiny import PROMPT, SIZE, TEXT_TOKENS, cogvideox, generate, wan


def positions(told: list[Told]) -> list[tuple[int | None, int | None, str | None]]:
    return [(one.step, one.total_steps, one.branch) for one in told]


def runs(told: list[Told]) -> int:
    return len({id(one.run) for one in told})


def test_wan_is_two_forwards_a_step(told: list[Told]) -> None:
    pipe = wan()
    enable(pipe, TopBlocks(keep=0.5))
    generate(pipe, steps=3)
    assert positions(told) == [(step, 3, branch) for step in range(3) for branch in ("cond", "uncond")]
    assert {one.grid for one in told} == {Grid(4, 8, 8)}
    assert runs(told) == 1


def test_cogvideox_is_one_doubled_forward_a_step(told: list[Told]) -> None:
    pipe = cogvideox()
    enable(pipe, TopBlocks(keep=0.5))
    generate(pipe, steps=3)
    assert positions(told) == [(step, 3, "cond_uncond") for step in range(3)]
    assert {one.grid for one in told} == {Grid(4, 8, 8)}
    assert runs(told) == 1


def test_cogvideox_1_5_patches_frames(told: list[Told]) -> None:
    pipe = cogvideox(patch_size_t=2)
    enable(pipe, TopBlocks(keep=0.5), min_tokens=0)
    generate(pipe, steps=1, num_frames=17)  # 5 latent frames, padded to 6
    assert [one.grid for one in told] == [Grid(3, 8, 8)]


def test_wan_2_2_has_two_experts_in_one_run(told: list[Told]) -> None:
    pipe = wan(experts=2)
    enable(pipe, TopBlocks(keep=0.5))
    generate(pipe, steps=6)
    assert [one.step for one in told] == [step for step in range(6) for _ in range(2)]
    experts = [one.transformer for one in told]
    assert experts == sorted(experts)
    assert set(experts) == {"transformer", "transformer_2"}
    assert all(one.total_steps == 6 for one in told)


def test_wan_2_2_5b_expands_timesteps(told: list[Told]) -> None:
    pipe = wan(expand_timesteps=True)
    enable(pipe, TopBlocks(keep=0.5))
    generate(pipe, steps=2)
    assert [one.step for one in told] == [0, 0, 1, 1]
    assert {one.grid for one in told} == {Grid(4, 8, 8)}


def test_guidance_off_is_one_forward(pipe: Any, told: list[Told]) -> None:
    enable(pipe, TopBlocks(keep=0.5))
    generate(pipe, steps=3, guidance=1.0)
    assert [one.step for one in told] == [0, 1, 2]
    assert len({one.branch for one in told}) == 1


def test_each_call_of_the_pipeline_is_a_run(pipe: Any, told: list[Told]) -> None:
    enable(pipe, TopBlocks(keep=0.5))
    generate(pipe, steps=2)
    generate(pipe, steps=2)
    first, second = told[: len(told) // 2], told[len(told) // 2 :]
    assert positions(first) == positions(second)
    assert runs(first) == runs(second) == 1
    assert first[0].run is not second[0].run


class StoppedError(Exception):
    pass


def stop_in_mid_run(pipe: Any, at: int, **size: int) -> None:
    def stop(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step == at:
            raise StoppedError
        return tensors

    with pytest.raises(StoppedError):
        pipe(
            PROMPT, num_inference_steps=4, output_type="latent", max_sequence_length=TEXT_TOKENS,
            callback_on_step_end=stop, **{**SIZE, **size},
        )  # fmt: skip


@pytest.mark.parametrize("at", [0, 2])  # the first step: the step index does not go back
def test_an_exception_in_mid_run_does_not_poison_the_next(pipe: Any, told: list[Told], at: int) -> None:
    plan = "balanced"  # reuses its selection over steps, so a stale one would show
    enable(pipe, plan, min_tokens=0)
    clean = generate(pipe)
    told.clear()
    stop_in_mid_run(pipe, at)
    broken = told[-1].run
    told.clear()
    assert torch.equal(generate(pipe), clean)
    assert told[0].step == 0
    assert told[0].run is not broken
    assert runs(told) == 1


def test_an_exception_inside_a_layer_leaves_no_layer_running(pipe: Any) -> None:
    from dit_sparse.pipelines.processors import _RUNNING

    enable(pipe, TopBlocks(keep=0.5), min_tokens=0)
    clean = generate(pipe)
    module = next(module for name, module in pipe.transformer.named_modules() if name.endswith("attn1.to_out.0"))
    handle = module.register_forward_hook(lambda *call: (_ for _ in ()).throw(StoppedError()))
    with pytest.raises(StoppedError):
        generate(pipe)
    handle.remove()
    assert _RUNNING.layer is None
    assert torch.equal(generate(pipe), clean)


def test_another_resolution_gets_its_own_grid(pipe: Any, told: list[Told]) -> None:
    enable(pipe, "balanced", min_tokens=0)
    clean = generate(pipe)
    told.clear()
    generate(pipe, height=64, width=96, num_frames=9)
    assert {(one.grid.frames, one.grid.height, one.grid.width) for one in told if one.grid} == {(3, 4, 6)}
    stop_in_mid_run(pipe, 1, height=96, width=64)
    assert torch.equal(generate(pipe), clean)


# where the step comes from: the timestep as a view (DDIM has no counter), or the scheduler's counter
@pytest.mark.parametrize("scheduler", ["ddim", "dpm", "unipc"])
def test_steps_without_cache_context(told: list[Told], scheduler: str) -> None:
    pipe = cogvideox()
    if scheduler == "dpm":
        pipe.scheduler = CogVideoXDPMScheduler.from_config(pipe.scheduler.config)
    if scheduler == "unipc":
        pipe.scheduler = UniPCMultistepScheduler()
    enable(pipe, TopBlocks(keep=0.5))
    generate(pipe, steps=4)
    generate(pipe, steps=2)
    assert [(one.step, one.total_steps) for one in told] == [(0, 4), (1, 4), (2, 4), (3, 4), (0, 2), (1, 2)]
    assert runs(told) == 2


def test_image_to_video_begins_late_in_the_schedule() -> None:
    scheduler = UniPCMultistepScheduler()
    scheduler.set_timesteps(10)
    late = scheduler.timesteps[7:]  # strength .3
    scheduler.set_begin_index(7)
    assert [schedule_index(scheduler, t.expand(2)) for t in late] == [7, 8, 9]
    assert schedule_index(scheduler, late[0].expand(2).float() / 1000) == 7  # converted: the counter is asked
    assert schedule_index(scheduler, scheduler.timesteps[2:4]) == 7  # one timestep a frame tells no step
    scheduler.timesteps = scheduler.timesteps.clone()
    assert schedule_index(scheduler, late[1].expand(2)) == 7  # a view of something else
    assert schedule_index(object(), late[1]) is None


def test_a_lone_transformer_counts_per_branch(told: list[Told]) -> None:
    pipe = cogvideox()
    enable(pipe.transformer, TopBlocks(keep=0.5))
    generate(pipe, steps=3)
    generate(pipe, steps=2)
    assert positions(told) == [(step, None, "cond_uncond") for step in (0, 1, 2, 0, 1)]
    assert runs(told) == 2


def test_a_step_that_goes_back_is_a_new_run(told: list[Told]) -> None:
    """A lone transformer sees neither the scheduler nor, after an exception, the end of the run."""
    pipe = wan()
    enable(pipe.transformer, TopBlocks(keep=0.5))
    stop_in_mid_run(pipe, 2)
    generate(pipe, steps=1)
    assert [one.step for one in told] == [0, 0, 1, 1, 2, 2, 0, 0]
    assert runs(told) == 2
    assert told[-1].run is not told[-3].run


def test_branches_without_names_are_told_apart_by_order(told: list[Told]) -> None:
    """A pipeline of two forwards a step that never opens a cache context, with a scheduler that counts."""
    pipe = wan()
    enable(pipe, TopBlocks(keep=0.5))
    pipe.scheduler.set_timesteps(2)
    text = torch.randn(1, TEXT_TOKENS, 32)
    with torch.no_grad():
        for t in pipe.scheduler.timesteps:
            for _ in range(2):
                pipe.transformer(torch.randn(1, 4, 2, 8, 8), t.expand(1), text)
    assert positions(told) == [(0, 2, "call 0"), (0, 2, "call 1"), (1, 2, "call 0"), (1, 2, "call 1")]


def test_arguments_may_be_positional_and_wrong_ones_get_the_stock_error(told: list[Told]) -> None:
    transformer = wan().transformer
    enable(transformer, TopBlocks(keep=0.5))
    video, text = torch.randn(1, 4, 2, 8, 8), torch.randn(1, TEXT_TOKENS, 32)
    with torch.no_grad():
        transformer(video, torch.tensor([1]), text)
        assert told[-1].grid == Grid(2, 4, 4)
        with pytest.raises(TypeError, match="no_such_argument"):
            transformer(video, torch.tensor([1]), text, no_such_argument=1)
    assert told[-1].grid is None
    assert "no_such_argument" in (told[-1].reason or "")


def test_the_end_of_a_run_frees_what_belongs_to_it(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[str] = []
    end_run = Schedule.end_run

    def record(self: Schedule) -> None:
        ended.append(self.transformer)
        end_run(self)

    monkeypatch.setattr(Schedule, "end_run", record)
    enable(pipe, "balanced", min_tokens=0)
    generate(pipe)
    assert ended == ["transformer"]
