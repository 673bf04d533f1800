"""Derived processors: the installed class's own code and signature, the user's own backend, any calling form."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import FirstBlockCacheConfig
from diffusers.hooks import HookRegistry, ModelHook

from dit_sparse.patterns import TopBlocks
from dit_sparse.pipelines import compat
from dit_sparse.pipelines.enable import disable, enable, sparse, summary
from dit_sparse.pipelines.processors import SparseProcessor, refusal, sparse_processor
from dit_sparse.plan import Plan
from tests.pipelines.tiny import generate, wan


def target(pipe: Any) -> Any:
    """Return the first self-attention module."""
    return next(module for name, module in pipe.transformer.named_modules() if name.endswith("0.attn1"))


def test_class_signature_and_name(pipe: Any) -> None:
    stock = target(pipe).processor
    enable(pipe, TopBlocks(keep=0.5))
    ours = target(pipe).processor
    assert isinstance(ours, SparseProcessor)
    assert isinstance(ours, type(stock))
    assert inspect.signature(ours.__call__) == inspect.signature(stock.__call__)
    assert type(ours).__name__ == f"Sparse{type(stock).__name__}"
    assert vars(stock) == {}
    assert ours.stock_processor is stock
    assert (
        len({type(module.processor) for name, module in pipe.transformer.named_modules() if "attn1" in name[-5:]}) == 1
    )


def test_nothing_in_diffusers_or_torch_is_patched(pipe: Any) -> None:
    import sys

    call = type(target(pipe).processor).__call__
    before = dict(call.__globals__), vars(F).copy(), set(sys.modules)
    enable(pipe, TopBlocks(keep=0.5), min_tokens=0)
    generate(pipe, steps=1)
    assert (dict(call.__globals__), vars(F)) == before[:2]
    assert not {name for name in set(sys.modules) - before[2] if "sparse" in name and not name.startswith("dit_sparse")}


def test_a_shared_processor_is_copied_per_layer(pipe: Any) -> None:
    shared = target(pipe).processor
    modules = [module for name, module in pipe.transformer.named_modules() if name.endswith("attn1")]
    for module in modules:
        module.set_processor(shared)
    shared.mine = "kept"
    enable(pipe, TopBlocks(keep=0.5))
    ours = [module.processor for module in modules]
    assert len({id(one) for one in ours}) == 2
    assert [one.sparse_layer.index for one in ours] == [0, 1]
    assert all(one.stock_processor is shared and one.mine == "kept" for one in ours)
    disable(pipe)
    assert all(module.processor is shared for module in modules)


def test_the_users_backend_is_the_dense_fallback(monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend chosen before or after enable runs the dense calls, and survives disable."""
    seen: list[str | None] = []
    stock_dispatch = compat.dispatch_attention_fn

    def dispatch(*args: Any, backend: Any = None, **kwargs: Any) -> Any:
        seen.append(None if backend is None else str(getattr(backend, "value", backend)))
        return stock_dispatch(*args, backend=backend, **kwargs)

    monkeypatch.setattr(compat, "dispatch_attention_fn", dispatch)
    pipe = wan(layers=1)
    stock = generate(pipe, steps=1)
    attention = target(pipe)
    attention.set_attention_backend("_native_math")
    enable(pipe, Plan.dense())
    math = generate(pipe, steps=1)
    attention.set_attention_backend("native")
    assert torch.equal(generate(pipe, steps=1), stock)
    assert seen == ["_native_math"] * 2 + ["native"] * 2
    assert not torch.equal(math, stock)
    disable(pipe)
    assert attention.processor._attention_backend.value == "native"


def test_a_sparse_call_does_not_need_the_users_backend() -> None:
    pipe = wan(layers=1)
    with sparse(pipe, TopBlocks(keep=0.5), min_tokens=0):
        expected = generate(pipe, steps=1)
        target(pipe).set_attention_backend("_native_math")
        assert torch.equal(generate(pipe, steps=1), expected)


class Heads(torch.nn.Module):
    """Be a self-attention module without weights."""

    def __init__(self, processor: Any) -> None:
        super().__init__()
        self.processor = processor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.processor(self, x)


