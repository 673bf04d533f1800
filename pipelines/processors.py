"""Derived attention processors: the installed processor's own code, with only the attention call made ours."""

from __future__ import annotations

import functools
import inspect
import threading
import types
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_sparse import attention
from dit_sparse.pipelines import compat

if TYPE_CHECKING:
    from dit_sparse.attention import DenseCall, Layer

OURS = ("sparse_layer", "stock_processor", "outer_mask")  # the attributes that we add to a processor's own


class SparseProcessor:
    """Mark the derived processors. `stock_processor` is the very object to put back.

    outer_mask: the argument from which the processor builds a mask of all queries by all keys, or None.
    """

    sparse_layer: Layer
    stock_processor: Any
    outer_mask: str | None

    def __reduce__(self) -> tuple[Any, ...]:
        # the derived class is made at run time: store its base, and build it again where the copy is
        return _empty, (type(self.stock_processor), self.outer_mask), vars(self)


class _Running(threading.local):
    """Hold which layer's processor runs on this thread: the attention call inside it does not say so.

    key_mask: [B, T], what the processor got where it builds an outer mask from it.
    """

    layer: Layer | None = None
    key_mask: Tensor | None = None


_RUNNING = _Running()


def refusal(processor: object) -> str | None:
    """Say why no sparse processor can be derived from this one, or None."""
    cls = type(processor)
    if isinstance(processor, SparseProcessor):
        return None
    if not isinstance(cls.__call__, types.FunctionType) or cls.__new__ is not object.__new__:
        return f"{cls.__name__} is not a plain Python processor"
    if not _replacements(cls.__call__):
        return f"{cls.__name__} calls neither {compat.DISPATCHER} nor scaled_dot_product_attention itself"
    return None


def dense_call(processor: object, outer_mask: str | None = None) -> DenseCall:
    """Return the stock attention call of a processor in the form that `Layer.dense` has; importable by name."""
    if outer_mask is not None:
        return dense_outer_dispatch
    replaced = _replacements(type(stock(processor)).__call__)
    return dense_dispatch if _dispatch in replaced.values() else attention.dense_attention


def stock(processor: Any) -> Any:
    """Return the processor object that was there before ours."""
    return processor.stock_processor if isinstance(processor, SparseProcessor) else processor


def sparse_processor(processor: Any, layer: Layer, outer_mask: str | None = None) -> SparseProcessor:
    """Return a sparse copy of a processor for one layer; the processor itself, perhaps shared, is left as it is."""
    state = {name: value for name, value in vars(processor).items() if name not in OURS}
    made = _empty(type(stock(processor)), outer_mask)
    vars(made).update(state, sparse_layer=layer, stock_processor=stock(processor), outer_mask=outer_mask)
    return made


def carry_settings(source: object, target: object) -> None:
    """Carry over what was set on a processor object since it was copied: a backend, an adapter's scale, ..."""
    for name, value in vars(source).items():
        if name not in OURS and value is not getattr(target, name, None):
            setattr(target, name, value)


def dense_dispatch(
    q: Tensor,  # [B, S, H, D]
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    backend: str | None,
) -> Tensor:
    """Run the dispatcher as the stock processor does, with the user's own backend; returns [B, S, H, D]."""
    out: Tensor = compat.dispatch_attention_fn(
        q, k, v, attn_mask, dropout_p, is_causal, scale, enable_gqa, backend=backend
    )
    return out


def dense_outer_dispatch(
    q: Tensor,  # [B, S, H, D]
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None,  # [B, T]: real tokens among the last T
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    backend: str | None,
) -> Tensor:
    """Run the dispatcher with the mask that the stock processor builds: real queries by real keys."""
    mask = None if attn_mask is None else _outer(attn_mask, q.shape[1])
    return dense_dispatch(q, k, v, mask, dropout_p, is_causal, scale, enable_gqa, backend)


def _outer(key_mask: Tensor, tokens: int) -> Tensor:
    real = F.pad(key_mask, (tokens - key_mask.shape[1], 0), value=True).bool()
    return real[:, None, :, None] & real[:, None, None, :]


def _dispatch(
    query: Tensor,  # [B, S, H, D]
    key: Tensor,
    value: Tensor,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    attention_kwargs: dict[str, Any] | None = None,
    *,
    backend: Any = None,
    parallel_config: Any = None,
) -> Tensor:
    """Stand in for `dispatch_attention_fn` inside a derived processor."""
    layer, key_mask = _RUNNING.layer, _RUNNING.key_mask
    reason = _stock_reason(query, key, value, attn_mask)
    if parallel_config is not None:
        reason = "context parallel"
    elif attention_kwargs:
        reason = f"attention_kwargs {', '.join(attention_kwargs)}"
    if layer is None or reason is not None:
        _note(layer, reason)
        attn_mask = attn_mask if key_mask is None else _outer(key_mask, key.shape[1])
        out: Tensor = compat.dispatch_attention_fn(
            query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, attention_kwargs,
            backend=backend, parallel_config=parallel_config,
        )  # fmt: skip
        return out
    name = None if backend is None else str(getattr(backend, "value", backend))
    attn_mask = attn_mask if key_mask is None else key_mask
    return attention.attend(layer, query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, backend=name)


