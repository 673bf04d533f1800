"""PixelVAE: an exact round trip, and a config that the stock pipeline reads as a VAE's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dit_sparse.pipelines.pixel_vae import PixelVAE, pack, unpack


@pytest.mark.parametrize(
    ("temporal", "spatial", "frames"),
    [(1, 1, 3), (1, 4, 2), (2, 2, 33), (4, 2, 17)],  # nothing, space only, as bundled, Wan's own time factor
)
def test_round_trip_is_exact(temporal: int, spatial: int, frames: int) -> None:
    pixels = torch.rand(2, 3, frames, 16, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = pack(pixels, temporal, spatial)
    assert latents.shape == (2, 3 * temporal * spatial**2, (frames - 1) // temporal + 1, 16 // spatial, 24 // spatial)
    assert torch.equal(unpack(latents, temporal, spatial), pixels)


def test_the_module_encodes_and_decodes_exactly() -> None:
    vae = PixelVAE()
    pixels = torch.rand(1, 3, 5, 8, 8) * 2 - 1
    std = torch.tensor(vae.config.latents_std)[:, None, None, None]
    scaled = vae.encode(pixels).latent_dist.mode() / std
    assert torch.equal(vae.decode(scaled * std).sample, pixels)
    assert torch.equal(vae.encode(pixels, return_dict=False)[0].sample(), vae.encode(pixels).latent_dist.mode())
    assert torch.equal(vae.decode(scaled * std, return_dict=False)[0], pixels)
    assert sum(p.numel() for p in vae.parameters()) == 0


def test_it_saves_and_loads(tmp_path: Path) -> None:
    PixelVAE().save_pretrained(tmp_path)
    again = PixelVAE.from_pretrained(tmp_path)
    assert dict(again.config)["z_dim"] == 24
    assert again.dtype == torch.float32


def test_bad_settings_say_what_is_wrong() -> None:
    with pytest.raises(ValueError, match=r"z_dim must be .* 24, got z_dim=16"):
        PixelVAE(z_dim=16)
    with pytest.raises(ValueError, match="must have z_dim=24 entries, got 3 and 24"):
        PixelVAE(latents_mean=(0.0,) * 3)
    with pytest.raises(ValueError, match="got frames=4, height=8, width=8"):
        PixelVAE().encode(torch.zeros(1, 3, 4, 8, 8))
