"""Masks of padded text become lengths, and only masks that are nothing else."""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dit_sparse.attention import Layer, dense_attention
from dit_sparse.grid import Grid
from dit_sparse.options import Options
from dit_sparse.padding import HIDDEN, Padding, TensorSources, read_padding
from dit_sparse.patterns import AutoFrames, Cached, Dense, Neighborhood, Pattern, Skip, StaticPattern, TopBlocks
from dit_sparse.plan import Plan, Rule
from dit_sparse.schedule import Schedule

GRID = Grid(3, 8, 9, prefix=11, suffix=7)  # 216 video tokens: two blocks, the second one short
VIDEO = slice(GRID.prefix, GRID.prefix + GRID.video_tokens)


def key_mask(text: Tensor) -> Tensor:
    """Return bool [B, N] from which text tokens are real, bool [B, prefix + suffix]."""
    seen = torch.ones(len(text), GRID.tokens, dtype=torch.bool)
    seen[:, : GRID.prefix], seen[:, VIDEO.stop :] = text[:, : GRID.prefix], text[:, GRID.prefix :]
    return seen


def forms(seen: Tensor) -> dict[str, Tensor]:
    """Write one key mask in every form that models use."""
    additive = torch.zeros(seen.shape).masked_fill(~seen, HIDDEN)
    return {
        "flat": seen,
        "key": seen[:, None, None],
        "rows": seen[:, None, None].expand(-1, 1, GRID.tokens, -1).contiguous(),
        "outer": seen[:, None, :, None] & seen[:, None, None],
        "expanded": seen[:, None, None].expand(-1, 5, GRID.tokens, -1),
        "additive": additive[:, None, None],
        "minus infinity": additive[:, None, None].masked_fill(~seen[:, None, None], -torch.inf),
    }


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_every_form_gives_the_real_keys(data: st.DataObject) -> None:
    """Whatever text is padding, and however a mask says so: the keys that remain are the real ones, as a set."""
    text = torch.tensor(data.draw(st.lists(st.lists(st.booleans(), min_size=18, max_size=18), min_size=1, max_size=3)))
    seen = key_mask(text)
    names = torch.arange(GRID.tokens).view(1, -1, 1, 1).expand(len(seen), -1, 1, 1)  # each key carries its own number
    in_kernel_order = torch.cat([names[:, VIDEO], names[:, : VIDEO.start], names[:, VIDEO.stop :]], 1)
    for form, mask in forms(seen).items():
        padding = read_padding(mask, GRID, len(seen))
        assert isinstance(padding, Padding), form
        assert padding.lengths == tuple(seen.sum(1).tolist())
        assert padding.on_device.tolist() == list(padding.lengths)
        for b, part in enumerate(padding.split()):
            real = seen[b].nonzero().flatten().tolist()
            kept = part.real_first(in_kernel_order[b : b + 1])[0, : part.lengths[0]].flatten()
            assert sorted(kept.tolist()) == real
            assert kept[: GRID.video_tokens].tolist() == list(range(VIDEO.start, VIDEO.stop))
            assert sorted(part.trimmed(names[b : b + 1], part.lengths[0]).flatten().tolist()) == real


def test_text_at_the_end_needs_no_reordering() -> None:
    text = torch.ones(2, 18, dtype=torch.bool)
    text[0, 14:] = text[1, 11:] = False
    padding = read_padding(key_mask(text), GRID, 2)
    assert isinstance(padding, Padding)
    assert padding.text_order is None
    assert padding.lengths == (216 + 14, 216 + 11)
    assert padding.length is None
    short = read_padding(torch.tensor([[True, True, False]]), Grid(3, 8, 9, suffix=3), 1)
    assert isinstance(short, Padding)  # the mask of the last tokens alone, as HunyuanVideo-1.5 has it
    assert short.lengths == (218,)


def with_hole(mask: Tensor, row: int, column: int, value: float) -> Tensor:
    mask = mask.clone()
    mask[..., row, column] = value
    return mask


