"""Every pattern against a definition written a second time, slowly, and its blocks against its token mask."""

from __future__ import annotations

import copy
import itertools
import json
import math
import pickle

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

import dit_sparse as ds
from dit_sparse.patterns import PATTERNS, PatternState, StaticPattern, pattern_from_dict, pattern_from_text
from dit_sparse.patterns.base import static_selection, variant_of
from dit_sparse.runner import exact_attention
from tests.core.examples import EXAMPLES

ALL = [pattern for patterns in EXAMPLES.values() for pattern in patterns]
STATIC = [pattern for pattern in ALL if isinstance(pattern, StaticPattern)]
# Primes, axes of size 1 and text before, after, both or none.
GRIDS = st.builds(
    ds.Grid, st.integers(1, 7), st.integers(1, 11), st.integers(1, 13), prefix=st.sampled_from([0, 5]),
    suffix=st.sampled_from([0, 130]),
)  # fmt: skip


def test_every_pattern_of_the_table_has_examples() -> None:
    assert set(EXAMPLES) == set(PATTERNS)
    for name, patterns in EXAMPLES.items():
        assert {type(pattern) for pattern in patterns} == {PATTERNS[name]}


@pytest.mark.parametrize("pattern", ALL, ids=str)
def test_json_and_text_round_trip(pattern: ds.Pattern) -> None:
    assert pattern_from_dict(json.loads(json.dumps(pattern.to_dict()))) == pattern
    assert pattern_from_text(str(pattern)) == pattern


def test_tokens_and_shares_are_not_the_same_pattern() -> None:
    """1 == 1.0 in Python; one token is not the whole axis. Heads are grouped, and masks kept, by equality."""
    space, time = ds.Neighborhood(window=(1, 1.0, 1.0)), ds.Neighborhood(window=(1.0, 1, 1))
    assert space != time
    assert ds.Stripes(width=1) != ds.Stripes(width=1.0)
    assert ds.Cached(ds.TopBlocks(0.3)) == ds.Cached(ds.TopBlocks(0.3)) != ds.Cached(ds.TopBlocks(0.4))
    assert len({space, time, ds.Neighborhood(window=(1, 1.0, 1.0))}) == 2
    assert copy.deepcopy(space) == pickle.loads(pickle.dumps(space)) == space


def fits(pattern: ds.Pattern, grid: ds.Grid) -> bool:
    try:
        pattern.check(grid)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize("pattern", STATIC, ids=str)
@settings(max_examples=25, deadline=None)
@given(grid=GRIDS)
def test_blocks_equal_the_token_definition(pattern: StaticPattern, grid: ds.Grid) -> None:
    assume(fits(pattern, grid))
    layout = pattern.token_order().layout(grid)
    selection = static_selection(pattern, grid, layout)
    order = torch.arange(grid.tokens) if layout.order is None else layout.order
    expected = pattern.token_mask(grid)
    assert torch.equal(selection.indices.token_mask(0), expected[order][:, order])
    video = expected[grid.prefix : grid.prefix + grid.video_tokens, grid.prefix : grid.prefix + grid.video_tokens]
    assert float(selection.kept_pairs) == int(video.sum())
    assert float(selection.visited_pairs) >= float(selection.kept_pairs)


def test_cached_selects_again_after_refresh_steps() -> None:
    pattern, grid = ds.Cached(ds.TopBlocks(keep=0.25, order="raster"), refresh_steps=3), ds.Grid(8, 8, 16)
    layout, memory = pattern.token_order().layout(grid), {}
    chosen = []
    for step in (0, 1, 2, 3, 4, 9, 1):
        q, k = (torch.randn(1, grid.tokens, 1, 8) for _ in range(2))
        chosen.append(pattern.select(q, k, grid, PatternState(layout, 1.0, step, {}, memory)))
    reused = [later is earlier for earlier, later in itertools.pairwise(chosen)]
    assert reused == [True, True, False, True, False, False], "fresh at steps 3, 9 and when the step goes back"


