"""The bundled text-to-video model: a stock WanPipeline that the repository trained itself (docs/bundled-model.md)."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from diffusers import WanPipeline

FOLDER = Path(__file__).resolve().parent.parent / "assets" / "bundled"


@dataclass(frozen=True)
class Defaults:
    """How the bundled model is run where the user says nothing."""

    num_frames: int
    height: int
    width: int
    num_inference_steps: int
    guidance_scale: float
    max_sequence_length: int

    @property
    def tokens(self) -> int:
        """Video tokens of one forward: one per latent frame (two frames) and 4 x 4 pixels."""
        return (self.num_frames // 2 + 1) * (self.height // 4) * (self.width // 4)


BUNDLED_DEFAULTS: dict[str, Defaults] = {  # device type -> settings
    "cpu": Defaults(33, 64, 64, 16, guidance_scale=4.0, max_sequence_length=64),
    "cuda": Defaults(33, 128, 128, 30, guidance_scale=4.0, max_sequence_length=64),
}


def defaults(device: str | torch.device) -> Defaults:
    """Return the settings for a device; every accelerator gets those of `cuda`."""
    return BUNDLED_DEFAULTS["cpu" if torch.device(device).type == "cpu" else "cuda"]


def load_bundled(device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> WanPipeline:
    """Load the bundled model as a stock WanPipeline; fp32 on a CPU and bf16 elsewhere unless `dtype` says so.

    Raises:
        FileNotFoundError: a file of the model is missing.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
    from transformers import CLIPTextModel, PreTrainedTokenizerFast

    from dit_sparse.pipelines.pixel_vae import PixelVAE

    folder = bundled_folder()
    if dtype is None:
        dtype = torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16
    # Part by part: from_pretrained of the whole folder works too, but warns that a text encoder and a VAE are
    # not the classes of the released Wan models.
    pipe = WanPipeline(
        tokenizer=PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer"),
        text_encoder=CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=dtype),
        vae=PixelVAE(),  # fp32 always: decoding is a shuffle, and bf16 would only round the colours
        scheduler=FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler"),
        transformer=WanTransformer3DModel.from_pretrained(folder / "transformer", dtype=dtype),
    )
    return pipe.to(device)


def bundled_folder(folder: Path = FOLDER) -> Path:
    """Return the diffusers folder of the bundled model after checking that it is whole.

    Raises:
        FileNotFoundError: a file of the model is missing.
    """
    index = folder / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    needed = [folder / name for name in ("model_index.json", "words.json", "text_encoder/model.safetensors")] + [index]
    if index.is_file():
        shards = set(json.loads(index.read_text())["weight_map"].values())
        needed += [index.parent / shard for shard in sorted(shards)]
    missing = [path.relative_to(folder).as_posix() for path in needed if not path.is_file()]
    if missing:
        raise FileNotFoundError(
            f"the bundled model is incomplete: {', '.join(missing)} not found in {folder}. "
            "Install dit-sparse from a full checkout or wheel, or train the model anew (docs/bundled-model.md)."
        )
    return folder


def known_words() -> dict[str, list[str]]:
    """Return the words that the bundled model was trained on, by kind."""
    return json.loads((bundled_folder() / "words.json").read_text())["words"]


def unknown_words(prompt: str) -> list[str]:
    """Return the words of `prompt` that the bundled model never saw, in order, each once."""
    known = {word for group in known_words().values() for word in group}
    words = re.findall(r"[^\W_]+", prompt.lower())
    return [word for word in dict.fromkeys(words) if word not in known]
