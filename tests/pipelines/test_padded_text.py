"""Pipelines whose models mask padded text: prompts of different lengths, several clips per prompt, guidance."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from dit_sparse import schedule
from dit_sparse.padding import Padding
from dit_sparse.patterns import Cached, Dense, TopBlocks
from dit_sparse.pipelines.enable import enable, sparse, summary
from dit_sparse.plan import Plan
from tests.models import video_hunyuan
from tests.models.case import TEXT, text, text_mask

LENGTHS = [TEXT - 9, TEXT - 2]  # of the two prompts
NEGATIVE = [3, 3]
STEPS = 3


def _transformer(name: str, **config: int) -> Any:
    case = next(case for case in video_hunyuan.CASES if case.model == name)
    return dataclasses.replace(case, config={**case.config, **config}).build()


def _hunyuan_video() -> tuple[Any, dict[str, Any]]:
    torch.manual_seed(0)
    pipe = diffusers.HunyuanVideoPipeline(
        text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None, vae=None,
        transformer=_transformer("HunyuanVideoTransformer3DModel"),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
    )  # fmt: skip
    prompts = {
        "prompt_embeds": text(2),
        "pooled_prompt_embeds": text(2)[:, 0],
        "prompt_attention_mask": text_mask(LENGTHS),
        "negative_prompt_embeds": text(2),
        "negative_pooled_prompt_embeds": text(2)[:, 0],
        "negative_prompt_attention_mask": text_mask(NEGATIVE),
    }
    return pipe, {**prompts, "true_cfg_scale": 3.0, "height": 128, "width": 192, "num_frames": 9}


def _hunyuan_video_15() -> tuple[Any, dict[str, Any]]:
    torch.manual_seed(0)
    pipe = diffusers.HunyuanVideo15Pipeline(
        text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None,
        vae=diffusers.AutoencoderKLHunyuanVideo15(
            latent_channels=4, block_out_channels=(4, 4, 4, 4, 4), layers_per_block=1, spatial_compression_ratio=16,
            temporal_compression_ratio=4,
        ),
        transformer=_transformer("HunyuanVideo15Transformer3DModel", in_channels=2 * 4 + 1),  # condition and its mask
        guider=diffusers.ClassifierFreeGuidance(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
    )  # fmt: skip
    half = TEXT // 2
    prompts = {
        "prompt_embeds": text(2, half),
        "prompt_embeds_mask": text_mask([half - 4, half], half),
        "prompt_embeds_2": text(2, half),
        "prompt_embeds_mask_2": text_mask([half, half - 3], half),
        "negative_prompt_embeds": text(2, half),
        "negative_prompt_embeds_mask": text_mask(NEGATIVE, half),
        "negative_prompt_embeds_2": text(2, half),
        "negative_prompt_embeds_mask_2": text_mask(NEGATIVE, half),
    }
    return pipe, {**prompts, "height": 128, "width": 192, "num_frames": 9}


PIPELINES = {"hunyuan video": _hunyuan_video, "hunyuan video 1.5": _hunyuan_video_15}


@pytest.fixture(params=sorted(PIPELINES))
def made(request: pytest.FixtureRequest) -> tuple[Any, dict[str, Any]]:
    pipe, arguments = PIPELINES[request.param]()
    pipe.set_progress_bar_config(disable=True)
    return pipe, arguments


def generate(pipe: Any, arguments: dict[str, Any], **more: Any) -> Tensor:
    return pipe(
        **arguments, num_inference_steps=STEPS, generator=torch.Generator().manual_seed(0), output_type="latent", **more
    ).frames


def one_prompt(arguments: dict[str, Any], number: int) -> dict[str, Any]:
    return {
        name: value[number : number + 1] if isinstance(value, Tensor) else value for name, value in arguments.items()
    }


@pytest.fixture
def readings(monkeypatch: pytest.MonkeyPatch) -> list[Padding]:
    """Record every reading of a mask: on a GPU each one waits for the device."""
    found: list[Padding] = []
    read: Callable[..., Any] = schedule.read_padding

    def record(*args: Any) -> Any:
        found.append(read(*args))
        return found[-1]

    monkeypatch.setattr(schedule, "read_padding", record)
    return found


def test_masks_are_read_once_a_run_for_each_branch(made: tuple[Any, dict[str, Any]], readings: list[Padding]) -> None:
    """Three steps, two layers, two branches: two readings, and none in a second run of the same prompts."""
    pipe, arguments = made
    enable(pipe, TopBlocks(keep=0.5), min_tokens=0, strict=True)
    generate(pipe, arguments)
    assert summary(pipe).dense_calls == 0
    assert summary(pipe).sparse_calls == STEPS * 2 * 2
    assert len(readings) == 2
    assert all(isinstance(found, Padding) for found in readings)
    assert len({found.lengths for found in readings}) == 2


@pytest.mark.parametrize("clips", [1, 2])  # for each prompt, repeated as the pipelines do after encoding
def test_everything_kept_is_stock(made: tuple[Any, dict[str, Any]], clips: int) -> None:
    pipe, arguments = made
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            arguments[name] = value.repeat_interleave(clips, 0)
    stock = generate(pipe, arguments)
    assert len(stock) == 2 * clips
    for pattern in (TopBlocks(keep=1.0), Dense()):
        with sparse(pipe, pattern, min_tokens=0, strict=True):
            torch.testing.assert_close(generate(pipe, arguments), stock, atol=1e-4, rtol=1e-4)
    with sparse(pipe, Plan.dense()):
        assert torch.equal(generate(pipe, arguments), stock)
    with sparse(pipe, TopBlocks(keep=0.3), min_tokens=0, strict=True):
        assert float((generate(pipe, arguments) - stock).abs().max()) > 1e-2


@pytest.mark.parametrize("pattern", [TopBlocks(keep=0.4), Cached(TopBlocks(keep=0.4), 2)])
def test_two_prompts_are_two_runs_of_one(made: tuple[Any, dict[str, Any]], pattern: TopBlocks) -> None:
    """Selections, lengths and caches belong to a sample: in a batch each prompt gives what it gives alone."""
    pipe, arguments = made
    latents = generate(pipe, arguments)  # of the right shape; what they hold does not matter
    enable(pipe, pattern, min_tokens=0, strict=True)
    both = generate(pipe, arguments, latents=latents)
    for number in range(2):
        alone = generate(pipe, one_prompt(arguments, number), latents=latents[number : number + 1])
        torch.testing.assert_close(both[number : number + 1], alone, atol=1e-4, rtol=1e-4)
