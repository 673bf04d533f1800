"""What users add to a transformer: IP-Adapter processors, which are modules; fused projections; LoRA."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import SD3IPAdapterJointAttnProcessor2_0
from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from dit_sparse.moment import CROSS
from dit_sparse.patterns import Neighborhood, TopBlocks
from dit_sparse.pipelines.enable import disable, enable, sparse, summary
from dit_sparse.pipelines.processors import SparseProcessor
from tests.models.case import TEXT_WIDTH, Case, text
from tests.models.cases import CASES
from tests.models.test_sweep import apart, equal, masked, run, tolerance

PATTERN = Neighborhood(window=(1, 0.5, 0.4))
IMAGE_TOKENS = 4  # of a prompt image
INNER = 32  # heads x head_dim of the tiny models


def first_case(model: str) -> Case:
    return next(case for case in CASES if case.model == model)


def with_image(case: Case) -> Case:
    """Give the forward what the IP-Adapter's projection makes of an image, as the transformer hands it on."""

    def inputs(latents: Tensor, lengths: list[int]) -> dict[str, Any]:
        made, image = case.inputs(latents, lengths), text(len(latents), IMAGE_TOKENS)
        if case.model.startswith("Flux"):
            return {**made, "joint_attention_kwargs": {"ip_hidden_states": [image]}}
        times = torch.randn(len(latents), TEXT_WIDTH)
        return {**made, "joint_attention_kwargs": {"ip_hidden_states": image, "temb": times}}

    return dataclasses.replace(case, inputs=inputs)


def flux_processor() -> nn.Module:
    return FluxIPAdapterAttnProcessor(INNER, TEXT_WIDTH, (IMAGE_TOKENS,), 1.0)


def sd3_processor() -> nn.Module:
    return SD3IPAdapterJointAttnProcessor2_0(INNER, TEXT_WIDTH, 16, timesteps_emb_dim=TEXT_WIDTH, scale=1.0)


@dataclasses.dataclass(frozen=True)
class Adapted:
    """Hold a model, and the processors with weights of its own that were put into some of its layers."""

    case: Case
    model: Any
    layers: tuple[str, ...]

    def processors(self, model: Any = None) -> list[Any]:
        return [(model or self.model).get_submodule(name).processor for name in self.layers]


ADAPTERS: dict[str, Callable[[], nn.Module]] = {
    "FluxTransformer2DModel": flux_processor,
    "SD3Transformer2DModel": sd3_processor,
}


# image tokens as keys of a call of their own (dispatcher), or behind the image's own tokens (SDPA)
@pytest.fixture(params=ADAPTERS)
def adapted(request: pytest.FixtureRequest) -> Adapted:
    case = with_image(first_case(request.param))
    model: Any = case.build()
    layers = tuple(f"transformer_blocks.{number}.attn" for number in range(len(model.transformer_blocks)))
    for name in layers:
        processor = ADAPTERS[request.param]().requires_grad_(False)
        for parameter in processor.parameters():
            nn.init.normal_(parameter, std=0.3)
        model.get_submodule(name).processor = processor
    return Adapted(case, model, layers)


def noise_bound(adapted: Adapted, monkeypatch: pytest.MonkeyPatch) -> float:
    """Return eight times how far two dense kernels are apart; SD3's processor needs the layout of the usual one."""
    sdpa, usual = F.scaled_dot_product_attention, run(adapted.model, adapted.case)

    def other(*args: Any, **kwargs: Any) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return sdpa(*args, **kwargs).transpose(1, 2).contiguous().transpose(1, 2)

    with monkeypatch.context() as patched:
        patched.setattr(F, "scaled_dot_product_attention", other)
        noise = apart(usual, run(adapted.model, adapted.case))
    assert 0 < noise < 1e-4 * max(float(out.abs().max()) for out in usual)
    return 8 * noise


