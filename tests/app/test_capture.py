"""What is recorded of a real run, against what patterns really chose; the run and the pipeline stay as they were."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from dit_sparse.app.capture import Wanted, captured_choice, recorded
from dit_sparse.app.choice import READ, Choice, keys_of
from dit_sparse.app.seeing import mask_image, mask_text
from dit_sparse.options import Options
from dit_sparse.patterns import Cached, Neighborhood, TopBlocks
from dit_sparse.pipelines.enable import disable, enable, sparse, summary
from dit_sparse.pipelines.generate import Job, generate, load_pipeline
from dit_sparse.plan import Plan, Rule
from dit_sparse.selection import Selection
from tests.compare.tiny import save_tiny_wan

JOB = Job("a red ball", seed=3, steps=4, frames=9, height=64, width=96)
GRID = (5, 8, 12)
OPTIONS = Options(min_tokens=0)
MIXED = Plan((Rule(Neighborhood(0.4), heads=(0,)), Rule(TopBlocks(0.3, compensate=True), (0.25, 1.0), heads=(1,))))


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> Any:
    pipe = load_pipeline(str(save_tiny_wan(tmp_path_factory.mktemp("model") / "tiny")), "cpu", "float32")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def spied(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int | None, Selection]]:
    """Collect (step, selection) of every choice that TopBlocks makes."""
    chosen: list[tuple[int | None, Selection]] = []
    select = TopBlocks.select

    def spy(self: TopBlocks, q: Any, k: Any, grid: Any, state: Any) -> Selection:
        found = select(self, q, k, grid, state)
        chosen.append((state.step, found))
        return found

    monkeypatch.setattr(TopBlocks, "select", spy)
    return chosen


def test_the_blocks_are_those_that_were_chosen(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = spied(monkeypatch)
    step, layer = 2, 1
    choice = captured_choice(pipe, JOB, MIXED, step, layer, 1, options=OPTIONS)
    assert isinstance(choice, Choice)
    assert choice.branch == "cond"
    assert choice.compensate
    assert choice.grid.shape == GRID
    # steps without the head come before; in a step: each branch calls every layer, the prompt's branch first
    of_step = [selection for when, selection in chosen if when == step]
    assert len(of_step) == 2 * 2
    wanted = of_step[layer].indices
    assert torch.equal(choice.indices.block_mask()[0], wanted.block_mask()[int(wanted.head_of[-1])])
    assert 0 < choice.indices.block_mask().float().mean() < 1
    token = (2, 3, 4)
    assert 0 < int((keys_of(choice, token) == READ).sum()) < 480
    image = mask_image(choice)
    assert image.size[0] == image.size[1] == choice.layout.blocks * (512 // choice.layout.blocks)
    assert "topblocks" in mask_text(choice)
    assert max(when for when, _ in chosen if when is not None) == step, "nothing runs beyond the step"


def test_a_choice_that_is_kept(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = spied(monkeypatch)
    choice = captured_choice(pipe, JOB, Plan.of(Cached(TopBlocks(0.3), 3)), 2, 0, 1, options=OPTIONS)
    assert isinstance(choice, Choice)
    assert {when for when, _ in chosen} == {0}
    first = chosen[0][1].indices  # layer 0 of the prompt's branch
    assert torch.equal(choice.indices.block_mask()[0], first.block_mask()[int(first.head_of[1])])


def test_a_static_head_is_told_by_its_definition(pipe: Any) -> None:
    choice = captured_choice(pipe, JOB, MIXED, 0, 0, 0, options=OPTIONS)
    assert isinstance(choice, Choice)
    assert isinstance(choice.definition, Neighborhood)
    query = (1 * 8 + 2) * 12 + 3
    wanted = choice.definition.token_mask(choice.grid)[query].view(GRID)
    assert torch.equal(keys_of(choice, (1, 2, 3)) == READ, wanted)


@pytest.mark.parametrize("plan", [MIXED, Plan.of(Cached(TopBlocks(0.3), 2))], ids=["mixed", "cached"])
def test_recording_changes_nothing(pipe: Any, plan: Plan) -> None:
    with sparse(pipe, plan, min_tokens=0):
        usual = generate(pipe, JOB).frames
        calls = summary(pipe).sparse_calls
    wanted = Wanted(2, 1, 1)
    with recorded(pipe, plan, wanted, OPTIONS):
        watched = generate(pipe, JOB).frames
        assert summary(pipe).sparse_calls == calls > 0
    assert np.array_equal(usual, watched)
    assert set(wanted.found) == {"cond", "uncond"}


def test_the_pipeline_is_left_as_it_was(pipe: Any) -> None:
    def processors() -> list[Any]:
        return [module.processor for module in pipe.transformer.modules() if hasattr(module, "processor")]

    stock = processors()
    captured_choice(pipe, JOB, MIXED, 0, 0, 0, options=OPTIONS)
    assert all(one is other for one, other in zip(stock, processors(), strict=True))
    with pytest.raises(ValueError, match="layer 2 does not exist"):
        captured_choice(pipe, JOB, MIXED, 0, 2, 0)
    with pytest.raises(ValueError, match="head 2 does not exist"):
        captured_choice(pipe, JOB, MIXED, 0, 0, 2)
    with pytest.raises(ValueError, match="transformer must be one of transformer, got other"):
        captured_choice(pipe, JOB, MIXED, 0, 0, 0, transformer="other")
    assert all(one is other for one, other in zip(stock, processors(), strict=True))
    enable(pipe, "radial", min_tokens=0)
    try:
        before = processors()
        with pytest.raises(ZeroDivisionError):
            captured_choice(pipe, JOB, MIXED, 3, 0, 0, options=OPTIONS, stop=lambda: bool(1 // 0))
        assert all(one is other for one, other in zip(before, processors(), strict=True))
    finally:
        disable(pipe)


def test_stop_between_steps(pipe: Any) -> None:
    steps: list[int] = []
    stop = captured_choice(
        pipe, JOB, MIXED, 3, 0, 0,
        options=OPTIONS, stop=lambda: len(steps) == 2, on_step=lambda done, _: steps.append(done),
    )  # fmt: skip
    assert stop is None
    assert steps == [1, 2]
    assert captured_choice(pipe, JOB, MIXED, 0, 0, 0, stop=lambda: True) is None


def test_reasons_to_be_dense(pipe: Any) -> None:
    assert captured_choice(pipe, JOB, MIXED, 0, 0, 1, options=OPTIONS) == "plan: dense", "beside a sparse head"
    assert captured_choice(pipe, JOB, Plan.of(TopBlocks(), "all"), 1, 0, 0) == "480 tokens < min_tokens 2048"
    late = Plan((Rule(TopBlocks(), (0.5, 1.0)),))
    assert captured_choice(pipe, JOB, late, 1, 0, 0, options=OPTIONS) == "plan: dense"
    assert isinstance(captured_choice(pipe, JOB, late, 2, 0, 0, options=OPTIONS), Choice)
    with pytest.raises(ValueError, match="step 4 does not exist: the run has 4 steps"):
        captured_choice(pipe, JOB, MIXED, 4, 0, 0)


@pytest.mark.gpu
def test_on_a_gpu_it_comes_to_the_cpu(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = Plan.of(TopBlocks(0.3, compensate=True))
    pipe.to("cuda", torch.bfloat16)
    try:
        chosen = spied(monkeypatch)
        choice = captured_choice(pipe, JOB, plan, 1, 1, 0, options=OPTIONS)
        static = captured_choice(pipe, JOB, MIXED, 0, 0, 0, options=OPTIONS)
        with sparse(pipe, plan, min_tokens=0):
            usual = generate(pipe, JOB).frames
        with recorded(pipe, plan, Wanted(2, 1, 1), OPTIONS):
            watched = generate(pipe, JOB).frames
    finally:
        pipe.to("cpu", torch.float32)
    assert isinstance(choice, Choice)
    assert isinstance(static, Choice)
    assert np.array_equal(usual, watched)
    wanted = [selection for when, selection in chosen if when == 1][1].indices.to("cpu")
    assert torch.equal(choice.indices.block_mask()[0], wanted.block_mask()[int(wanted.head_of[0])])
    assert {choice.indices.device.type, static.indices.device.type, choice.layout.start.device.type} == {"cpu"}
    token = (1, 2, 3)
    by_blocks = Choice(static.pattern, static.layout, static.indices)
    assert torch.equal(keys_of(static, token), keys_of(by_blocks, token))
