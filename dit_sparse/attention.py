"""The one op boundary between a model and the kernels, and the function for everyone who has no diffusers model."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, library

from dit_sparse.grid import Grid
from dit_sparse.patterns import Pattern, PatternState
from dit_sparse.runner import attend_selection, exact_attention
from dit_sparse.schedule import Schedule

DenseCall = Callable[[Tensor, Tensor, Tensor, Tensor | None, float, bool, float | None, bool, str | None], Tensor]

# The op can carry tensors and numbers only, so a layer travels as a number. Ids are never used twice.
_LAYERS: WeakValueDictionary[int, Layer] = WeakValueDictionary()
_IDS = itertools.count()


class Layer:
    """Stand for one attention module of one transformer.

    name: module path. index: its place among the sparse-able layers. dense: the model's own call, an importable
    function (q, k, v, attn_mask, dropout_p, is_causal, scale, enable_gqa, backend) -> out, all [B, S, H, D].
    id: 0-dim int64 CPU tensor; copies and unpickled layers get their own.
    """

    def __init__(self, name: str, index: int, schedule: Schedule, dense: DenseCall) -> None:
        self.name, self.index, self.schedule, self.dense = name, index, schedule, dense
        self._register()

    def _register(self) -> None:
        number = next(_IDS)
        self.id = torch.tensor(number)
        _LAYERS[number] = self

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "id"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._register()


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None,
    layer_id: Tensor,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    backend: str | None,
) -> Tensor:
    layer = _LAYERS.get(int(layer_id))
    if layer is None:
        raise RuntimeError("this attention layer's schedule is gone; call dit_sparse.enable() again on the pipeline")
    out = layer.schedule.attend(layer, q, k, v, attn_mask, dropout_p, is_causal, scale, enable_gqa, backend)
    # An op must not return its input, nor a layout that its fake did not promise.
    return out.contiguous()


def _attention_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None,
    layer_id: Tensor,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    backend: str | None,
) -> Tensor:
    return q.new_empty(*q.shape[:-1], v.shape[-1])


# Which steps run sparse is decided inside the op, at run time: a CUDA graph would freeze one step's answer.
attention_op = library.custom_op(
    "dit_sparse::attention", _attention, mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,)
)
attention_op.register_fake(_attention_fake)


def attend(
    layer: Layer,
    q: Tensor,  # [B, S, H, D]
    k: Tensor,  # [B, Sk, Hkv, D]
    v: Tensor,  # [B, Sk, Hkv, D]
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Run one self-attention call through its layer's schedule: one opaque node under torch.compile.

    `backend` is the model's own choice for dense calls; it is handed to `layer.dense` unread.
    """
    return torch.ops.dit_sparse.attention(
        q, k, v, attn_mask, layer.id, dropout_p, is_causal, scale, enable_gqa, backend
    )  # type: ignore[no-any-return]


class SparseAttention:
    """Be a pattern ready to run on any grid: builds layouts and static masks once, keeps no content between calls.

    For code outside diffusers: `attend = SparseAttention(Neighborhood(window=0.3)); out = attend(q, k, v, grid)`.
    """

    def __init__(self, pattern: Pattern, backend: str = "auto") -> None:
        self.pattern, self.backend = pattern, backend
        self._grid: tuple[Grid, torch.device] | None = None
        self._shared: dict[Any, Any] = {}

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        grid: Grid,
        *,
        scale: float | None = None,
        return_lse: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attend: see `sparse_attention`."""
        for name, tensor in (("q", q), ("k", k), ("v", v)):
            if tensor.dim() != 4:
                raise ValueError(f"{name} must be [B, S, H, D], got shape {tuple(tensor.shape)}")
            if tensor.shape[1] != grid.tokens:
                raise ValueError(
                    f"{name} must have the grid's {grid.tokens} tokens ({grid}), got {tensor.shape[1]} (shape "
                    f"{tuple(tensor.shape)}; the order is [B, S, H, D])"
                )
            if tensor.device != q.device:
                raise ValueError(f"q, k and v must be on one device, got q={q.device}, {name}={tensor.device}")
            if tensor.dtype == torch.float64 and self.backend != "reference":
                raise TypeError(
                    f"{name} is float64; the kernels take float16, bfloat16 and float32. Cast it, or ask for "
                    "backend='reference'"
                )
        if self._grid != (grid, q.device):
            self.pattern.check(grid)
            self._grid, self._shared = (grid, q.device), {}
            self._shared["layout"] = self.pattern.token_order().layout(grid, q.device)
        layout = self._shared["layout"]
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        q, k, v = layout.to_kernel(q), layout.to_kernel(k), layout.to_kernel(v)
        exact = exact_attention(k, v, layout, scale, None, self.backend, self._shared)
        state = PatternState(layout, scale, shared=self._shared, v=v, exact=exact)
        selection = self.pattern.select(q, k, grid, state)
        attended = attend_selection(selection, q, k, v, layout, scale, None, self.backend)
        out = layout.from_kernel(self.pattern.finish(attended, q, k, grid, state))
        return (out, layout.from_kernel(attended.lse)) if return_lse else out


def sparse_attention(
    q: Tensor,  # [B, S, H, D]
    k: Tensor,  # [B, S, Hkv, D]
    v: Tensor,  # [B, S, Hkv, D]
    pattern: Pattern,
    grid: Grid,
    *,
    backend: str = "auto",
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attend with one pattern over a grid; tokens in the grid's own order; inference only.

    Returns out [B, S, H, D] in q.dtype and, with return_lse, the natural-log LSE, fp32 [B, S, H]. A static pattern's
    mask is built in each call: keep a `SparseAttention` where the same one runs often.

    Raises: ValueError for shapes that do not fit the grid, tensors on two devices, a pattern that does not fit the
        grid or a backend that refuses; TypeError for float64 or mixed dtypes.
    """
    return SparseAttention(pattern, backend)(q, k, v, grid, scale=scale, return_lse=return_lse)


def dense_attention(
    q: Tensor,  # [B, S, H, D]
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Attend densely with torch: the dense call of layers whose model brings none."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    return out.transpose(1, 2)
