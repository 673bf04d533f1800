"""Who is timed: dense kernels, peers and our own, each made ready for one call as its user would keep it ready."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dit_sparse.kernels import fa4, flex
from dit_sparse.kernels.backends import BACKENDS, block_attention
from dit_sparse.kernels.indices import BlockIndices
from dit_sparse.kernels.launch import HopperLaunch, Launch

# What is timed: a call that returns out [B, Sq, H, D].
Attend = Callable[[], Tensor]

OWN = {"hopper": "hopper", "triton": "triton_forward"}  # backend -> its module in kernels/


@dataclass(frozen=True, eq=False)
class Inputs:
    """Hold one attention call."""

    q: Tensor  # [1, Sq, H, D]
    k: Tensor  # [1, Sk, H, D]
    v: Tensor  # [1, Sk, H, D]
    indices: BlockIndices

    @property
    def scale(self) -> float:
        return float(self.q.shape[-1] ** -0.5)


@dataclass(frozen=True)
class Contender:
    """Name one way to compute; make prepares all that a user would prepare once per mask."""

    name: str
    refusal: Callable[[Inputs], str | None]
    make: Callable[[Inputs], Attend]
    dense: bool = False  # reads every pair, whatever the indices say
    compensated: bool = False


def kernel(backend: str, launch: Launch | HopperLaunch | None = None, label: str = "") -> Contender:
    """Return a backend's kernel alone, its lists ready; launch and label name another configuration of our own."""
    name = f"{backend} {label}" if label else backend
    if backend in OWN:
        return Contender(name, partial(_refused, backend), partial(_own_kernel, backend, launch))
    peers = {"fa4": _fa4, "flex": _flex}
    return Contender(name, partial(_refused, backend), peers.get(backend, partial(_whole_call, backend)))


def whole_call(backend: str) -> Contender:
    """Return a backend's block_attention from bitmaps on: compaction, checks, choice and launch."""
    return Contender(f"{backend} call", partial(_refused, backend), partial(_whole_call, backend))


def with_means(backend: str) -> Contender:
    """Return a kernel of our own with compensation, its lists and means ready."""
    return Contender(f"{backend} means", partial(_refused, backend), partial(_own_means, backend), compensated=True)


def own_module(backend: str) -> ModuleType:
    """Import the module of a backend of our own."""
    return importlib.import_module(f"dit_sparse.kernels.{OWN[backend]}")


def _refused(backend: str, inputs: Inputs) -> str | None:
    return BACKENDS[backend].refusal(inputs.q, inputs.k, inputs.v, inputs.indices, None, False)


def _own_kernel(backend: str, launch: Launch | HopperLaunch | None, inputs: Inputs) -> Attend:
    from dit_sparse.kernels.triton_lists import compact  # triton is not there on every system

    module, lists = own_module(backend), compact(inputs.indices)
    q, k, v, indices = inputs.q, inputs.k, inputs.v, inputs.indices
    return lambda: module.attend_lists(q, k, v, indices, lists, inputs.scale, None, launch, None)[0]


def _own_means(backend: str, inputs: Inputs) -> Attend:
    from dit_sparse.kernels.triton_lists import compact  # triton is not there on every system

    module, lists = own_module(backend), compact(inputs.indices)
    q, k, v, indices = inputs.q, inputs.k, inputs.v, inputs.indices
    means = module.block_means(k, v, indices, None)
    return lambda: module.attend_lists(q, k, v, indices, lists, inputs.scale, None, None, means)[0]


def _whole_call(backend: str, inputs: Inputs) -> Attend:
    return lambda: block_attention(inputs.q, inputs.k, inputs.v, inputs.indices, backend=backend)[0]


def _fa4(inputs: Inputs) -> Attend:
    lists = fa4.block_lists(inputs.indices, inputs.q.shape[0])
    return lambda: fa4.attend_blocks(inputs.q, inputs.k, inputs.v, lists, inputs.scale)[0]


def _flex(inputs: Inputs) -> Attend:
    mask = flex.block_mask(inputs.q, inputs.k, inputs.indices)
    q, k, v = (_by_head(x) for x in (inputs.q, inputs.k, inputs.v))
    return lambda: flex.attend_blocks(q, k, v, mask, inputs.scale)[0]


def _by_head(x: Tensor) -> Tensor:
    """Lay x [B, S, H, D] out head by head, as torch's own kernels like it best."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _cudnn(inputs: Inputs) -> Attend:
    q, k, v = (_by_head(x).transpose(1, 2) for x in (inputs.q, inputs.k, inputs.v))

    def dense() -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)

    return dense


def _refuse_sdpa(inputs: Inputs) -> str | None:
    if not inputs.q.is_cuda or torch.version.hip is not None:
        return "it needs an NVIDIA GPU"
    return None


def _fa4_dense(inputs: Inputs) -> Attend:
    return lambda: fa4.attend_blocks(inputs.q, inputs.k, inputs.v, None, inputs.scale)[0]


CUDNN = Contender("cudnn dense", _refuse_sdpa, _cudnn, dense=True)
FA4_DENSE = Contender("fa4 dense", lambda inputs: fa4.dense_refusal(inputs.q), _fa4_dense, dense=True)
