"""Dense means bit-identical; sparse changes what the pattern says, through self-attention, and nothing else."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from dit_sparse.attention import SparseAttention
from dit_sparse.patterns import Neighborhood, Pattern, TopBlocks
from dit_sparse.pipelines.enable import disable, enable, sparse, summary
from dit_sparse.pipelines.processors import SparseProcessor
from dit_sparse.plan import Plan, Rule
from dit_sparse.schedule import StrictError
from tests.pipelines.tiny import SIZE, TEXT_TOKENS, generate


def noise(pipe: Any) -> float:
    """Return how far two dense kernels are apart on this pipeline: the yardstick of every tolerance here."""
    with sdpa_kernel(SDPBackend.MATH):
        math = generate(pipe)
    return float((generate(pipe) - math).abs().max())


def test_dense_plan_is_bit_identical(pipe: Any) -> None:
    stock = generate(pipe)
    enable(pipe, Plan.dense(), min_tokens=0)
    assert torch.equal(generate(pipe), stock)
    assert summary(pipe).sparse_calls == 0
    assert summary(pipe).dense_calls > 0


# each is a fallback by an option, in a plan that wants everything sparse
@pytest.mark.parametrize(
    "options",
    [
        {"min_tokens": 100_000},
        {"min_tokens": None},  # the default is above these tiny grids
        {"min_tokens": 0, "dense_steps": 3},
        {"min_tokens": 0, "dense_steps": 1.0},
        {"min_tokens": 0, "dense_layers": "0-1"},
    ],
)
def test_fallbacks_are_bit_identical(pipe: Any, options: dict[str, Any]) -> None:
    stock = generate(pipe)
    enable(pipe, TopBlocks(keep=0.5), **options)
    assert torch.equal(generate(pipe), stock)
    assert summary(pipe).sparse_calls == 0
    assert summary(pipe).dense_reasons


def test_disable_is_bit_identical(pipe: Any) -> None:
    stock = generate(pipe)
    enable(pipe, TopBlocks(keep=0.5), min_tokens=0)
    generate(pipe)
    disable(pipe)
    assert torch.equal(generate(pipe), stock)


# a token-exact and a block-exact pattern
@pytest.mark.parametrize("pattern", [Neighborhood(window=1.0), TopBlocks(keep=1.0)])
def test_keep_everything_runs_the_sparse_kernel(pipe: Any, pattern: Pattern) -> None:
    stock, tolerance = generate(pipe), 8 * noise(pipe)
    enable(pipe, pattern, min_tokens=0)
    out = generate(pipe)
    assert summary(pipe).dense_calls == 0
    assert summary(pipe).sparse_calls > 0
    assert 0 < tolerance < 1e-3
    assert float((out - stock).abs().max()) <= tolerance


def test_sparse_is_stock_with_a_masked_self_attention(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compare with the stock pipeline whose self-attention calls alone get the pattern's mask, text all True."""
    pattern = Neighborhood(window=(3, 0.5, 5))
    stock, tolerance = generate(pipe), 8 * noise(pipe)
    with sparse(pipe, pattern, min_tokens=0):
        out = generate(pipe)
        grid = next(iter(schedules(pipe))).grid
    mask = pattern.token_mask(grid)
    assert mask[: grid.prefix].all()
    assert mask[:, : grid.prefix].all()
    sdpa = F.scaled_dot_product_attention

    def masked(query: Any, key: Any, value: Any, attn_mask: Any = None, *args: Any, **kwargs: Any) -> Any:
        if query.shape[2] == key.shape[2] == grid.tokens:
            assert attn_mask is None
            attn_mask = mask
        return sdpa(query, key, value, attn_mask, *args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", masked)
    oracle = generate(pipe)
    assert float((out - stock).abs().max()) > 1000 * tolerance
    assert float((out - oracle).abs().max()) <= tolerance


def schedules(pipe: Any) -> set[Any]:
    found = {getattr(module, "processor", None) for module in pipe.transformer.modules()}
    return {one.sparse_layer.schedule for one in found if isinstance(one, SparseProcessor)}


def test_only_self_attention_is_touched(pipe: Any) -> None:
    before = dict(pipe.transformer.attn_processors)
    enable(pipe, TopBlocks(keep=0.5), min_tokens=0)
    changed = {name for name, now in pipe.transformer.attn_processors.items() if now is not before[name]}
    assert changed == {name for name in before if ".attn1." in name} != set()


def test_text_rows_are_exact() -> None:
    """CogVideoX holds its text in the same sequence: its rows read everything, everything reads it."""
    from tests.pipelines.tiny import cogvideox

    pipe = cogvideox(layers=1)
    rows: list[torch.Tensor] = []
    handle = pipe.transformer.transformer_blocks[0].attn1.register_forward_hook(lambda *call: rows.append(call[2][1]))
    generate(pipe, steps=1)
    with sparse(pipe, Neighborhood(window=1), min_tokens=0):
        generate(pipe, steps=1)
    handle.remove()
    dense_text, sparse_text = rows
    assert dense_text.shape[:2] == (2, TEXT_TOKENS)
    torch.testing.assert_close(sparse_text, dense_text, rtol=1e-5, atol=1e-5)


def test_heads_of_one_layer_may_differ(pipe: Any) -> None:
    """Head 0 keeps everything, head 1 is dense by the plan: the result is dense to rounding."""
    stock, tolerance = generate(pipe), 8 * noise(pipe)
    enable(pipe, Plan((Rule(TopBlocks(keep=1.0), heads=(0,)),)), min_tokens=0)
    assert float((generate(pipe) - stock).abs().max()) <= tolerance
    assert summary(pipe).sparse_calls > 0


def forward(transformer: Any, **more: Any) -> torch.Tensor:
    """Call a transformer by hand, outside any pipeline."""
    torch.manual_seed(1)
    axes = (1, 4, 4, 16, 16)  # frames and channels are both 4, so it serves both orders
    inputs = {"hidden_states": torch.randn(axes), "encoder_hidden_states": torch.randn(1, TEXT_TOKENS, 32)}
    if type(transformer).__name__.startswith("CogVideoX"):
        inputs["image_rotary_emb"] = (torch.randn(256, 16), torch.randn(256, 16))
    return transformer(**inputs, timestep=torch.tensor([500]), return_dict=False, **more)[0]


def test_gradients_take_the_stock_call(pipe: Any) -> None:
    transformer = pipe.transformer
    stock = forward(transformer)
    (stock_gradient,) = torch.autograd.grad(stock.sum(), [next(transformer.parameters())])
    enable(transformer, TopBlocks(keep=0.5), min_tokens=0)
    out = forward(transformer)
    assert torch.equal(out, stock)
    assert torch.equal(torch.autograd.grad(out.sum(), [next(transformer.parameters())])[0], stock_gradient)
    assert [reason for reason in summary(transformer).dense_reasons if "gradients" in reason]
    with torch.no_grad():
        assert not torch.equal(forward(transformer), stock)


def test_context_parallel_takes_the_stock_call(monkeypatch: pytest.MonkeyPatch) -> None:
    from dit_sparse.pipelines import compat
    from tests.pipelines.tiny import wan

    seen: list[Any] = []
    stock_dispatch = compat.dispatch_attention_fn

    def dispatch(*args: Any, parallel_config: Any = None, **kwargs: Any) -> Any:
        seen.append(parallel_config)
        return stock_dispatch(*args, **kwargs)

    monkeypatch.setattr(compat, "dispatch_attention_fn", dispatch)
    pipe = wan()
    stock = generate(pipe)
    enable(pipe, TopBlocks(keep=0.5), min_tokens=0)
    config = object()
    for block in pipe.transformer.blocks:
        block.attn1.processor._parallel_config = config  # as enable_parallelism() does
    assert torch.equal(generate(pipe), stock)
    assert summary(pipe).dense_reasons == {"context parallel": 12}
    assert seen == [config] * 12
    disable(pipe)
    assert pipe.transformer.blocks[0].attn1.processor._parallel_config is config


def test_masks_run_dense() -> None:
    """CogVideoX's processor takes a mask; the pipeline never gives one, a caller may."""
    from tests.pipelines.tiny import cogvideox

    transformer = cogvideox(layers=1).transformer
    enable(transformer, TopBlocks(keep=0.5), min_tokens=0)
    block = transformer.transformer_blocks[0]
    stock_block = copy.deepcopy(block)
    stock_block.attn1.processor = block.attn1.processor.stock_processor
    mask = torch.zeros(1, 256 + TEXT_TOKENS)
    mask[:, -100:] = -1e4
    video, text = torch.randn(1, 256, 32), torch.randn(1, TEXT_TOKENS, 32)
    with torch.no_grad():
        forward(transformer)  # tells the grid
        out = block.attn1(video, text, attention_mask=mask)
        stock = stock_block.attn1(video, text, attention_mask=mask)
    assert torch.equal(out[0], stock[0])
    assert torch.equal(out[1], stock[1])
    assert "attention mask" in summary(transformer).dense_reasons


def test_strict_raises_instead_of_falling_back(pipe: Any) -> None:
    enable(pipe.transformer, TopBlocks(keep=0.5), min_tokens=0, strict=True)
    with pytest.raises(StrictError, match="gradients"):
        forward(pipe.transformer)


def test_batch_of_prompts_agrees_with_single_ones(pipe: Any) -> None:
    """Selections are per sample: a batch of two equals two runs."""
    enable(pipe, TopBlocks(keep=0.5), min_tokens=0)
    prompts = ["a red ball", "a dog on blue sky"]
    common = {"num_inference_steps": 2, "output_type": "latent", "max_sequence_length": TEXT_TOKENS, **SIZE}
    latents = torch.randn(2, 4, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    both = pipe(prompts, latents=latents.clone(), **common).frames
    for i, prompt in enumerate(prompts):
        one = pipe(prompt, latents=latents[i : i + 1].clone(), **common).frames
        torch.testing.assert_close(both[i : i + 1], one, rtol=1e-4, atol=1e-4)


def test_function_form_agrees_with_the_layer(pipe: Any) -> None:
    """The op inside the model and the function for everyone else compute the same."""
    seen: list[Any] = []
    enable(pipe, Neighborhood(window=0.5), min_tokens=0)
    (schedule,) = schedules(pipe)
    attend = schedule.attend

    def record(layer: Any, q: Any, k: Any, v: Any, *args: Any) -> Any:
        seen.append((q, k, v, schedule._moment.grid_of(q.shape[1], k.shape[1]), attend(layer, q, k, v, *args)))
        return seen[-1][-1]

    schedule.attend = record
    generate(pipe, steps=1)
    q, k, v, grid, out = seen[0]
    assert torch.equal(SparseAttention(Neighborhood(window=0.5))(q, k, v, grid), out)
