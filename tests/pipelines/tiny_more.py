"""Tiny pipelines of which only the denoising loop matters: prompts come as embeddings, latents come back."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

from dit_sparse.grid import Grid

GRID = Grid(1, 8, 8)  # told for every model: only step, branch and run are looked at
WIDTH, TOKENS = 16, 8  # of a prompt
HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}
FLUX = {
    **HEADS, "in_channels": 16, "num_layers": 1, "num_single_layers": 1, "joint_attention_dim": WIDTH,
    "axes_dims_rope": (4, 6, 6), "pooled_projection_dim": WIDTH,
}  # fmt: skip
COSMOS = {
    **HEADS, "in_channels": 4, "out_channels": 4, "num_layers": 1, "text_embed_dim": WIDTH, "adaln_lora_dim": 4,
    "max_size": (4, 16, 16), "concat_padding_mask": False, "extra_pos_embed_type": None,
}  # fmt: skip
LUMINA2 = {
    "sample_size": 16, "in_channels": 4, "hidden_size": 32, "num_layers": 1, "num_refiner_layers": 1,
    "num_attention_heads": 2, "num_kv_heads": 1, "multiple_of": 16, "axes_dim_rope": (4, 6, 6),
    "axes_lens": (64, 64, 64), "cap_feat_dim": WIDTH,
}  # fmt: skip
PIXART = {
    **HEADS, "in_channels": 4, "num_layers": 1, "sample_size": 16, "cross_attention_dim": 32,
    "caption_channels": WIDTH,
}  # fmt: skip
Z_IMAGE = {
    "in_channels": 4, "dim": 32, "n_layers": 1, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2,
    "cap_feat_dim": WIDTH, "axes_dims": [4, 6, 6], "axes_lens": [256, 64, 64],
}  # fmt: skip
SD3 = {
    **HEADS, "sample_size": 16, "in_channels": 4, "out_channels": 4, "num_layers": 2, "caption_projection_dim": 32,
    "joint_attention_dim": WIDTH, "pooled_projection_dim": WIDTH, "pos_embed_max_size": 16,
}  # fmt: skip
HIDREAM = {
    **HEADS, "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 1, "num_single_layers": 1,
    "caption_channels": [WIDTH, WIDTH], "text_emb_dim": WIDTH, "num_routed_experts": 2, "num_activated_experts": 2,
    "axes_dims_rope": (4, 6, 6), "max_resolution": (16, 16), "llama_layers": [0, 1],
}  # fmt: skip
KANDINSKY5 = {
    "in_visual_dim": 4, "out_visual_dim": 4, "in_text_dim": WIDTH, "in_text_dim2": WIDTH, "time_dim": 16,
    "model_dim": 32, "ff_dim": 32, "num_text_blocks": 1, "num_visual_blocks": 1, "axes_dims": (4, 6, 6),
}  # fmt: skip
KREA2 = {
    **HEADS, "in_channels": 16, "num_layers": 1, "num_key_value_heads": 1, "intermediate_size": 32,
    "timestep_embed_dim": 16, "text_hidden_dim": WIDTH, "num_text_layers": 2, "text_num_attention_heads": 2,
    "text_num_key_value_heads": 2, "text_intermediate_size": 32, "axes_dims_rope": (4, 6, 6),
}  # fmt: skip
ALLEGRO = {
    "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 1,
    "cross_attention_dim": 24, "caption_channels": WIDTH, "sample_height": 16, "sample_width": 16,
}  # fmt: skip
EASY_ANIMATE = {
    **HEADS, "in_channels": 4, "out_channels": 4, "patch_size": 2, "num_layers": 1, "mmdit_layers": 1,
    "time_embed_dim": 16, "text_embed_dim": WIDTH,
}  # fmt: skip
FRAMEPACK = {
    **HEADS, "in_channels": 4, "out_channels": 4, "num_layers": 1, "num_single_layers": 1, "num_refiner_layers": 1,
    "text_embed_dim": WIDTH, "pooled_projection_dim": WIDTH, "rope_axes_dim": (4, 6, 6), "has_image_proj": True,
    "image_proj_dim": WIDTH, "has_clean_x_embedder": True,
}  # fmt: skip
SKYREELS = {
    **HEADS, "in_channels": 4, "out_channels": 4, "text_dim": WIDTH, "freq_dim": 16, "ffn_dim": 32, "num_layers": 1,
    "rope_max_seq_len": 32,
}  # fmt: skip
HUNYUAN_DIT = {
    **HEADS, "in_channels": 4, "patch_size": 2, "hidden_size": 32, "num_layers": 2, "cross_attention_dim": WIDTH,
    "cross_attention_dim_t5": WIDTH, "pooled_projection_dim": WIDTH, "text_len": TOKENS, "text_len_t5": TOKENS,
}  # fmt: skip


APPROXIMATOR = {"approximator_num_channels": 16, "approximator_hidden_dim": 32, "approximator_layers": 1}
HELIOS = {name: SKYREELS[name] for name in SKYREELS if name != "rope_max_seq_len"} | {"rope_dim": (4, 6, 6)}
SIZE = {"height": 128, "width": 128}


@dataclass(frozen=True)
class Tiny:
    """One pipeline, how to call it without guidance, what guidance adds, and the forwards a step under guidance."""

    pipe: Any
    call: dict[str, Any]
    guided: dict[str, Any]
    forwards: int

    def run(self, steps: int, *, guided: bool = False, **more: Any) -> Any:
        """Run the pipeline; returns what it returns."""
        call = {**SIZE, **self.call, **(self.guided if guided else {}), **more}
        return self.pipe(num_inference_steps=steps, output_type="latent", **call)


class Safe:
    """Be the safety checker without which Cosmos does not start."""

    def to(self, device: Any) -> None:
        """Move nothing."""


class FakeVAE:
    """Have what a pipeline asks of a VAE before and after the loop, with four channels of latents."""

    dtype = torch.float32
    spatial_compression_ratio, temporal_compression_ratio = 8, 4
    config = SimpleNamespace(latent_channels=4, scaling_factor=1.0, shift_factor=0.0, block_out_channels=(4, 4, 4, 4))

    def encode(self, image: Tensor) -> SimpleNamespace:
        size = [pixels // 8 for pixels in image.shape[-2:]]
        latents = torch.randn(len(image), 4, *image.shape[2:-2], *size)
        return SimpleNamespace(latents=latents, latent_dist=SimpleNamespace(sample=lambda generator: latents))


class Framepack(diffusers.HunyuanVideoFramepackPipeline):
    def encode_image(self, image: Tensor, device: Any = None, dtype: Any = None) -> Tensor:
        return torch.randn(1, 4, WIDTH)


def build(cls: type, transformer: str, config: dict[str, Any], scheduler: Any = None, **components: Any) -> Any:
    """Build a pipeline around a tiny transformer; components that are not given are None."""
    torch.manual_seed(0)
    model: nn.Module = getattr(diffusers, transformer)(**config).eval()
    parameters = list(inspect.signature(cls.__init__).parameters.values())[1:]  # type: ignore[misc]
    given = {one.name: None for one in parameters if one.default is inspect.Parameter.empty} | components
    pipe = cls(**{**given, "transformer": model, "scheduler": scheduler or FlowMatchEulerDiscreteScheduler()})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def embeds(name: str, *shape: int) -> dict[str, Tensor]:
    """Draw an embedding [1, *shape], by default that of a prompt."""
    return {name: torch.randn(1, *(shape or (TOKENS, WIDTH)))}


def masked(name: str, dtype: torch.dtype = torch.long) -> dict[str, Tensor]:
    """Return embeddings of a prompt and the mask that the pipeline wants with it, which hides nothing."""
    masks = {"embeds": name.replace("prompt_embeds", "prompt_attention_mask")}
    return {**embeds(name), masks["embeds"]: torch.ones(1, TOKENS, dtype=dtype)}


def sd3(cls: type = diffusers.StableDiffusion3Pipeline, **components: Any) -> Tiny:
    def prompt(prefix: str) -> dict[str, Tensor]:
        return {**embeds(f"{prefix}prompt_embeds"), **embeds(f"{prefix}pooled_prompt_embeds", WIDTH)}

    pipe = build(cls, "SD3Transformer2DModel", SD3, **components)
    return Tiny(pipe, {"guidance_scale": 1.0, **prompt("")}, {"guidance_scale": 4.0, **prompt("negative_")}, 1)


def flux_image_to_image() -> Tiny:
    pipe = build(diffusers.FluxImg2ImgPipeline, "FluxTransformer2DModel", FLUX, vae=FakeVAE())
    prompt = {**embeds("prompt_embeds"), **embeds("pooled_prompt_embeds", WIDTH)}
    return Tiny(pipe, {"image": torch.rand(1, 3, 128, 128), **prompt}, {}, 1)


def chroma() -> Tiny:
    config = {name: FLUX[name] for name in FLUX if name != "pooled_projection_dim"} | APPROXIMATOR
    pipe = build(diffusers.ChromaPipeline, "ChromaTransformer2DModel", config)
    call = {"guidance_scale": 1.0, **masked("prompt_embeds", torch.float)}
    return Tiny(pipe, call, {"guidance_scale": 4.0, **masked("negative_prompt_embeds", torch.float)}, 2)


def flux2() -> Tiny:
    config = {name: FLUX[name] for name in FLUX if name != "pooled_projection_dim"}
    config |= {"timestep_guidance_channels": 16, "axes_dims_rope": (4, 4, 4, 4)}
    pipe = build(diffusers.Flux2Pipeline, "Flux2Transformer2DModel", config)
    return Tiny(pipe, embeds("prompt_embeds"), {}, 1)


def lumina2() -> Tiny:
    pipe = build(diffusers.Lumina2Pipeline, "Lumina2Transformer2DModel", LUMINA2)
    call = {"guidance_scale": 1.0, **masked("prompt_embeds")}
    return Tiny(pipe, call, {"guidance_scale": 4.0, **masked("negative_prompt_embeds")}, 2)


def pixart() -> Tiny:
    """Build PixArt-Sigma with a scheduler that keeps no counter."""
    pipe = build(diffusers.PixArtSigmaPipeline, "PixArtTransformer2DModel", PIXART, diffusers.DDIMScheduler())
    call = {"negative_prompt": None, "use_resolution_binning": False, "guidance_scale": 1.0, **masked("prompt_embeds")}
    return Tiny(pipe, call, {"guidance_scale": 4.0, **masked("negative_prompt_embeds")}, 1)


def z_image() -> Tiny:
    pipe = build(diffusers.ZImagePipeline, "ZImageTransformer2DModel", Z_IMAGE)
    call = {"guidance_scale": 0.0, "prompt_embeds": [torch.randn(TOKENS, WIDTH)]}
    return Tiny(pipe, call, {"guidance_scale": 4.0, "negative_prompt_embeds": [torch.randn(TOKENS, WIDTH)]}, 1)


def krea2() -> Tiny:
    def prompt(prefix: str) -> dict[str, Tensor]:
        mask = torch.ones(1, TOKENS, dtype=torch.bool)
        return {**embeds(f"{prefix}prompt_embeds", TOKENS, 2, WIDTH), f"{prefix}prompt_embeds_mask": mask}

    config = {"text_encoder_select_layers": (0, 1), "is_distilled": False, "patch_size": 2}
    pipe = build(diffusers.Krea2Pipeline, "Krea2Transformer2DModel", KREA2, **config)
    return Tiny(pipe, {"guidance_scale": 0.0, **prompt("")}, {"guidance_scale": 4.0, **prompt("negative_")}, 2)


def hidream() -> Tiny:
    def prompt(prefix: str) -> dict[str, Tensor]:
        llama = {f"{prefix}prompt_embeds_llama3": torch.randn(2, 1, TOKENS, WIDTH)}
        return {**embeds(f"{prefix}prompt_embeds_t5"), **llama, **embeds(f"{prefix}pooled_prompt_embeds", WIDTH)}

    pipe = build(diffusers.HiDreamImagePipeline, "HiDreamImageTransformer2DModel", HIDREAM)
    return Tiny(pipe, {"guidance_scale": 1.0, **prompt("")}, {"guidance_scale": 4.0, **prompt("negative_")}, 1)


def kandinsky5(scheduler: Any = None) -> Tiny:
    def prompt(prefix: str) -> dict[str, Tensor]:
        lengths = {f"{prefix}prompt_cu_seqlens": torch.tensor([0, TOKENS], dtype=torch.int32)}
        return {**embeds(f"{prefix}prompt_embeds_qwen"), **embeds(f"{prefix}prompt_embeds_clip", WIDTH), **lengths}

    pipe = build(diffusers.Kandinsky5T2VPipeline, "Kandinsky5Transformer3DModel", KANDINSKY5, scheduler)
    call = {"num_frames": 5, "guidance_scale": 1.0, **prompt("")}
    return Tiny(pipe, call, {"negative_prompt": None, "guidance_scale": 4.0, **prompt("negative_")}, 2)


def cosmos() -> Tiny:
    scheduler = diffusers.EDMEulerScheduler(final_sigmas_type="sigma_min")
    cls = diffusers.CosmosTextToWorldPipeline
    pipe = build(cls, "CosmosTransformer3DModel", COSMOS, scheduler, safety_checker=Safe())
    call = {"num_frames": 9, "guidance_scale": 1.0, **embeds("prompt_embeds")}
    return Tiny(pipe, call, {"guidance_scale": 4.0, **embeds("negative_prompt_embeds")}, 2)


def cosmos2() -> Tiny:
    cls = diffusers.Cosmos2TextToImagePipeline
    pipe = build(cls, "CosmosTransformer3DModel", COSMOS, safety_checker=Safe())
    call = {"guidance_scale": 1.0, **embeds("prompt_embeds")}
    return Tiny(pipe, call, {"guidance_scale": 4.0, **embeds("negative_prompt_embeds")}, 2)


def allegro(scheduler: Any = None) -> Tiny:
    scheduler = scheduler or diffusers.EulerAncestralDiscreteScheduler()
    pipe = build(diffusers.AllegroPipeline, "AllegroTransformer3DModel", ALLEGRO, scheduler)
    call = {"num_frames": 8, "negative_prompt": None, "guidance_scale": 1.0, **masked("prompt_embeds")}
    return Tiny(pipe, call, {"guidance_scale": 4.0, **masked("negative_prompt_embeds")}, 1)


def easy_animate(scheduler: Any = None) -> Tiny:
    cls = diffusers.EasyAnimatePipeline
    pipe = build(cls, "EasyAnimateTransformer3DModel", EASY_ANIMATE, scheduler, vae=FakeVAE())
    call = {"num_frames": 5, "guidance_scale": 1.0, **masked("prompt_embeds")}
    return Tiny(pipe, call, {"guidance_scale": 4.0, **masked("negative_prompt_embeds")}, 1)


def hunyuan_dit() -> Tiny:
    def prompt(prefix: str) -> dict[str, Tensor]:
        return masked(f"{prefix}prompt_embeds") | masked(f"{prefix}prompt_embeds_2")

    cls, scheduler = diffusers.HunyuanDiTPipeline, diffusers.DDPMScheduler()
    pipe = build(cls, "HunyuanDiT2DModel", HUNYUAN_DIT, scheduler, requires_safety_checker=False)
    call = {"use_resolution_binning": False, "guidance_scale": 1.0, **prompt("")}
    return Tiny(pipe, call, {"guidance_scale": 4.0, **prompt("negative_")}, 1)


def framepack() -> Tiny:
    """Build Framepack with two sections a run."""

    def prompt(prefix: str) -> dict[str, Tensor]:
        return {**masked(f"{prefix}prompt_embeds"), **embeds(f"{prefix}pooled_prompt_embeds", WIDTH)}

    pipe = build(Framepack, "HunyuanVideoFramepackTransformer3DModel", FRAMEPACK, vae=FakeVAE())
    call = {"image": torch.rand(1, 3, 128, 128), "latent_window_size": 2, "num_frames": 10, **prompt("")}
    return Tiny(pipe, call, {"true_cfg_scale": 4.0, **prompt("negative_")}, 2)


def skyreels() -> Tiny:
    """Build the diffusion forcing of SkyReels with two sections a run."""
    scheduler = diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    cls = diffusers.SkyReelsV2DiffusionForcingPipeline
    pipe = build(cls, "SkyReelsV2Transformer3DModel", SKYREELS, scheduler)
    sections = {"num_frames": 17, "base_num_frames": 9, "overlap_history": 5, "addnoise_condition": 20}
    call = {"prompt": None, "guidance_scale": 1.0, **sections, **embeds("prompt_embeds")}
    return Tiny(pipe, call, {"guidance_scale": 4.0, **embeds("negative_prompt_embeds")}, 2)


def helios(vae: Any) -> Tiny:
    """Build the distilled Helios, whose scheduler has a counter that it never moves."""
    cls, scheduler = diffusers.HeliosPyramidPipeline, diffusers.HeliosDMDScheduler(gamma=0.25)
    pipe = build(cls, "HeliosTransformer3DModel", HELIOS, scheduler, vae=vae, is_distilled=True)
    call = {"num_frames": 9, "num_latent_frames_per_chunk": 2, "guidance_scale": 1.0, **embeds("prompt_embeds")}
    return Tiny(pipe, call, {"guidance_scale": 4.0, **embeds("negative_prompt_embeds")}, 2)


# what tells the step: v a view into the schedule, n the timestep that the pipeline notes, c the scheduler's counter,
# p calls for each prompt
PIPELINES = {
    "sd3-v": sd3, "chroma-n": chroma, "flux2-n": flux2, "lumina2-c": lumina2, "pixart-v": pixart, "z_image-c": z_image,
    "krea2-n": krea2, "hidream-v": hidream, "kandinsky5-c": kandinsky5, "cosmos-n": cosmos, "cosmos2-n": cosmos2,
    "allegro-n": allegro, "easy_animate-c": easy_animate, "hunyuan_dit-p": hunyuan_dit,
}  # fmt: skip
