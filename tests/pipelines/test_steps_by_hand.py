"""Forwards that no stock pipeline makes: the step is told where it is known, and nothing crosses between prompts."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from dit_sparse.patterns import TopBlocks
from dit_sparse.pipelines.compat import ToldStep, schedule_index, told_step
from dit_sparse.pipelines.enable import enable
from tests.pipelines import tiny
from tests.pipelines.conftest import Told
from tests.pipelines.tiny_more import GRID, TOKENS, WIDTH, hunyuan_dit, kandinsky5


def branches(told: list[Told]) -> list[str | None]:
    return [one.branch for one in told]


def runs(told: list[Told]) -> int:
    return len({id(one.run) for one in told})


# as most pipelines write it; as PixArt does; as LTX with conditions does
@pytest.mark.parametrize("shape", [lambda t: t.expand(2), lambda t: t[None].expand(1), lambda t: t.expand(2)[:, None]])
def test_any_view_of_one_entry_tells_its_index(shape: Callable[[Tensor], Tensor]) -> None:
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(6)
    assert [schedule_index(scheduler, shape(t)) for t in scheduler.timesteps[2:]] == [2, 3, 4, 5]
    assert schedule_index(scheduler, scheduler.timesteps[2:4]) is None


def test_the_noted_timestep_tells_where_the_argument_was_converted() -> None:
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(7)
    scheduler.timesteps = scheduler.timesteps[1:]  # the storage has an entry more than the schedule
    t = scheduler.timesteps[4]
    pipe = SimpleNamespace(scheduler=scheduler, _current_timestep=t)
    assert told_step(pipe, t.expand(2) / 1000) == ToldStep(4, 6, by_counter=False)
    pipe._current_timestep = None
    assert told_step(pipe, t.expand(2) / 1000) == ToldStep(None, 6, by_counter=False)


def test_telling_the_step_reads_no_value(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device each of these would wait for everything that was launched."""

    def read(*given: Any) -> None:
        raise AssertionError("a value was read")

    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(6)
    t = scheduler.timesteps[4]
    pipe = SimpleNamespace(scheduler=scheduler, _current_timestep=t)
    for name in ("item", "tolist", "numpy", "cpu", "__int__", "__float__", "__bool__", "__index__"):
        monkeypatch.setattr(Tensor, name, read)
    assert told_step(pipe, t.expand(2)).step == 4
    assert told_step(pipe, t / 1000).step == 4
    pipe._current_timestep = None
    assert told_step(pipe, t / 1000) == ToldStep(0, 6, by_counter=True)


def forward(transformer: Any, text: Tensor, timestep: Tensor) -> None:
    with torch.no_grad():
        transformer(torch.randn(1, 4, 2, 8, 8), timestep, text)


def test_by_hand_without_a_pipeline_nothing_is_shared(told: list[Told]) -> None:
    """Neither step nor prompt is known: each forward is a run of its own, so that no selection crosses."""
    transformer = tiny.wan().transformer
    enable(transformer, TopBlocks(keep=0.5))
    cond, uncond = torch.randn(2, 1, TOKENS, 32)
    schedule = torch.linspace(1000, 0, 3)
    for t in schedule:
        forward(transformer, cond, t.expand(1))
        forward(transformer, uncond, t.expand(1))
    assert [(one.step, one.total_steps) for one in told] == [(None, None)] * 6
    assert runs(told) == 6
    assert len(set(branches(told))) == 1  # names do not pile up


def test_by_hand_in_named_contexts_each_name_is_counted(told: list[Told]) -> None:
    transformer = tiny.wan().transformer
    enable(transformer, TopBlocks(keep=0.5))
    text = torch.randn(1, TOKENS, 32)
    for t in torch.linspace(1000, 0, 3):
        for name in ("cond", "uncond"):
            with transformer.cache_context(name):
                forward(transformer, text, t.expand(1))
    assert [(one.step, one.branch) for one in told] == [
        (step, name) for step in range(3) for name in ("cond", "uncond")
    ]
    assert runs(told) == 1


def test_by_hand_with_a_counter_that_stands_still(told: list[Told]) -> None:
    """A loop of one's own that never calls scheduler.step(): after a few forwards nothing is taken for known."""
    pipe = tiny.wan()
    enable(pipe, TopBlocks(keep=0.5))
    pipe.scheduler.set_timesteps(4)
    for number in range(8):
        forward(pipe.transformer, torch.randn(1, TOKENS, 32), torch.tensor([900.0 - number]))
    known, unknown = told[:4], told[4:]
    assert len(set(branches(known))) == 4
    assert [one.step for one in unknown] == [None] * 4
    assert runs(unknown) == 4


def test_by_hand_at_one_timestep_the_branches_do_not_pile_up(told: list[Told]) -> None:
    pipe = tiny.wan()
    enable(pipe, TopBlocks(keep=0.5))
    pipe.scheduler.set_timesteps(4)
    for _ in range(8):
        forward(pipe.transformer, torch.randn(1, TOKENS, 32), pipe.scheduler.timesteps[2].expand(1))
    assert [one.step for one in told] == [2] * 8
    assert runs(told[4:]) == 4
    assert len(set(branches(told))) == 5


def test_after_the_last_step_nothing_is_known(told: list[Told]) -> None:
    made = kandinsky5()
    enable(made.pipe, TopBlocks(keep=0.5), grid=GRID)
    made.run(2)
    told.clear()
    call = {key: made.call[key] for key in made.call if key.startswith("prompt_embeds")}
    positions = tuple(torch.arange(size) for size in (2, 8, 8))
    for _ in range(2):
        with torch.no_grad():
            made.pipe.transformer(
                torch.randn(1, 2, 16, 16, 4), call["prompt_embeds_qwen"], torch.tensor([500.0]),
                call["prompt_embeds_clip"], positions, torch.arange(TOKENS),
            )  # fmt: skip
    assert [one.step for one in told] == [None, None]
    assert runs(told) == 2


def test_calls_are_counted_for_each_prompt(told: list[Told]) -> None:
    """Where only calls can be counted, another prompt's forward is another branch, not another step."""
    pipe = hunyuan_dit().pipe
    enable(pipe, TopBlocks(keep=0.5), grid=GRID)
    pipe.scheduler.set_timesteps(3)
    prompts = [torch.randn(1, TOKENS, WIDTH) for _ in range(2)]
    mask, rotary = torch.ones(1, TOKENS), (torch.randn(64, 16), torch.randn(64, 16))
    for number in range(4):
        for text in prompts:
            with torch.no_grad():
                pipe.transformer(
                    torch.randn(1, 4, 16, 16), torch.tensor([500.0]), encoder_hidden_states=text,
                    encoder_hidden_states_t5=text, text_embedding_mask=mask, text_embedding_mask_t5=mask,
                    image_rotary_emb=rotary, image_meta_size=torch.ones(1, 6), style=torch.zeros(1, dtype=torch.long),
                )  # fmt: skip
        expected = number if number < 3 else None  # the schedule has no fourth step
        assert [one.step for one in told[-2:]] == [expected, expected]
    assert [one.branch for one in told[:6]] == branches(told[:2]) * 3
    assert len(set(branches(told[:2]))) == 2
    assert runs(told[:6]) == 1
    assert runs(told) == 3
