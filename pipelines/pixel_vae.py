"""A parameter-free stand-in for the pipeline's autoencoder: pixels in, pixels out, exactly."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor

RGB = 3


class PixelVAE(ModelMixin, ConfigMixin):
    """Shuffle blocks of frames and pixels into channels and back; `WanPipeline` reads its config as a VAE's.

    Like Wan's own VAE it gives the first frame a latent of its own (the frame repeated). Two frames a latent rather
    than one, because the stock pipeline turns n frames into n + 1 where `scale_factor_temporal` is 1.
    Powers of two as factors and as `latents_std` keep the round trip exact.
    """

    @register_to_config
    def __init__(
        self,
        z_dim: int = 24,
        scale_factor_spatial: int = 2,
        scale_factor_temporal: int = 2,
        latents_mean: tuple[float, ...] = (0.0,) * 24,
        latents_std: tuple[float, ...] = (0.5,) * 24,
    ) -> None:
        super().__init__()
        channels = RGB * scale_factor_temporal * scale_factor_spatial**2
        if z_dim != channels:
            raise ValueError(
                f"z_dim must be 3 * scale_factor_temporal * scale_factor_spatial**2 = {channels}, got z_dim={z_dim}"
            )
        if not len(latents_mean) == len(latents_std) == z_dim:
            raise ValueError(
                f"latents_mean and latents_std must have z_dim={z_dim} entries, "
                f"got {len(latents_mean)} and {len(latents_std)}"
            )
        # Carries device and dtype, which pipelines ask of every module; its value is never used.
        self.register_buffer("anchor", torch.zeros(1))

    def encode(self, x: Tensor, return_dict: bool = True) -> AutoencoderKLOutput | tuple[DiagonalGaussianDistribution]:
        """Turn pixels [B, 3, F, H, W] into a distribution of zero width over [B, z_dim, T, h, w].

        Raises:
            ValueError: F - 1 is no multiple of `scale_factor_temporal`, or H or W none of `scale_factor_spatial`.
        """
        packed = pack(x, self.config.scale_factor_temporal, self.config.scale_factor_spatial)
        posterior = DiagonalGaussianDistribution(torch.cat([packed, packed], dim=1), deterministic=True)
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    def decode(self, z: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        """Turn [B, z_dim, T, h, w] into pixels [B, 3, F, H, W]; the copies of the first frame are averaged."""
        pixels = unpack(z, self.config.scale_factor_temporal, self.config.scale_factor_spatial)
        return DecoderOutput(sample=pixels) if return_dict else (pixels,)


def pack(pixels: Tensor, temporal: int, spatial: int) -> Tensor:
    """Move blocks of temporal x spatial x spatial pixels of [B, C, F, H, W] into channels; the first frame repeats."""
    frames, height, width = pixels.shape[2:]
    if (frames - 1) % temporal or height % spatial or width % spatial:
        raise ValueError(
            f"frames - 1 must be a multiple of {temporal}, height and width of {spatial}, "
            f"got frames={frames}, height={height}, width={width}"
        )
    copies = pixels[:, :, :1].expand(-1, -1, temporal - 1, -1, -1)
    groups = torch.cat([copies, pixels], dim=2).unflatten(2, (-1, temporal)).transpose(2, 3).flatten(1, 2)
    return F.pixel_unshuffle(groups.transpose(1, 2), spatial).transpose(1, 2)


def unpack(latents: Tensor, temporal: int, spatial: int) -> Tensor:
    """Undo `pack`."""
    groups = F.pixel_shuffle(latents.transpose(1, 2), spatial).transpose(1, 2)
    pixels = groups.unflatten(1, (-1, temporal)).transpose(2, 3).flatten(2, 3)
    first = pixels[:, :, :temporal].mean(dim=2, keepdim=True)
    return torch.cat([first, pixels[:, :, temporal:]], dim=2)