# each is a mask that no length can stand for
@pytest.mark.parametrize(
    ("mask", "reason"),
    [
        (torch.ones(GRID.tokens, GRID.tokens, dtype=torch.bool).tril()[None, None], "hides or weighs video tokens"),
        (with_hole(torch.ones(1, 1, 1, GRID.tokens, dtype=torch.bool), 0, 50, 0), "hides or weighs video tokens"),
        (with_hole(with_hole(torch.zeros(1, 1, 1, GRID.tokens), 0, 3, -1.0), 0, 4, -2.0), "several biases"),
        (with_hole(torch.zeros(1, 1, 1, GRID.tokens), 0, 50, -1.0), "hides or weighs video tokens"),
        (with_hole(torch.ones(1, 1, GRID.tokens, GRID.tokens, dtype=torch.bool), 200, 2, 0), "between video tokens"),
        (torch.ones(1, 4, 1, GRID.tokens, dtype=torch.bool), "shape"),
        (torch.ones(3, 1, 1, GRID.tokens, dtype=torch.bool), "shape"),
        (torch.ones(1, 1, 9, GRID.tokens, dtype=torch.bool), "shape"),
        (torch.ones(1, 1, 1, GRID.tokens + 1, dtype=torch.bool), "shape"),
        (torch.ones(GRID.tokens, dtype=torch.bool), "shape"),
    ],
)
def test_other_masks_are_refused(mask: Tensor, reason: str) -> None:
    found = read_padding(mask, GRID, 2)
    assert isinstance(found, str)
    assert reason in found


@pytest.mark.parametrize("pattern", [Dense(), Neighborhood(window=0.6)])
@pytest.mark.parametrize("queries", ["all", "video"])
def test_padded_calls_agree_with_a_masked_call(pattern: Pattern, queries: str) -> None:
    """Keys that are padding hold NaN: nothing may read them."""
    text = torch.rand(2, 18) < 0.6
    text[:, 0] = True
    seen = key_mask(text)
    schedule = Schedule(Plan.of(pattern), options=Options(min_tokens=0, strict=True))
    layer = Layer("layer", 0, schedule, dense_attention)
    schedule.start_forward(GRID, mask_source=object())
    q, k, v = (torch.randn(2, GRID.tokens, 3, 16) for _ in range(3))
    q = q if queries == "all" else q[:, VIDEO]
    rows = seen if queries == "all" else seen[:, VIDEO]
    allowed = pattern.token_mask(GRID) if queries == "all" else pattern.token_mask(GRID)[VIDEO]  # type: ignore[attr-defined]
    exact = dense_attention(q.double(), k.double(), v.double(), (allowed & seen[:, None, :])[:, None])
    poisoned_k, poisoned_v = (x.masked_fill(~seen[:, :, None, None], torch.nan) for x in (k, v))
    out = layer.schedule.attend(layer, q, poisoned_k, poisoned_v, seen[:, None, None])
    torch.testing.assert_close(out[rows].double(), exact[rows], rtol=1e-5, atol=1e-5)


def outer_bias(seen: Tensor) -> Tensor:
    """Return the mask that Chroma's pipelines make: 1 added where query and key are real, 0 elsewhere."""
    real = seen.float()
    return real[:, None, :, None] * real[:, None, None]


def causal_text(seen: Tensor) -> Tensor:
    """Return the mask of OmniGen: text reads the text before it, the image reads everything real."""
    mask = seen[:, None, None].repeat(1, 1, GRID.tokens, 1)
    mask[:, :, : GRID.prefix] &= torch.ones(GRID.tokens, GRID.tokens, dtype=torch.bool).tril()[: GRID.prefix]
    return mask


@pytest.mark.parametrize("pattern", [Dense(), Neighborhood(window=0.6), Skip()])
@pytest.mark.parametrize("form", [outer_bias, causal_text])
def test_text_may_be_weighed_and_have_rows_of_its_own(pattern: StaticPattern, form: Callable[[Tensor], Tensor]) -> None:
    text = torch.rand(2, 18) < 0.6
    text[:, 0] = True
    seen = key_mask(text)
    mask = form(seen)
    padding = read_padding(mask, GRID, 2)
    assert isinstance(padding, Padding)
    assert padding.own_text_rows
    assert padding.bias == (-1.0 if form is outer_bias else -torch.inf)
    schedule = Schedule(Plan.of(pattern), options=Options(min_tokens=0, strict=True))
    layer = Layer("layer", 0, schedule, dense_attention)
    schedule.start_forward(GRID, mask_source=object())
    q, k, v = (torch.randn(2, GRID.tokens, 3, 16) for _ in range(3))
    bias = (
        mask.double() if mask.is_floating_point() else torch.zeros(mask.shape).masked_fill(~mask, -torch.inf).double()
    )
    bias = bias.masked_fill(~pattern.token_mask(GRID), -torch.inf)
    exact = dense_attention(q.double(), k.double(), v.double(), bias).nan_to_num()  # Skip reads nothing: 0
    out = layer.schedule.attend(layer, q, k, v, mask)
    rows = seen if form is causal_text else torch.ones_like(seen)
    torch.testing.assert_close(out[rows].double(), exact[rows], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "pattern", [TopBlocks(1.0, clusters=3), AutoFrames(1.0), TopBlocks(1.0, sinks="none")], ids=str
)
def test_weighed_text_is_read_in_any_order_of_the_heads(pattern: Pattern) -> None:
    mask = outer_bias(key_mask(torch.rand(2, 18) < 0.6))
    schedule = Schedule(Plan.of(pattern), options=Options(min_tokens=0, strict=True))
    schedule.start_forward(GRID, mask_source=object())
    q, k, v = (torch.randn(2, GRID.tokens, 3, 16) for _ in range(3))
    exact = dense_attention(q.double(), k.double(), v.double(), mask.double())
    out = schedule.attend(Layer("layer", 0, schedule, dense_attention), q, k, v, mask)
    torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("compensate", [False, True])
