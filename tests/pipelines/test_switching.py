"""enable, disable, sparse, processors, attach and summary: what they change, what they put back, what they refuse."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DModel

from dit_sparse.patterns import Neighborhood, TopBlocks
from dit_sparse.pipelines.enable import attach, disable, enable, processors, sparse, summary
from dit_sparse.pipelines.hooks import find_hook
from dit_sparse.pipelines.processors import SparseProcessor
from dit_sparse.plan import Plan, Rule
from tests.pipelines.tiny import PIPELINES, cogvideox, generate, wan


def objects(pipe: Any) -> dict[str, Any]:
    """Return everything that enable may touch, by identity."""
    transformer = pipe.transformer
    hooks = tuple(transformer._forward_pre_hooks.values()) + tuple(transformer._forward_pre_hooks_with_kwargs)
    registry = getattr(transformer, "_diffusers_hook", None)
    entries = () if registry is None else (tuple(registry._hook_order), tuple(registry.hooks), len(registry._fn_refs))
    state = {"hooks": hooks, "entries": entries, "forward": transformer.forward.__func__}
    return {**transformer.attn_processors, **state, "pipe": set(vars(pipe))}


def test_disable_puts_the_same_objects_back(pipe: Any) -> None:
    generate(pipe, steps=1)  # diffusers makes its (empty) registry itself
    before = objects(pipe)
    enable(pipe, "balanced")
    assert objects(pipe) != before
    assert pipe.transformer.forward.__func__ is before["forward"]
    disable(pipe)
    after = objects(pipe)
    assert after.keys() == before.keys()
    assert after == before
    assert all(after[name] is before[name] for name in pipe.transformer.attn_processors)


def test_disable_twice_warns(pipe: Any) -> None:
    enable(pipe, "balanced")
    disable(pipe)
    with pytest.warns(UserWarning, match="nothing to disable"):
        disable(pipe)


def test_enable_twice_replaces_with_a_warning(pipe: Any) -> None:
    before = dict(pipe.transformer.attn_processors)
    enable(pipe, "balanced")
    with pytest.warns(UserWarning, match="replaces"):
        enable(pipe, TopBlocks(keep=0.5), min_tokens=0)
    generate(pipe, steps=1)
    assert summary(pipe).plan == "topblocks"
    disable(pipe)
    assert all(now is before[name] for name, now in pipe.transformer.attn_processors.items())


def test_sparse_puts_back_what_was_there(pipe: Any) -> None:
    before = objects(pipe)
    with sparse(pipe, "fast") as same:
        assert same is pipe
        assert objects(pipe) != before
    assert objects(pipe).keys() == before.keys()
    assert all(now is before[name] for name, now in pipe.transformer.attn_processors.items())
    enable(pipe, TopBlocks(keep=0.5))
    enabled = objects(pipe)
    with pytest.raises(KeyError), sparse(pipe, "fast"):
        raise KeyError
    assert objects(pipe) == enabled
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the count of our processors still holds
        generate(pipe, steps=1)
    assert summary(pipe).plan == "topblocks"


def test_processors_is_the_diffusers_idiom(pipe: Any) -> None:
    transformer = pipe.transformer
    stock, before = generate(pipe), dict(transformer.attn_processors)
    made = processors(transformer, TopBlocks(keep=0.5), min_tokens=0)
    assert made.keys() == before.keys()
    changed = {name for name in made if made[name] is not before[name]}
    assert changed == {name for name in before if ".attn1." in name}
    assert all(transformer.attn_processors[name] is before[name] for name in before)
    assert torch.equal(generate(pipe), stock)  # the hooks are inert while none of ours is set
    transformer.set_attn_processor(made)
    assert not made  # diffusers empties the dict it gets
    assert not torch.equal(generate(pipe), stock)
    assert summary(transformer).sparse_calls > 0
    transformer.set_attn_processor(dict(before))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(generate(pipe), stock)


def test_attach_binds_to_one_pipeline(pipe: Any) -> None:
    stock = generate(pipe)
    assert attach(pipe) is pipe
    assert torch.equal(generate(pipe), stock)
    pipe.set_attn_processor(TopBlocks(keep=0.5), min_tokens=0)
    assert not torch.equal(generate(pipe), stock)
    assert summary(pipe).sparse_calls > 0
    pipe.set_attn_processor("balanced")  # replaces
    assert summary(pipe).plan == "balanced"
    assert not hasattr(type(pipe), "set_attn_processor")
    disable(pipe)
    assert torch.equal(generate(pipe), stock)
    pipe.set_attn_processor(TopBlocks(keep=0.5), min_tokens=0)
    assert not torch.equal(generate(pipe), stock)


def test_both_experts_and_missing_ones() -> None:
    pipe = wan(experts=2)
    enable(pipe, Plan((Rule(TopBlocks(keep=0.5), transformer="transformer_2"),)), min_tokens=0)
    generate(pipe, steps=6)
    layers = {layer.name: (layer.sparse_calls, layer.dense_calls) for layer in summary(pipe).layers}
    assert all((sparse_calls > 0) == name.startswith("transformer_2.") for name, (sparse_calls, _) in layers.items())
    assert len(layers) == 4
    assert all(sum(calls) > 0 for calls in layers.values())
    disable(pipe)
    pipe.transformer = None  # diffusers allows either expert to be absent
    enable(pipe, TopBlocks(keep=0.5), min_tokens=0)
    assert isinstance(pipe.transformer_2.blocks[0].attn1.processor, SparseProcessor)
    disable(pipe)


def test_summary_needs_something_enabled(pipe: Any) -> None:
    with pytest.raises(ValueError, match="not enabled"):
        summary(pipe)


class Foreign:
    """A processor that hides its attention call in a helper."""

    def __call__(self, attn: Any, hidden_states: torch.Tensor, *rest: Any) -> torch.Tensor:
        return hidden_states


def test_unknown_processors_are_left_alone_and_listed() -> None:
    pipe = wan()
    foreign = pipe.transformer.blocks[1].attn1.processor = Foreign()
    enable(pipe, TopBlocks(keep=0.5), min_tokens=0)
    generate(pipe, steps=1)
    assert pipe.transformer.blocks[1].attn1.processor is foreign
    assert summary(pipe).unknown == ("blocks.1.attn1 (Foreign)",)
    assert "Foreign" in str(summary(pipe))
    assert [layer.sparse_calls > 0 for layer in summary(pipe).layers] == [True, False]
    disable(pipe)
    pipe.transformer.blocks[0].attn1.processor = Foreign()
    with pytest.raises(ValueError, match="Foreign calls neither"):
        enable(pipe, TopBlocks(keep=0.5))


def test_fusing_before_works_and_after_is_told_once(pipe: Any) -> None:
    transformer = pipe.transformer
    enable(pipe, TopBlocks(keep=0.5), min_tokens=0)
    reference = generate(pipe)
    transformer.fuse_qkv_projections()
    if isinstance(transformer.get_submodule(find_hook(transformer).layers[0]).processor, SparseProcessor):
        torch.testing.assert_close(generate(pipe), reference, rtol=1e-3, atol=1e-3)  # Wan keeps its processors
        return
    with pytest.warns(UserWarning, match=r"2 of 2 sparse processors .* were replaced"):
        generate(pipe)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        generate(pipe)
    disable_and_enable(pipe)
    torch.testing.assert_close(generate(pipe), reference, rtol=1e-3, atol=1e-3)
    assert summary(pipe).sparse_calls > 0


def disable_and_enable(pipe: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        disable(pipe)
    enable(pipe, TopBlocks(keep=0.5), min_tokens=0)


# what, the spec, and words of the message
@pytest.mark.parametrize(
    ("spec", "options", "message"),
    [
        ("no-such-preset", {}, "unknown plan"),
        (TopBlocks(keep=0.5), {"backend": "abacus"}, "backend must be one of"),
        (TopBlocks(keep=0.5), {"dense_steps": 1.5}, "dense_steps"),
        (TopBlocks(keep=0.5), {"min_tokens": -1}, "min_tokens"),
        (Plan((Rule(TopBlocks(keep=0.5), heads=(7,)),)), {}, "head 7 does not exist"),
        (Plan((Rule(TopBlocks(keep=0.5), layers=(2,)),)), {}, "layer 2 does not exist"),
    ],
)
def test_errors_change_nothing(pipe: Any, spec: Any, options: dict[str, Any], message: str) -> None:
    before = objects(pipe)
    with pytest.raises(ValueError, match=message):
        enable(pipe, spec, **options)
    with pytest.raises(ValueError, match=message), sparse(pipe, spec, **options):
        pass
    with pytest.raises(ValueError, match=message):
        processors(pipe.transformer, spec, **options)
    with pytest.raises(FileNotFoundError):
        enable(pipe, Path("no/such/plan.json"))
    assert objects(pipe) == before


def test_a_plan_that_fits_one_expert_only_changes_neither() -> None:
    pipe = wan(experts=2)
    pipe.transformer_2 = wan(layers=1).transformer
    with pytest.raises(ValueError, match="layer 1 does not exist"):
        enable(pipe, Plan((Rule(TopBlocks(keep=0.5), layers=(1,)),)))
    assert not isinstance(pipe.transformer.blocks[0].attn1.processor, SparseProcessor)
    assert find_hook(pipe.transformer) is None
    assert find_hook(pipe.transformer_2) is None


def test_models_without_known_layers() -> None:
    unet = UNet2DModel(
        block_out_channels=(8,), norm_num_groups=4, down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",)
    )
    for function in (enable, processors):
        with pytest.raises(ValueError, match=r"without known layers: found UNet2DModel; .*docs/models.md.* grid=Grid"):
            function(unet, "balanced")
    with pytest.raises(ValueError, match="pipe must be a diffusers pipeline or a transformer, got str"):
        enable("pipe", "balanced")
    with pytest.raises(ValueError, match="takes one transformer, got WanPipeline"):
        processors(wan(), "balanced")


def test_a_subclass_of_a_known_transformer_is_known() -> None:
    pipe = cogvideox()
    pipe.transformer.__class__ = type("MyTransformer", (type(pipe.transformer),), {})
    enable(pipe, TopBlocks(keep=0.5), min_tokens=0)
    generate(pipe, steps=1)
    assert summary(pipe).sparse_calls > 0


def test_two_pipelines_in_turns() -> None:
    """Plans, grids and records of two pipelines in one process never mix."""
    pipes = {name: make() for name, make in PIPELINES.items()}
    plans = {"wan": TopBlocks(keep=0.5), "cogvideox": Neighborhood(window=0.5)}
    alone = {}
    for name, pipe in pipes.items():
        with sparse(pipe, plans[name], min_tokens=0):
            alone[name] = generate(pipe)
    for name, pipe in pipes.items():
        enable(pipe, plans[name], min_tokens=0)
    inner: list[torch.Tensor] = []

    def run_the_other(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        inner.append(generate(pipes["cogvideox"]))
        return tensors

    outer = generate(pipes["wan"], callback_on_step_end=run_the_other)
    assert torch.equal(outer, alone["wan"])
    assert len(inner) == 3
    assert all(torch.equal(one, alone["cogvideox"]) for one in inner)
    assert {name: summary(pipe).plan for name, pipe in pipes.items()} == {
        "wan": "topblocks",
        "cogvideox": "neighborhood",
    }
