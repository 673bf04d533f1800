"""The bundled pipeline: stock classes, whole files within their limit, prompts, saving, a short generation."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import diffusers
import pytest
import torch
import transformers
from diffusers import WanPipeline, WanTransformer3DModel

from dit_sparse.assets.train.words import groups, vocabulary
from dit_sparse.pipelines.bundled import (
    BUNDLED_DEFAULTS,
    FOLDER,
    bundled_folder,
    defaults,
    known_words,
    load_bundled,
    unknown_words,
)
from dit_sparse.pipelines.pixel_vae import PixelVAE


def test_only_the_vae_is_ours(pipe: WanPipeline) -> None:
    assert type(pipe) is WanPipeline
    assert type(pipe.transformer) is WanTransformer3DModel
    assert type(pipe.text_encoder) is transformers.CLIPTextModel
    assert isinstance(pipe.tokenizer, transformers.PreTrainedTokenizerFast)
    assert type(pipe.scheduler) is diffusers.FlowMatchEulerDiscreteScheduler
    assert type(pipe.vae) is PixelVAE
    assert {pipe.transformer.dtype, pipe.text_encoder.dtype, pipe.vae.dtype} == {torch.float32}


def test_files_stay_within_thirty_megabytes() -> None:
    sizes = {path: path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()}
    assert sum(sizes.values()) <= 30_000_000
    assert max(sizes.values()) < 16_000_000


def test_words_agree_with_the_training_data(pipe: WanPipeline) -> None:
    assert known_words() == groups()
    assert pipe.tokenizer.get_vocab() == vocabulary()


@pytest.mark.parametrize(
    ("prompt", "unknown"),
    [
        ("a red circle bouncing on a white background", []),
        ("A Red CIRCLE, bouncing!", []),  # case and punctuation do not count
        ("a zebra on a red field, a zebra", ["zebra", "field"]),  # in order, each once
        ("", []),
        ("ein Kreis: ○ 圆", ["ein", "kreis", "圆"]),  # letters of any script
    ],
)
def test_unknown_words(prompt: str, unknown: list[str]) -> None:
    assert unknown_words(prompt) == unknown


def test_defaults_follow_the_device() -> None:
    assert {device: values.tokens for device, values in BUNDLED_DEFAULTS.items()} == {"cpu": 4352, "cuda": 17408}
    assert defaults("cpu") is BUNDLED_DEFAULTS["cpu"]
    assert defaults("cuda:1") is defaults(torch.device("mps")) is BUNDLED_DEFAULTS["cuda"]


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"model_index\.json.*train the model anew"):
        bundled_folder(tmp_path)
    shutil.copytree(FOLDER, tmp_path / "copy")
    lost = next((tmp_path / "copy" / "transformer").glob("*00002-of-*.safetensors"))
    lost.unlink()
    with pytest.raises(FileNotFoundError, match=lost.name):
        bundled_folder(tmp_path / "copy")


def test_folder_loads_with_stock_loaders(pipe: WanPipeline, tmp_path: Path) -> None:
    transformer = WanTransformer3DModel.from_pretrained(FOLDER / "transformer")
    assert torch.equal(transformer.proj_out.weight, pipe.transformer.proj_out.weight)
    assert WanPipeline.from_pretrained(FOLDER, vae=PixelVAE()).vae.config.z_dim == 24
    pipe.save_pretrained(tmp_path)
    again = WanPipeline.from_pretrained(tmp_path)
    assert type(again.vae) is PixelVAE
    for name in ("transformer", "text_encoder"):
        before, after = getattr(pipe, name).state_dict(), getattr(again, name).state_dict()
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key].float(), after[key].float()) for key in before)


def test_prompts_are_padded_with_zeros(pipe: WanPipeline) -> None:
    prompt = "a red circle on a white background"
    words = len(prompt.split())
    short, _ = pipe.encode_prompt(prompt, do_classifier_free_guidance=False, max_sequence_length=64)
    default, empty = pipe.encode_prompt(prompt, max_sequence_length=512)
    assert default.shape == (1, 512, 256)
    torch.testing.assert_close(short[0, :words], default[0, :words])
    assert default[0, words:].abs().max() == 0
    assert empty.abs().max() == 0, "the empty prompt must be the dropped caption of training"


def test_a_short_generation(pipe: WanPipeline) -> None:
    video = pipe(
        "a red circle bouncing on a white background",
        height=32,
        width=48,
        num_frames=5,
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    ).frames
    assert video.shape == (1, 5, 3, 32, 48)
    assert video.isfinite().all()
    assert 0 <= video.min() <= video.max() <= 1


def test_bf16_keeps_what_wan_keeps_in_fp32() -> None:
    pipe = load_bundled(dtype=torch.bfloat16)
    assert pipe.transformer.blocks[0].attn1.to_q.weight.dtype == torch.bfloat16
    assert pipe.transformer.rope.freqs_cos.dtype in (torch.float32, torch.float64)
    assert pipe.vae.dtype == torch.float32


def test_config_names_no_class_of_ours_but_the_vae() -> None:
    index = json.loads((FOLDER / "model_index.json").read_text())
    ours = [name for name, value in index.items() if isinstance(value, list) and str(value[0]).startswith("dit_sparse")]
    assert ours == ["vae"]