def test_ip_adapter_runs_with_a_masked_self_attention(adapted: Adapted, monkeypatch: pytest.MonkeyPatch) -> None:
    """The image prompt is never left out: Flux' calls to it are stock; SD3's see it beside a sparse image."""
    model, case, before = adapted.model, adapted.case, adapted.processors()
    stock, allowed = run(model, case), noise_bound(adapted, monkeypatch)
    with masked(model, PATTERN, monkeypatch):
        oracle = run(model, case)
    enable(model, PATTERN, min_tokens=0, strict=True)
    out, found = run(model, case), summary(model)
    assert apart(out, oracle) <= allowed
    assert apart(out, stock) > 30 * allowed
    assert found.unknown == ()
    if case.model.startswith("Flux"):
        assert found.dense_reasons == {CROSS: len(adapted.layers)}
        assert found.sparse_calls == len(adapted.layers) + len(model.single_transformer_blocks)
    else:
        assert found.dense_reasons == {}
        assert found.sparse_calls == 2 * len(adapted.layers)
    disable(model)
    assert all(one is was for one, was in zip(adapted.processors(), before, strict=True))
    assert equal(run(model, case), stock)


def test_ip_adapter_without_an_image_to_see(adapted: Adapted) -> None:
    """Its scale is read anew in each call, so that the image counts while sparse and can be switched off."""
    model, case = adapted.model, adapted.case
    enable(model, PATTERN, min_tokens=0, strict=True)
    with_prompt = run(model, case)
    for processor in adapted.processors():
        processor.scale = [0.0] if isinstance(processor.scale, list) else 0.0
    assert apart(run(model, case), with_prompt) > 0.01
    disable(model)


def test_a_scale_set_while_sparse_outlives_it(adapted: Adapted) -> None:
    """`pipe.set_ip_adapter_scale` writes to the processors that are in place."""
    enable(adapted.model, PATTERN, min_tokens=0)
    half = [0.5] if isinstance(adapted.processors()[0].scale, list) else 0.5
    for processor in adapted.processors():
        processor.scale = half
    disable(adapted.model)
    assert all(processor.scale == half for processor in adapted.processors())