class ByKeyword:
    def __call__(self, attn: Any, x: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(query=x, key=x, value=x, scale=0.5)


class InAnInnerFunction:
    def __call__(self, attn: Any, x: torch.Tensor) -> torch.Tensor:
        def inner(q: torch.Tensor) -> torch.Tensor:
            return F.scaled_dot_product_attention(q, x, x)

        return inner(x)


class NoAttention:
    def __call__(self, attn: Any, x: torch.Tensor) -> torch.Tensor:
        return x


class FakeSchedule:
    """Record what reaches the op and what is noted, and answer with the dense call."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []
        self.noted: list[str] = []

    def attend(self, layer: Any, q: Any, k: Any, v: Any, *rest: Any) -> Any:
        self.shapes.append(tuple(q.shape))
        return layer.dense(q, k, v, *rest)

    def note_dense(self, layer: Any, reason: str) -> None:
        self.noted.append(reason)


# every way in which processors call the attention function
@pytest.mark.parametrize("form", [ByKeyword, InAnInnerFunction])
def test_calling_forms(form: type) -> None:
    from dit_sparse.attention import Layer
    from dit_sparse.pipelines.processors import dense_call

    schedule, stock = FakeSchedule(), form()
    module = Heads(sparse_processor(stock, Layer("attn", 0, schedule, dense_call(stock))))  # type: ignore[arg-type]
    x = torch.randn(2, 3, 7, 8)  # [B, H, S, D]
    assert torch.equal(module(x), stock(None, x))
    assert schedule.shapes == [(2, 7, 3, 8)]
    assert not schedule.noted
    module(x.requires_grad_()).sum().backward()
    assert len(schedule.shapes) == 1
    assert "gradients" in schedule.noted[0]


def test_refusals_say_why() -> None:
    assert "NoAttention calls neither" in (refusal(NoAttention()) or "")
    assert "not a plain Python processor" in (refusal(torch.nn.Linear(1, 1).double) or "")
    assert refusal(ByKeyword()) is None


def test_masks_of_unknown_form_get_the_stock_call(monkeypatch: pytest.MonkeyPatch) -> None:
    from dit_sparse.pipelines import processors as module

    given: list[Any] = []

    def dispatch(*args: Any, **kwargs: Any) -> torch.Tensor:
        given.append((args[3], kwargs))
        return args[0]

    monkeypatch.setattr(compat, "dispatch_attention_fn", dispatch)
    schedule, mask, x = FakeSchedule(), object(), torch.randn(1, 7, 2, 8)
    layer = type("Layer", (), {"schedule": schedule})()
    monkeypatch.setattr(module._RUNNING, "layer", layer)
    module._dispatch(x, x, x, attn_mask=mask, backend="flex")
    module._dispatch(x, x, x, attention_kwargs={"window": 3})
    assert given[0] == (mask, {"backend": "flex", "parallel_config": None})
    assert len(given) == 2
    assert schedule.noted == ["mask of unknown form: object", "attention_kwargs window"]


# our entry in the registry goes before or after the cache's; either is removed first
@pytest.mark.parametrize("order", ["cache first", "ours first"])
@pytest.mark.parametrize("removed", ["cache first", "ours first"])
def test_diffusers_caches_live_beside_it(pipe: Any, order: str, removed: str) -> None:
    stock, forward = generate(pipe), pipe.transformer.forward.__func__
    config = FirstBlockCacheConfig(threshold=0.0)  # never skips, so the outputs must agree
    with sparse(pipe, TopBlocks(keep=0.5), min_tokens=0):
        expected = generate(pipe)
    switch_on = [lambda: pipe.transformer.enable_cache(config), lambda: enable(pipe, TopBlocks(keep=0.5), min_tokens=0)]
    for switch in switch_on if order == "cache first" else reversed(switch_on):
        switch()
    assert torch.equal(generate(pipe), expected)
    twin = copy.deepcopy(pipe)
    switch_off = [pipe.transformer.disable_cache, lambda: disable(pipe)]
    for switch in switch_off if removed == "cache first" else reversed(switch_off):
        switch()
    assert torch.equal(generate(pipe), stock)
    assert pipe.transformer.forward.__func__ is forward
    assert summary(twin).plan == "topblocks"


class _Nothing(ModelHook):
    """Be someone else's hook on the transformer itself."""


@pytest.mark.parametrize("order", ["other first", "ours first"])
@pytest.mark.parametrize("removed", ["other first", "ours first"])
def test_other_hooks_on_the_transformer_come_and_go(pipe: Any, order: str, removed: str) -> None:
    transformer, forward = pipe.transformer, pipe.transformer.forward.__func__
    registry = HookRegistry.check_if_exists_or_initialize(transformer)
    switch_on = [
        lambda: [registry.register_hook(_Nothing(), name) for name in ("one", "two")],
        lambda: enable(pipe, TopBlocks(keep=0.5), min_tokens=0),
    ]
    for switch in switch_on if order == "other first" else reversed(switch_on):
        switch()
    assert summary_of_run(pipe) > 0
    switch_off = [lambda: [registry.remove_hook(name) for name in ("one", "two")], lambda: disable(pipe)]
    for switch in switch_off if removed == "other first" else reversed(switch_off):
        switch()
    assert transformer.forward.__func__ is forward
    assert registry._hook_order == registry._fn_refs == []
    assert registry.hooks == {}


def summary_of_run(pipe: Any) -> int:
    generate(pipe, steps=1)
    return summary(pipe).sparse_calls