def _sdpa(
    query: Tensor,  # [B, H, S, D]
    key: Tensor,
    value: Tensor,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Stand in for `F.scaled_dot_product_attention` inside a derived processor."""
    layer = _RUNNING.layer
    reason = _stock_reason(query, key, value, attn_mask)
    if layer is None or reason is not None:
        _note(layer, reason)
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    out = attention.attend(layer, q, k, v, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    return out.transpose(1, 2)


def _stock_reason(query: Tensor, key: Tensor, value: Tensor, attn_mask: object) -> str | None:
    """Say why a call cannot pass our op at all and must be the stock call with the stock arguments, or None."""
    if attn_mask is not None and not isinstance(attn_mask, Tensor):
        return f"mask of unknown form: {type(attn_mask).__name__}"
    if compat.wants_gradients(query, key, value):
        return "gradients wanted (inference only; call under torch.no_grad())"
    return None


def _note(layer: Layer | None, reason: str | None) -> None:
    # a count changed inside a compiled graph would be guarded on, and recompile at each call
    if layer is not None and reason is not None and not torch.compiler.is_compiling():
        layer.schedule.note_dense(layer, reason)


@functools.cache
def _derived(cls: type, outer_mask: str | None) -> type[SparseProcessor]:
    """Return the sparse class of a processor class; one per class, so that all layers share compiled graphs."""
    stock_call: Any = cls.__call__
    scope = {**stock_call.__globals__, **_replacements(stock_call)}
    # without a name Dynamo guards on this very dict; with one it would import the stock module and look there
    del scope["__name__"]
    call = types.FunctionType(
        stock_call.__code__, scope, stock_call.__name__, stock_call.__defaults__, stock_call.__closure__
    )
    call.__kwdefaults__ = stock_call.__kwdefaults__

    place = None if outer_mask is None else list(inspect.signature(stock_call).parameters).index(outer_mask) - 1

    def sparse_call(self: Any, *args: Any, **kwargs: Any) -> Any:
        before = _RUNNING.layer, _RUNNING.key_mask
        _RUNNING.layer, _RUNNING.key_mask = self.sparse_layer, None
        if place is not None and outer_mask is not None:
            given = args[place] if place < len(args) else kwargs.get(outer_mask)
            if isinstance(given, Tensor):
                # what the processor builds from the mask's shape alone costs nothing; the call gets the mask itself
                _RUNNING.key_mask, shape_only = given.bool(), given.to("meta")
                if place < len(args):
                    args = (*args[:place], shape_only, *args[place + 1 :])
                else:
                    kwargs = {**kwargs, outer_mask: shape_only}
        try:
            return call(self, *args, **kwargs)
        finally:
            _RUNNING.layer, _RUNNING.key_mask = before

    def stock_object(ours: type, *args: Any, **kwargs: Any) -> Any:
        return cls(*args, **kwargs)

    # attention modules drop the arguments that inspect.signature(processor.__call__) does not show
    functools.update_wrapper(sparse_call, stock_call)
    # diffusers makes fresh processors by `type(processor)()`: these must be stock ones
    body = {"__call__": sparse_call, "__new__": stock_object, "__module__": __name__, "__doc__": cls.__doc__}
    return type(f"Sparse{cls.__name__}", (SparseProcessor, cls), body)


def _replacements(call: Any) -> dict[str, Any]:
    """Return which globals of a processor's function stand for the attention call, and what takes their place."""
    used = _names(call.__code__)
    found: dict[str, Any] = {}
    for name in used & call.__globals__.keys():
        value = call.__globals__[name]
        if name == compat.DISPATCHER or value is compat.dispatch_attention_fn:
            found[name] = _dispatch
        elif value is F.scaled_dot_product_attention:
            found[name] = _sdpa
        elif value is F and "scaled_dot_product_attention" in used:
            found[name] = types.ModuleType(F.__name__)
            vars(found[name]).update(vars(F), scaled_dot_product_attention=_sdpa)
    return found


def _names(code: types.CodeType) -> set[str]:
    """Return the global and attribute names that a function and the functions inside it use."""
    inner = (_names(const) for const in code.co_consts if isinstance(const, types.CodeType))
    return set(code.co_names).union(*inner)


def _empty(cls: type, outer_mask: str | None) -> SparseProcessor:
    return object.__new__(_derived(cls, outer_mask))
