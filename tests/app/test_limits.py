"""What visitors may ask for: every bound from both sides, and messages that say what to do."""

from __future__ import annotations

import random
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from dit_sparse.app.limits import MOST_SEED, Ask, Limits, check_ask, check_blocks, check_prompt, check_size, check_whole
from dit_sparse.grid import Grid
from dit_sparse.patterns import Cached, Radial, TopBlocks
from dit_sparse.pipelines.bundled import BUNDLED_DEFAULTS
from dit_sparse.pipelines.generate import Job, load_pipeline
from dit_sparse.pipelines.geometry import expected_grid, size_steps
from dit_sparse.plan import Plan, Rule
from tests.compare.tiny import save_tiny_wan

LIMITS = Limits(tokens=600, steps=5, frames=17, side_pixels=128, prompt_characters=20)
JOB = Job("a red ball", steps=4, frames=9, height=64, width=96)  # 5 x 8 x 12 tokens


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_pipeline(str(save_tiny_wan(tmp_path_factory.mktemp("model") / "tiny")), "cpu", "float32")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_bundled_model_fits_the_defaults(device: str) -> None:
    limits, usual = Limits.of(device), BUNDLED_DEFAULTS[device]
    assert usual.tokens <= limits.tokens
    assert usual.num_inference_steps <= limits.steps
    assert usual.num_frames <= limits.frames
    assert max(usual.height, usual.width) <= limits.side_pixels


@pytest.mark.parametrize("name", [item.name for item in fields(Limits)])
def test_limits_are_positive(name: str) -> None:
    with pytest.raises(ValueError, match=f"limit {name}"):
        replace(Limits(), **{name: -1})


def test_prompts() -> None:
    assert check_prompt("  a red\n ball\t ", LIMITS) == "a red ball"
    assert check_prompt("x" * 20, LIMITS) == "x" * 20
    assert check_prompt("ein Bär 🐻 <b>", LIMITS) == "ein Bär 🐻 <b>"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty"),
        (" \n\t", "empty"),
        ("x" * 21, "21 characters, at most 20"),
        ("a\x00b", r"control character U\+0000; take it out"),
        ("a\x1b[31mb", r"U\+001B"),
        ("\ud800", r"U\+D800"),
        (None, "must be text"),
        (["a"], "must be text"),
    ],
)
def test_prompts_that_are_refused(text: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_prompt(text, LIMITS)


@pytest.mark.parametrize("value", [3, 3.0, 1, 5.0])  # a page sends floats
def test_whole_numbers(value: float) -> None:
    number = check_whole("steps", value, 1, 5)
    assert number == value
    assert type(number) is int


@pytest.mark.parametrize("value", [0, 6, -1, 2.5, float("nan"), float("inf"), "3", None, True, [3]])
def test_numbers_that_are_refused(value: object) -> None:
    with pytest.raises(ValueError, match=r"steps must .* 1 .* 5"):
        check_whole("steps", value, 1, 5)


def test_asks() -> None:
    assert check_ask(Ask(" a  ball", seed=7.0), LIMITS) == Job("a ball", 7)  # type: ignore[arg-type]
    assert check_ask(Ask("a", seed=MOST_SEED, steps=5, frames=17, height=128, width=1), LIMITS).width == 1
    for name, value in (("seed", -1), ("seed", MOST_SEED + 1), ("steps", 6), ("frames", 18), ("height", 129),
                        ("width", 0), ("width", "64"), ("prompt", "")):  # fmt: skip
        with pytest.raises(ValueError, match=f"{name} "):
            check_ask(replace(Ask("a"), **{name: value}), LIMITS)  # type: ignore[arg-type]


def test_sizes(pipe: Any) -> None:
    check_size(pipe, JOB, LIMITS)
    check_size(pipe, JOB, replace(LIMITS, tokens=480))
    for change, message in (
        ({"frames": 10}, "1 more than a multiple of 2 for this model, got 10; choose 9"),
        ({"height": 72}, "height must be a multiple of 16 for this model, got 72; choose 64"),
        ({"width": 8}, "got 8; choose 16"),
        ({"height": None}, "choose height and width"),
        ({"frames": 17, "height": 128}, r"are 1,728 tokens, at most 600 are taken here; choose fewer frames"),
        ({"steps": 50}, "steps must lie between 1 and 5"),  # the model's own default may be too much
    ):
        with pytest.raises(ValueError, match=message):
            check_size(pipe, replace(JOB, **change), LIMITS)
    with pytest.raises(ValueError, match="480 tokens, at most 479"):
        check_size(pipe, JOB, replace(LIMITS, tokens=479))


def test_sizes_that_pass_are_those_that_the_pipeline_takes(pipe: Any) -> None:
    """Against the pipeline's own check_inputs, on random sizes; and the size that is proposed passes."""
    rng, limits, seen = random.Random(), Limits(tokens=10**9, side_pixels=256, frames=99), set()
    assert size_steps(pipe) == (2, 16, 16)
    for _ in range(200):
        height, width = (rng.choice((rng.randrange(1, 257), 16 * rng.randrange(1, 17))) for _ in range(2))
        job = replace(JOB, height=height, width=width)
        try:
            pipe.check_inputs("a", None, height, width)
            taken = True
        except ValueError:
            taken = False
        seen.add(taken)
        message = refusal(pipe, job, limits)
        assert (message == "") == taken, (height, width, message)
        if message:
            name, value = message.split()[0], int(message.split()[-1])
            assert not refusal(pipe, replace(job, **{name: value}), limits).startswith(name)
    assert seen == {True, False}


def refusal(pipe: Any, job: Job, limits: Limits) -> str:
    try:
        check_size(pipe, job, limits)
    except ValueError as error:
        return str(error)
    return ""


def test_tokens_are_those_of_the_grid(pipe: Any) -> None:
    grid = check_size(pipe, JOB, LIMITS)
    assert grid == expected_grid(pipe.transformer, pipe.vae.config, 9, 64, 96)
    assert grid is not None
    assert grid.tokens == 480


def test_a_pipeline_whose_configs_do_not_tell(pipe: Any, tmp_path: Path) -> None:
    class WithoutVae:
        vae = None

    assert size_steps(WithoutVae()) is None
    assert check_size(WithoutVae(), JOB, LIMITS) is None
    with pytest.raises(ValueError, match="frames must lie"):
        check_size(WithoutVae(), replace(JOB, frames=99), LIMITS)


def test_blocks() -> None:
    """Tiles of 2x8x8 and 4x4x4 pass; single tokens pass on a small grid only."""
    large, small = Grid(17, 16, 16), Grid(2, 8, 8, suffix=8)
    for order in ("strips", "tile:2x8x8", "tile:4x4x4", "hilbert"):
        check_blocks(Plan.of(TopBlocks(0.2, order)), large)
    tiny = Plan((Rule(Radial(kind="block"), layers=(0,)), Rule(Cached(TopBlocks(0.2, "tile:1x1x1")))))
    check_blocks(tiny, small)
    check_blocks(Plan.of(TopBlocks(0.2, clusters=256)), large)
    for clusters in (257, (8, 9999)):
        with pytest.raises(ValueError, match="clusters, at most 256"):
            check_blocks(Plan.of(Cached(TopBlocks(0.2, clusters=clusters))), large)
    with pytest.raises(ValueError, match=r"tile:1x1x1.* cuts 4,352 tokens in 4,352 blocks or clusters, at most 256"):
        check_blocks(tiny, large)
