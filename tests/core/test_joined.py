"""Heads of a layer that differ in TopBlocks' keep alone run as one call, and give what each gives alone."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import dit_sparse as ds
from dit_sparse import execution
from dit_sparse.attention import Layer, attend, dense_attention
from dit_sparse.estimate.table import SCORES
from dit_sparse.moment import groups_of
from dit_sparse.options import Options
from dit_sparse.patterns import PatternState, pattern_from_dict, pattern_from_text
from dit_sparse.schedule import Schedule

GRID = ds.Grid(6, 8, 16, suffix=5)  # 6 video blocks, one of text
ONE = ds.TopBlocks(keep=0.5, order="raster")
KEEPS = st.tuples(*[st.sampled_from([0.01, 0.17, 0.34, 0.5, 0.84, 1.0])] * 4)
# What a budget per head meets beside the plain way: every score, sinks inside the budget, own orders, means.
WAYS = [replace(ONE, score=score) for score in SCORES] + [
    replace(ONE, sinks="text+first_frame+diagonal", compensate=True),
    replace(ONE, sinks="none", dense_text=False),
    replace(ONE, clusters=(4, 6)),
]


def drawn(batch: int = 2, heads: int = 4, kv_heads: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (torch.randn(batch, GRID.tokens, n, 16) for n in (heads, kv_heads, kv_heads))
    return q * 2, k * 2, v


def per_head(patterns: list[ds.Pattern], *others: ds.Rule) -> ds.Plan:
    return ds.Plan(tuple(ds.Rule(pattern, heads=(head,)) for head, pattern in enumerate(patterns)) + others)


def make(plan: ds.Plan, layers: int = 1, **options: object) -> tuple[Schedule, list[Layer]]:
    names = tuple(f"blocks.{index}.attn1" for index in range(layers))
    chosen = Options(**{"min_tokens": 0} | options)  # type: ignore[arg-type]
    schedule = Schedule(plan, layer_names=names, options=chosen)
    return schedule, [Layer(name, index, schedule, dense_attention) for index, name in enumerate(names)]


def counted(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Count the selections of TopBlocks and the launches of sparse attention from here on."""
    counts = {"selections": 0, "launches": 0}
    select, launch = ds.TopBlocks.select, execution.attend_selection

    def count_select(*given: object) -> object:
        counts["selections"] += 1
        return select(*given)  # type: ignore[arg-type]

    def count_launch(*given: object) -> object:
        counts["launches"] += 1
        return launch(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(ds.TopBlocks, "select", count_select)
    monkeypatch.setattr(execution, "attend_selection", count_launch)
    return counts


@pytest.mark.parametrize("pattern", WAYS, ids=str)
@settings(max_examples=5, deadline=None)
@given(keeps=KEEPS, video_only=st.booleans(), hides=st.booleans())
def test_each_head_keeps_the_blocks_of_its_share(
    pattern: ds.TopBlocks, keeps: tuple[float, ...], video_only: bool, hides: bool
) -> None:
    q, k, _ = drawn()
    q = q[:, : GRID.video_tokens] if video_only else q
    lengths = torch.tensor([GRID.tokens, GRID.tokens - 140], dtype=torch.int32) if hides else None
    layout = pattern.token_order().layout(GRID)

    def chosen(keep: float | tuple[float, ...]) -> tuple[Tensor, Tensor]:
        state = PatternState(layout, 0.25, kv_lengths=lengths, seed=3)
        selection = replace(pattern, keep=keep).select(q, k, GRID, state)
        return selection.indices.block_mask().unflatten(0, (2, 4)), selection.kept_pairs.view(2, 4)

    blocks, pairs = chosen(keeps)
    for head, keep in enumerate(keeps):
        blocks_alone, pairs_alone = chosen(keep)
        assert torch.equal(blocks[:, head], blocks_alone[:, head])
        assert torch.equal(pairs[:, head], pairs_alone[:, head])


# proxy looks at neighbouring heads, so that a head alone is another call; the others see one head at a time
@pytest.mark.parametrize("pattern", [one for one in WAYS if one.score != "proxy"], ids=str)
@pytest.mark.parametrize("beside", [False, True], ids=["all heads", "others beside them"])
def test_a_plan_gives_each_head_what_it_gets_alone(
    pattern: ds.TopBlocks, beside: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    patterns = [replace(pattern, keep=keep) for keep in torch.rand(4).mul(0.9).add(0.1).tolist()]
    if beside:
        patterns[1:1] = [ds.Dense(), replace(ONE, mass=0.7, keep=None), ds.Neighborhood(window=0.5)]
        patterns.append(ds.Dense())
    plan = per_head(patterns)
    heads = len(patterns)
    q, k, v = drawn(heads=heads, kv_heads=heads // 2)
    schedule, (layer,) = make(plan, monitor=True)
    counts = counted(monkeypatch)
    schedule.start_forward(GRID, step=1, total_steps=2)
    out = attend(layer, q, k, v, enable_gqa=True)
    assert counts == {"selections": 1 + beside, "launches": 1 + 2 * beside}
    record = schedule.summary().layers[0]
    others = {"dense": 1, "neighborhood": 1} if beside else {}
    assert dict(record.patterns) == {"topblocks": 1 + beside} | others
    kept = visited = 0.0
    measured = {head: recall for one in record.measured for head, recall in zip(one.heads, one.recall, strict=True)}
    for head, one in enumerate(patterns):
        alone, (layer_alone,) = make(ds.Plan.of(one), monitor=True)
        alone.start_forward(GRID, step=1, total_steps=2)
        of_q, of_k = slice(head, head + 1), slice(head // 2, head // 2 + 1)
        expected = attend(layer_alone, q[:, :, of_q], k[:, :, of_k], v[:, :, of_k])
        torch.testing.assert_close(out[:, :, of_q], expected, atol=1e-5, rtol=1e-5)
        record_alone = alone.summary().layers[0]
        kept, visited = kept + float(record_alone.kept_pairs), visited + float(record_alone.visited_pairs)
        if record_alone.measured:
            torch.testing.assert_close(measured.pop(head), record_alone.measured[0].recall[0])
    assert (float(record.kept_pairs), float(record.visited_pairs)) == (kept, visited)
    assert not measured


def test_layers_that_take_turns_are_joined_in_each_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """At layer 0 the cycle is raster too, and all three heads share a call; elsewhere the last one is alone."""
    cycle = ds.TopBlocks(order="cycle")
    patterns = [replace(cycle, keep=0.2), replace(cycle, keep=0.7), ONE]
    schedule, layers = make(per_head(patterns), layers=3)
    counts = counted(monkeypatch)
    schedule.start_forward(GRID)
    for layer, launches in zip(layers, (1, 2, 2), strict=True):
        before = counts["launches"]
        q, k, v = drawn(1, 3, 3)
        out = attend(layer, q, k, v)
        assert counts["launches"] - before == launches
        for head, pattern in enumerate(patterns):
            one = slice(head, head + 1)
            here = pattern.at_layer(layer.index)
            expected = ds.sparse_attention(q[:, :, one], k[:, :, one], v[:, :, one], here, GRID)
            torch.testing.assert_close(out[:, :, one], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("options", [{}, {"recall": 0.6}, {"residual": True}, {"recall": 0.6, "residual": True}])
def test_cached_heads_are_joined_over_the_steps(options: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    patterns = [ds.Cached(replace(ONE, keep=keep), 2, **options) for keep in (0.17, 0.5, 0.84)]  # type: ignore[arg-type]
    joined, (layer,) = make(per_head(patterns))
    alone = [make(ds.Plan.of(pattern)) for pattern in patterns]
    steps = [drawn(2, 3, 3) for _ in range(7)]
    counts = counted(monkeypatch)
    outs, selections = [], []
    for step, (q, k, v) in enumerate(steps):
        joined.start_forward(GRID, step=step, total_steps=len(steps))
        outs.append(attend(layer, q, k, v))
        selections.append(counts["selections"])
    assert counts["launches"] == len(steps)
    if "recall" not in options:
        assert selections == [1, 1, 2, 2, 3, 3, 4]
    (memory,) = joined.execution._memory.values()
    assert memory["selection"].indices.heads == 6
    kept = 0.0
    for head, (schedule, (layer,)) in enumerate(alone):
        one = slice(head, head + 1)
        for step, (q, k, v) in enumerate(steps):
            schedule.start_forward(GRID, step=step, total_steps=len(steps))
            expected = attend(layer, q[:, :, one], k[:, :, one], v[:, :, one])
            torch.testing.assert_close(outs[step][:, :, one], expected, atol=1e-5, rtol=1e-5)
        kept += float(schedule.summary().layers[0].kept_pairs)
    assert float(joined.summary().layers[0].kept_pairs) == kept


@pytest.mark.parametrize(
    ("patterns", "groups"),
    [
        ((ONE,) * 4, ((ONE, (0, 1, 2, 3)),)),
        ((ds.TopBlocks(0.1), ds.Dense(), ds.TopBlocks(0.3)), ((ds.TopBlocks((0.1, 0.3)), (0, 2)), (ds.Dense(), (1,)))),
        ((ds.TopBlocks(), ds.TopBlocks(0.25), ds.TopBlocks(0.4)), ((ds.TopBlocks((0.25, 0.25, 0.4)), (0, 1, 2)),)),
        (
            (ds.Cached(ds.TopBlocks(0.1)), ds.TopBlocks(0.3), ds.Cached(ds.TopBlocks(0.2))),
            ((ds.Cached(ds.TopBlocks((0.1, 0.2))), (0, 2)), (ds.TopBlocks(0.3), (1,))),
        ),
        (
            (ds.Cached(ds.TopBlocks(0.1, clusters=3)), ds.Cached(ds.TopBlocks(0.1, clusters=3))),
            ((ds.Cached(ds.TopBlocks(0.1, clusters=3)), (0, 1)),),
        ),
    ],
    ids=["one pattern", "around another", "the default keep", "cached and not", "cached, one pattern"],
)
def test_groups(patterns: tuple[ds.Pattern, ...], groups: object) -> None:
    found = groups_of(patterns)
    assert found == groups
    if len(set(patterns)) == 1:
        assert found[0][0] is patterns[0]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (ds.TopBlocks(0.1), ds.TopBlocks(0.2, "raster")),
        (ds.TopBlocks(0.1), ds.TopBlocks(0.2, compensate=True)),
        (ds.TopBlocks(0.1, heads="adaptive"), ds.TopBlocks(0.2, heads="adaptive")),
        (ds.TopBlocks(mass=0.5), ds.TopBlocks(mass=0.6)),
        (ds.TopBlocks((0.1,)), ds.TopBlocks(0.1)),
        (ds.Cached(ds.TopBlocks(0.1), 2), ds.Cached(ds.TopBlocks(0.2), 3)),
        (ds.Cached(ds.TopBlocks(0.1), recall=0.5), ds.Cached(ds.TopBlocks(0.2))),
        (ds.Cached(ds.TopBlocks(0.1), residual=True), ds.Cached(ds.TopBlocks(0.2))),
        (ds.Cached(ds.TopBlocks(0.1), densities=(0.3,)), ds.Cached(ds.TopBlocks(0.2), densities=(0.3,))),
        (ds.Cached(ds.TopBlocks(0.1)), ds.Cached(ds.AutoFrames())),
        (ds.Radial(), ds.Radial(decay=0.5)),
    ],
    ids=str,
)
def test_what_differs_in_more_stays_apart(one: ds.Pattern, other: ds.Pattern) -> None:
    assert groups_of((one, other, one)) == ((one, (0, 2)), (other, (1,)))


@pytest.mark.parametrize("keep", [(0.1, 0.35, 0.2), (0.5,), (1, 0.25)], ids=str)
def test_shares_round_trip(keep: tuple[float, ...]) -> None:
    for pattern in (ds.TopBlocks(keep), ds.Cached(ds.TopBlocks(keep, "raster"), 2)):
        assert pattern_from_dict(json.loads(json.dumps(pattern.to_dict()))) == pattern
        assert pattern_from_text(str(pattern)) == pattern


def test_how_shares_are_written() -> None:
    assert str(ds.TopBlocks((0.1, 0.35, 0.2))) == "topblocks:keep=0.1x0.35x0.2"
    assert pattern_from_text("topblocks:keep=0.1x") == ds.TopBlocks((0.1,))
    assert ds.TopBlocks((0.1, 0.2)).to_dict()["keep"] == [0.1, 0.2]
    assert ds.TopBlocks((0.1, 0.9)).with_density(GRID, 0.5) == ds.TopBlocks(0.5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"keep": ()}, r"one share for each head, got \(\)"),
        ({"keep": (0.1, 1.5)}, r"keep must be a share in \(0, 1\], got 1.5"),
        ({"keep": (0.1, None)}, "keep must be a share or a tuple"),
        ({"keep": [0.1, 0.2]}, "keep must be a share"),
        ({"keep": (0.1, 0.2), "heads": "adaptive"}, r"one keep among the heads, got keep=\(0.1, 0.2\)"),
        ({"keep": (0.1, 0.2), "mass": 0.5}, "got keep and mass"),
        ({"mass": (0.1, 0.2)}, "mass must be a share"),
        ({"recall": (0.1, 0.2)}, "recall must be a share"),
        ({"threshold": (0.1, 0.2)}, "finite number of deviations"),
    ],
)
def test_bad_shares_are_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ds.TopBlocks(**fields)  # type: ignore[arg-type]


def test_densities_of_a_cache_are_plain_shares() -> None:
    with pytest.raises(ValueError, match="densities must be a tuple of shares"):
        ds.Cached(ONE, densities=(0.5, (0.1, 0.2)))  # type: ignore[arg-type]


def test_shares_for_another_number_of_heads_are_refused() -> None:
    q, k, v = drawn()
    for keep in ((0.1, 0.2), (0.5,) * 8):  # fewer, and as many as the batch has heads
        with pytest.raises(ValueError, match=f"got {len(keep)} shares for 4 heads .* give 4 shares, or one number"):
            ds.sparse_attention(q, k, v, ds.TopBlocks(keep), GRID)