def test_ip_adapter_weights_are_shared_and_saved_once(adapted: Adapted) -> None:
    model, before = adapted.model, adapted.processors()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert any("processor" in name for name in state)
    enable(model, PATTERN, min_tokens=0)
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert len(list(model.parameters())) == len({id(parameter) for parameter in model.parameters()})
    ours = adapted.processors()
    assert all(
        isinstance(one, SparseProcessor) and isinstance(one, type(was)) for one, was in zip(ours, before, strict=True)
    )
    model.load_state_dict({name: tensor + 1 for name, tensor in state.items()})
    model.to(torch.float64)
    for one, was in zip(ours, before, strict=True):
        pairs = list(zip(one.parameters(), was.parameters(), strict=True))
        assert pairs
        assert all(a.dtype == b.dtype == torch.float64 and torch.equal(a, b) for a, b in pairs)
    disable(model)
    assert all(torch.equal(tensor, (state[name] + 1).double()) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("make_copy", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_ip_adapter_copies_are_their_own(
    adapted: Adapted, make_copy: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, case = adapted.model, adapted.case
    stock, allowed = run(model, case), noise_bound(adapted, monkeypatch)
    enable(model, PATTERN, min_tokens=0, strict=True)
    expected = run(model, case)
    twin = make_copy(model)
    assert apart(run(twin, case), expected) <= allowed
    for processor in adapted.processors(twin):
        for parameter in processor.parameters():
            parameter.zero_()
        assert all(not weight.any() for weight in processor.stock_processor.parameters())
    assert apart(run(twin, case), expected) > 30 * allowed
    assert equal(run(model, case), expected)
    disable(model)
    assert equal(run(model, case), stock)


def ip_adapter_weights() -> dict[str, dict[str, Tensor]]:
    """Return what the file of an IP-Adapter for the tiny Flux holds."""
    shapes = {"to_k_ip": (INNER, TEXT_WIDTH), "to_v_ip": (INNER, TEXT_WIDTH)}
    layers = {f"0.{name}.weight": torch.randn(shape) for name, shape in shapes.items()}
    biases = {f"0.{name}.bias": torch.randn(shape[0]) for name, shape in shapes.items()}
    width = IMAGE_TOKENS * TEXT_WIDTH
    projection = {"proj.weight": torch.randn(width, 8), "proj.bias": torch.randn(width)}
    norm = {"norm.weight": torch.randn(TEXT_WIDTH), "norm.bias": torch.randn(TEXT_WIDTH)}
    return {"ip_adapter": {**layers, **biases}, "image_proj": {**projection, **norm}}


def test_loading_an_ip_adapter_while_sparse() -> None:
    """Diffusers makes new processors by the class of the old ones: they are stock, and run dense with a warning."""
    case = first_case("FluxTransformer2DModel")
    model: Any = case.build()
    torch.manual_seed(0)
    weights, image = ip_adapter_weights(), torch.randn(2, 1, 8)

    def inputs(latents: Tensor, lengths: list[int]) -> dict[str, Any]:
        return {**case.inputs(latents, lengths), "joint_attention_kwargs": {"ip_adapter_image_embeds": [image]}}

    prompted, twin = dataclasses.replace(case, inputs=inputs), copy.deepcopy(model)
    twin._load_ip_adapter_weights([weights], low_cpu_mem_usage=False)
    stock = run(twin, prompted)
    enable(model, PATTERN, min_tokens=0)
    model._load_ip_adapter_weights([weights], low_cpu_mem_usage=False)
    with pytest.warns(UserWarning, match="were replaced"):
        assert equal(run(model, prompted), stock)
    enable(model, PATTERN, min_tokens=0)
    assert not equal(run(model, prompted), stock)
    disable(model)
    assert equal(run(model, prompted), stock)


# the model's own attention class; with projections of the text; by exchanging processors; not fused at all upstream
@pytest.mark.parametrize(
    ("name", "fuses"),
    [
        ("WanTransformer3DModel", True),
        ("FluxTransformer2DModel", True),
        ("CogVideoXTransformer3DModel", True),
        ("HunyuanVideoTransformer3DModel", False),
    ],
)
def test_fused_projections(name: str, fuses: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    case = first_case(name)
    model: Any = case.build()
    apart_projections, allowed = run(model, case), tolerance(model, case)
    model.fuse_qkv_projections()
    model.requires_grad_(False)
    assert any(path.endswith("to_qkv") for path, _ in model.named_modules()) == fuses
    stock = run(model, case)
    assert apart(stock, apart_projections) <= allowed
    with sparse(model, TopBlocks(keep=1.0), min_tokens=0, strict=True):
        assert apart(run(model, case), stock) <= allowed
        sparse_calls = summary(model).sparse_calls
        assert sparse_calls == len(summary(model).layers) > 0
    with masked(model, PATTERN, monkeypatch):
        oracle = run(model, case)
    with sparse(model, PATTERN, min_tokens=0, strict=True):
        out = run(model, case)
    assert apart(out, oracle) <= allowed
    assert apart(out, stock) > 30 * allowed
    assert equal(run(model, case), stock)


# the adapter goes in before or after enable(); either way it is modules around the projections, not processors
@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft, which LoRA needs, is not installed")
@pytest.mark.parametrize("enable_first", [True, False])
@pytest.mark.parametrize("name", ["WanTransformer3DModel", "FluxTransformer2DModel"])
def test_lora(name: str, enable_first: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from peft import LoraConfig

    case = first_case(name)
    model: Any = case.build()
    without, allowed = run(model, case), tolerance(model, case)
    if enable_first:
        enable(model, PATTERN, min_tokens=0, strict=True)
    torch.manual_seed(0)
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False))
    model.requires_grad_(False)
    if not enable_first:
        enable(model, PATTERN, min_tokens=0, strict=True)
    out = run(model, case)
    assert summary(model).sparse_calls == len(summary(model).layers)
    disable(model)
    assert apart(run(model, case), without) > 30 * allowed  # the adapter counts
    with masked(model, PATTERN, monkeypatch):
        assert apart(run(model, case), out) <= allowed
    enable(model, PATTERN, min_tokens=0, strict=True)
    model.disable_adapters()
    disable(model)
    assert equal(run(model, case), without)