def test_residual_and_monitoring_count_weighed_text(compensate: bool) -> None:
    """Dense is dense with the bias, and what is read of weighed keys is measured as read."""
    seen = key_mask(torch.rand(2, 18) < 0.6)
    mask = outer_bias(seen)
    pattern = Cached(TopBlocks(keep=0.5, compensate=compensate), residual=True)
    schedule = Schedule(Plan.of(pattern), options=Options(min_tokens=0, strict=True, monitor=True))
    layer = Layer("layer", 0, schedule, dense_attention)
    schedule.start_forward(GRID, mask_source=object())
    q, k, v = (torch.randn(2, GRID.tokens, 3, 16) for _ in range(3))
    exact = dense_attention(q.double(), k.double(), v.double(), mask.double())
    torch.testing.assert_close(schedule.attend(layer, q, k, v, mask).double(), exact, rtol=1e-5, atol=1e-5)
    (measured,) = schedule.summary().layers[0].measured
    assert float(measured.error.max()) < 1e-5
    weights = torch.einsum("bqhd,bkhd->bhqk", q.double(), k.double()).mul(0.25).add(mask).softmax(-1)[:, :, VIDEO]
    text = 1 - weights[..., VIDEO].sum(-1).mean((0, 2))
    assert (measured.recall > text + 0.3).all(), "all text is read, and one of two blocks"
    assert (measured.recall < 1 - 0.2).all()


def test_masks_of_all_heads_serve_a_part_of_them() -> None:
    """One head of the plan is dense beside a sparse one, and the mask comes expanded over heads."""
    seen = key_mask(torch.rand(1, 18) < 0.6)
    mask = causal_text(seen).expand(-1, 2, -1, -1)
    schedule = Schedule(Plan((Rule(TopBlocks(keep=1.0), heads=(0,)),)), options=Options(min_tokens=0, strict=True))
    layer = Layer("layer", 0, schedule, dense_attention)
    schedule.start_forward(GRID, mask_source=object())
    q, k, v = (torch.randn(1, GRID.tokens, 2, 16) for _ in range(3))
    exact = dense_attention(q.double(), k.double(), v.double(), mask)
    out = schedule.attend(layer, q, k, v, mask)
    torch.testing.assert_close(out[seen].double(), exact[seen], rtol=1e-5, atol=1e-5)


def test_the_usual_negative_number_hides_in_bfloat16() -> None:
    mask = torch.zeros(1, 1, 1, GRID.tokens, dtype=torch.bfloat16)
    mask[..., :4] = -10000.0
    padding = read_padding(mask, GRID, 1)
    assert isinstance(padding, Padding)
    assert padding.hides
    assert padding.lengths == (GRID.tokens - 4,)


def test_a_mask_is_read_once_for_the_same_tensors() -> None:
    sources = TensorSources()
    mask, other = torch.ones(2, 3), torch.ones(2, 3)
    source = sources.source([mask])
    assert sources.source([mask]) is source
    assert sources.source([other]) is not source
    assert sources.source([mask, other]) is not source
    assert sources.source([mask]) is source
    mask[0, 0] = 0.0  # written to: another mask
    assert sources.source([mask]) is not source
    assert sources.source([]) is not sources.source([])
    with torch.inference_mode():
        untracked = torch.ones(2)
    assert sources.source([untracked]) is not sources.source([untracked])
    fresh = sources.source([other])
    del other
    gc.collect()
    assert all(sources.source([torch.ones(2, 3)]) is not fresh for _ in range(3))  # its memory may be used again


def test_masks_of_unknown_origin_run_dense() -> None:
    schedule = Schedule(Plan.of(Neighborhood(window=0.6)), options=Options(min_tokens=0))
    layer = Layer("layer", 0, schedule, dense_attention)
    schedule.start_forward(GRID)
    q, k, v = (torch.randn(1, GRID.tokens, 2, 16) for _ in range(3))
    mask = key_mask(torch.rand(1, 18) < 0.5)[:, None, None]
    assert torch.equal(schedule.attend(layer, q, k, v, mask), dense_attention(q, k, v, mask))
    assert schedule.summary().dense_reasons == {"attention mask": 1}
