"""The online choice between spatial and temporal heads: who chooses what, and what the kernel then sees."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import dit_sparse as ds
from dit_sparse.patterns import PatternState
from dit_sparse.runner import exact_attention
from dit_sparse.selection import Selection

GRID = ds.Grid(8, 12, 16, prefix=3, suffix=40)
SHARP = 12.0


def choose(
    pattern: ds.AutoFrames, q: Tensor, k: Tensor, v: Tensor, kv_lengths: Tensor | None = None, seed: int = 0
) -> Selection:
    layout = pattern.token_order().layout(GRID)
    q, k, v = layout.to_kernel(q), layout.to_kernel(k), layout.to_kernel(v)
    exact = exact_attention(k, v, layout, 1.0, kv_lengths, "auto", {})
    return pattern.select(q, k, GRID, PatternState(layout, 1.0, kv_lengths=kv_lengths, seed=seed, exact=exact))


def looking(along: str, dim: int = 24) -> Tensor:
    """Make queries that are their own keys [N, D], equal for all tokens of a frame (space) or of a place (time)."""
    count = GRID.frames if along == "space" else GRID.frame_tokens
    code = torch.nn.functional.normalize(torch.randn(count, dim), dim=-1) * SHARP**0.5
    video = code.repeat_interleave(GRID.frame_tokens, 0) if along == "space" else code.repeat(GRID.frames, 1)
    return torch.cat([torch.zeros(GRID.prefix, dim), video, torch.zeros(GRID.suffix, dim)])


@pytest.mark.parametrize("sink", [False, True])
def test_each_head_gets_the_mask_that_suits_it(sink: bool) -> None:
    kinds = ["space", "time", "time", "space", "time"]
    x = torch.stack([torch.stack([looking(kind) for kind in kinds], 1) for _ in range(2)])
    v = torch.randn_like(x)
    pattern = ds.AutoFrames(0.12, sink)
    found = choose(pattern, x, x, v)
    assert found.indices.head_of.tolist() == [kind == "time" for kind in kinds] * 2
    assert found.head_order is not None
    identity = torch.arange(GRID.video_tokens)
    for batch, head in [(b, h) for b in range(2) for h in range(5)]:
        own = found.head_order.q[batch, head]
        assert torch.equal(own, identity) == (kinds[head] == "space")
        assert torch.equal(own.sort().values, identity)
        row = int(found.indices.head_of[batch * 5 + head])
        mask = found.indices.token_mask(row)[: GRID.video_tokens, : GRID.video_tokens]
        expected = torch.zeros_like(mask)
        expected[own[:, None], own] = mask
        video = slice(GRID.prefix, GRID.prefix + GRID.video_tokens)
        assert torch.equal(expected, pattern.candidates()[row].token_mask(GRID)[video, video])
        assert float(found.kept_pairs[batch * 5 + head]) == int(mask.sum())
    assert float(found.visited_pairs.max()) < 0.7 * GRID.video_tokens**2, "the sink must not touch every block"


def test_heads_that_share_keys_share_the_choice() -> None:
    """Two query heads read each key head; the one with the larger error decides."""
    k = torch.stack([looking("time"), looking("space")], 1)[None]
    q = torch.stack([k[:, :, 0], k[:, :, 0] * 0, k[:, :, 1] * 0, k[:, :, 1]], 2)
    found = choose(ds.AutoFrames(0.12), q, k, torch.randn_like(k))
    assert found.indices.head_of.tolist() == [1, 1, 0, 0]
    assert found.head_order is not None
    assert found.head_order.q.shape == (1, 4, GRID.video_tokens)
    assert found.head_order.k.shape == (1, 2, GRID.video_tokens)
    for head in range(4):
        assert torch.equal(found.head_order.q[0, head], found.head_order.k[0, head // 2])


def test_the_choice_is_the_smaller_error_by_hand() -> None:
    """All rows sampled: the choice is that of two whole masked attentions."""
    pattern = ds.AutoFrames(0.1, rows=10**6)  # cut to the video's tokens
    mixed = [looking("space") + looking("time") * share for share in (0.7, 0.9, 1.0, 1.1, 1.4)]
    x = torch.stack(mixed, 1)[None]
    v = torch.randn_like(x)
    video = slice(GRID.prefix, GRID.prefix + GRID.video_tokens)
    logits = torch.einsum("bqhd,bkhd->bhqk", x[:, video].double(), x.double())
    exact = torch.einsum("bhqk,bkhd->bhqd", logits.softmax(-1), v.double())
    errors = []
    for candidate in pattern.candidates():
        seen = candidate.token_mask(GRID)[video]
        out = torch.einsum("bhqk,bkhd->bhqd", logits.masked_fill(~seen, -torch.inf).softmax(-1), v.double())
        errors.append((out - exact).square().mean((0, 2, 3)))
    assert choose(pattern, x, x, v).indices.head_of.tolist() == (errors[1] < errors[0]).int().tolist()


def test_hidden_text_has_no_say() -> None:
    x = torch.stack([looking("time"), looking("space")], 1)[None]
    v = torch.randn_like(x)
    visible = GRID.tokens - 30
    loud, loud_v = x.clone(), v.clone()
    loud[:, visible:], loud_v[:, visible:] = 1e3, 1e6
    found = choose(ds.AutoFrames(0.12), x, loud, loud_v, torch.tensor([visible], dtype=torch.int32))
    assert found.indices.head_of.tolist() == [1, 0]


def test_ties_stay_spatial_and_other_seeds_draw_other_rows() -> None:
    q, k, v = (torch.randn(1, GRID.tokens, 3, 8) for _ in range(3))
    assert choose(ds.AutoFrames(1.0), q, k, v).indices.head_of.tolist() == [0, 0, 0]
    many = [choose(ds.AutoFrames(0.12, rows=1), q, k, v, seed=seed).indices.head_of.tolist() for seed in range(24)]
    assert len({tuple(one) for one in many}) > 1, "one row of noise cannot always say the same"


def test_masks_are_built_once() -> None:
    pattern = ds.AutoFrames(0.12)
    layout = pattern.token_order().layout(GRID)
    shared: dict[object, object] = {}
    found = []
    for _ in range(2):
        q, k, v = (torch.randn(1, GRID.tokens, 2, 8) for _ in range(3))
        state = PatternState(layout, 1.0, shared=shared, exact=exact_attention(k, v, layout, 1.0, None, "auto", shared))
        found.append(pattern.select(q, k, GRID, state).indices.bits)
    assert found[0] is found[1]


def test_exact_rows_are_needed() -> None:
    pattern = ds.AutoFrames()
    layout = pattern.token_order().layout(GRID)
    q = torch.randn(1, GRID.tokens, 1, 8)
    with pytest.raises(ValueError, match=r"needs PatternState\.exact"):
        pattern.select(q, q, GRID, PatternState(layout, 1.0))