def visible(
    pattern: ds.Pattern, grid: ds.Grid, q: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, list[tuple[int, int, float, Tensor, Tensor]]]:
    """Return the mask of each of B * H heads, bool [B*H, N, N] in the grid's order, and what stands for skipped blocks.

    The latter: (head, query, log of the tokens, mean key, mean value) for every query and block that it skips.
    """
    batch, heads = q.shape[0], q.shape[2]
    if isinstance(pattern, StaticPattern):
        variants = [one.token_mask(grid) for one in pattern.variants(grid)]
        return torch.stack(
            [variants[variant_of(head % heads, heads, len(variants))] for head in range(batch * heads)]
        ), []
    layout = pattern.token_order().layout(grid)
    order = torch.arange(grid.tokens) if layout.order is None else layout.order
    q, k, v = q[:, order], k[:, order], v[:, order]
    exact = exact_attention(k, v, layout, q.shape[-1] ** -0.5, None, "cpu", {})
    selection = pattern.select(q, k, grid, PatternState(layout, q.shape[-1] ** -0.5, v=v, exact=exact))
    mask, means = torch.empty(batch * heads, grid.tokens, grid.tokens, dtype=torch.bool), []
    for head, row in enumerate(selection.indices.head_of.tolist()):
        own_q, own_k = torch.arange(grid.tokens), torch.arange(grid.tokens)
        if selection.head_order is not None:
            own_q[: grid.video_tokens] = selection.head_order.q[head // heads, head % heads]
            own_k[: grid.video_tokens] = selection.head_order.k[head // heads, head % heads]
        seen = selection.indices.token_mask(row)
        mask[head][order[own_q][:, None], order[own_k]] = seen
        if selection.compensate:
            blocks = zip(selection.indices.kv_start.tolist(), selection.indices.kv_len.tolist(), strict=True)
            for at, count in blocks:
                key, value = (x[head // heads, own_k[at : at + count], head % heads].double().mean(0) for x in (k, v))
                skipped = order[own_q[~seen[:, at]]].tolist()
                means += [(head, query, math.log(count), key, value) for query in skipped]
    return mask, means


@pytest.mark.parametrize("grid", [ds.Grid(3, 7, 11, suffix=9), ds.Grid(2, 9, 16, prefix=3)], ids=str)
@pytest.mark.parametrize("pattern", [one for one in ALL if not getattr(one, "residual", False)], ids=str)
def test_attention_equals_the_masked_oracle(pattern: ds.Pattern, grid: ds.Grid) -> None:
    """Check all but `residual`, whose first call is dense by intent: tests/core/test_cached.py looks at that."""
    q, k, v = (torch.randn(2, grid.tokens, 4, 24) for _ in range(3))
    mask, means = visible(pattern, grid, q, k, v)
    logits = torch.einsum("bqhd,bkhd->bhqk", q.double(), k.double()).flatten(0, 1) * 24**-0.5
    weights = logits.masked_fill(~mask, -torch.inf).exp()
    values = weights @ v.double().transpose(1, 2).flatten(0, 1)
    total = weights.sum(-1)
    for head, query, log_count, key, value in means:
        weight = torch.exp(q[head // 4, query, head % 4].double() @ key * 24**-0.5 + log_count)
        values[head, query] += weight * value
        total[head, query] += weight
    expected = (values / total[..., None]).nan_to_num().unflatten(0, (2, 4)).transpose(1, 2)
    out, lse = ds.sparse_attention(q, k, v, pattern, grid, backend="cpu", return_lse=True)
    assert (out - expected).abs().max() < 1e-5
    torch.testing.assert_close(lse, total.log().unflatten(0, (2, 4)).transpose(1, 2).float(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ds.TopBlocks(keep=0), "keep"),
        (lambda: ds.TopBlocks(keep=1.2), "keep"),
        (lambda: ds.Cached(pattern="topblocks"), "Pattern"),
        (lambda: ds.Cached(ds.TopBlocks(), refresh_steps=0), "refresh_steps"),
        (lambda: pattern_from_text("cached:refresh_steps=2"), "needs the field 'pattern'"),
        (lambda: pattern_from_text("topblock"), "did you mean 'topblocks'\\?; known: dense"),
        (lambda: pattern_from_text("topblocks:kep=0.2"), "no field 'kep'; did you mean 'keep'"),
        (lambda: pattern_from_text("topblocks:0.2"), "name=value"),
        (lambda: pattern_from_text("topblocks:keep=much"), "keep"),
        (lambda: pattern_from_dict({"keep": 0.2}), "name"),
        (lambda: pattern_from_dict({"name": "topblocks", "order": 3}), "token order must be text"),
        (lambda: pattern_from_dict({"name": "neighborhood", "order": ["tile", 2, 2]}), "token order must be text"),
    ],
)
def test_bad_configurations_are_refused(build: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()  # type: ignore[operator]


def test_patterns_are_read_from_text() -> None:
    assert pattern_from_text("neighborhood:window=5x0.5x0.25,stride=2") == ds.Neighborhood((5, 0.5, 0.25), stride=2)
    assert pattern_from_text("topblocks:order=tile:4x4x8,keep=0.1") == ds.TopBlocks(0.1, "tile:4x4x8")
    assert pattern_from_text("cached:pattern=topblocks:keep=0.1;order=tile:4x4x8,refresh_steps=2") == ds.Cached(
        ds.TopBlocks(0.1, "tile:4x4x8"), 2
    )
    assert pattern_from_text("neighborhood:causal=truexfalsexfalse").causal == (True, False, False)
    assert pattern_from_text("radial:kind=block,sink=false") == ds.Radial("block", sink=False)
    assert pattern_from_text("cached:refresh_steps=2,pattern=topblocks:keep=0.1;order=raster") == ds.Cached(
        ds.TopBlocks(0.1, "raster"), 2
    )
