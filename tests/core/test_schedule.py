"""The schedule: what runs dense and why, caches that reset, records, and the op boundary."""

from __future__ import annotations

import copy
import gc
import pickle

import pytest
import torch
from torch import library

import dit_sparse as ds
from dit_sparse.attention import Layer, attend, dense_attention
from dit_sparse.options import Options
from dit_sparse.patterns import PatternState
from dit_sparse.record import MOST_WAITING, Sum
from dit_sparse.schedule import Schedule, StrictError

GRID = ds.Grid(4, 8, 16, suffix=5)


def make(plan: ds.Plan | ds.Pattern, layers: int = 1, **options: object) -> tuple[Schedule, list[Layer]]:
    plan = plan if isinstance(plan, ds.Plan) else ds.Plan.of(plan)
    names = tuple(f"blocks.{index}.attn1" for index in range(layers))
    schedule = Schedule(plan, layer_names=names, heads=2, options=Options(**{"min_tokens": 0} | options))  # type: ignore[arg-type]
    return schedule, [Layer(name, index, schedule, dense_attention) for index, name in enumerate(names)]


def qkv(grid: ds.Grid = GRID, batch: int = 1) -> list[torch.Tensor]:
    return [torch.randn(batch, grid.tokens, 2, 16) for _ in range(3)]


HALF = ds.TopBlocks(keep=0.5, order="raster")


@pytest.mark.parametrize(
    ("plan", "options", "call", "reason"),
    [
        (ds.Plan.dense(), {}, {}, "plan: dense"),
        (ds.Plan((ds.Rule(ds.Dense()),)), {}, {}, "plan: dense"),
        (ds.Plan((ds.Rule(HALF, steps=(0.5, 1.0)),)), {}, {"step": 4}, "plan: dense"),
        (ds.Plan((ds.Rule(HALF, steps=(0.5, 1.0)),)), {}, {"total_steps": None}, "number of steps unknown"),
        (HALF, {"dense_steps": 5}, {"step": 4}, "dense_steps"),
        (HALF, {"dense_steps": 0.5}, {"step": 4}, "dense_steps"),
        (HALF, {"dense_steps": (0, 2)}, {"step": 8}, "dense_steps"),
        (HALF, {"dense_steps": 0.5}, {"total_steps": None}, "number of steps unknown"),
        (HALF, {"dense_steps": 2}, {"step": None}, "denoising step"),
        (HALF, {"dense_layers": "0, 3"}, {}, "dense_layers"),
        (HALF, {"dense_layers": "all"}, {}, "dense_layers"),
        (HALF, {"dense_layers": "-1"}, {}, "dense_layers"),
        (ds.Plan((ds.Rule(ds.Dense(), layers=(-1,)), ds.Rule(HALF))), {}, {}, "plan: dense"),
        (HALF, {"min_tokens": 4096}, {}, "517 tokens < min_tokens 4096"),
        (HALF, {"min_tokens": None}, {}, "517 tokens < min_tokens 2048"),
        (HALF, {}, {"grid": None, "reason": "unknown size"}, "unknown size"),
        (HALF, {}, {"grid": ds.Grid(4, 8, 16)}, "do not match the grid"),
    ],
)
def test_dense_calls_are_the_stock_call_and_give_a_reason(
    plan: ds.Plan | ds.Pattern, options: dict[str, object], call: dict[str, object], reason: str
) -> None:
    schedule, (layer,) = make(plan, **options)
    schedule.start_forward(**({"grid": GRID, "step": 6, "total_steps": 10} | call))  # type: ignore[arg-type]
    q, k, v = qkv()
    assert torch.equal(attend(layer, q, k, v), dense_attention(q, k, v))
    summary = schedule.summary()
    assert (summary.sparse_calls, summary.dense_calls) == (0, 1)
    assert reason in next(iter(summary.dense_reasons))


def test_steps_outside_the_guards_run_sparse() -> None:
    schedule, (layer,) = make(HALF, dense_steps=(0.3, 2))
    for step in range(10):
        schedule.start_forward(GRID, step=step, total_steps=10)
        attend(layer, *qkv())
    summary = schedule.summary()
    assert (summary.sparse_calls, summary.dense_reasons) == (5, {"dense_steps": 5})
    video = GRID.video_tokens**2 * 2
    assert summary.density == summary.computed_density == 0.5
    assert summary.run_density == pytest.approx((5 * 0.5 * video + 5 * video) / (10 * video))
    assert "skip 50.0%" in str(summary)


def test_masks_and_causal_calls_run_dense_and_strict_raises() -> None:
    mask = torch.rand(1, 1, GRID.tokens, GRID.tokens) > 0.5
    for strict in (False, True):
        schedule, (layer,) = make(HALF, strict=strict)
        schedule.start_forward(GRID)
        q, k, v = qkv()
        if strict:
            with pytest.raises(StrictError, match=r"blocks.0.attn1: would run dense: attention mask"):
                attend(layer, q, k, v, mask)
        else:
            assert torch.equal(attend(layer, q, k, v, mask), dense_attention(q, k, v, mask))
            assert torch.equal(attend(layer, q, k, v, is_causal=True), dense_attention(q, k, v, is_causal=True))
            assert schedule.summary().dense_reasons == {"attention mask": 1, "causal attention": 1}


def test_heads_may_differ() -> None:
    rules = (ds.Rule(ds.Skip(), heads=(0,)), ds.Rule(ds.Neighborhood(window=0.5), heads=(1,)), ds.Rule(ds.Dense()))
    schedule, (layer,) = make(ds.Plan(rules))
    schedule.start_forward(GRID)
    q, k, v = (torch.randn(2, GRID.tokens, 4, 16) for _ in range(3))
    out = attend(layer, q, k, v)
    video = slice(0, GRID.video_tokens)
    assert out[:, video, 0].count_nonzero() == 0
    expected = ds.sparse_attention(q[:, :, 1:2], k[:, :, 1:2], v[:, :, 1:2], ds.Neighborhood(window=0.5), GRID)
    torch.testing.assert_close(out[:, :, 1:2], expected)
    torch.testing.assert_close(out[:, :, 2:], dense_attention(q, k, v)[:, :, 2:])
    text = dense_attention(q, k, v)[:, GRID.video_tokens :]
    torch.testing.assert_close(out[:, GRID.video_tokens :], text, atol=1e-6, rtol=1e-5)


class Watch(ds.Pattern):
    """A pattern that keeps every block and notes the state that it was given."""

    name = "watch"
    seen: list[PatternState]

    def select(self, q, k, grid, state):  # type: ignore[no-untyped-def]
        state.memory.setdefault("calls", []).append(state.step)
        self.__dict__.setdefault("seen", []).append(state)
        return ds.TopBlocks(keep=1.0, order="raster").select(q, k, grid, state)


def test_patterns_that_take_turns_may_meet_in_a_layer() -> None:
    """At layer 0 the cycle is raster, so both rules are one pattern there: every head must still be computed."""
    rules = (ds.Rule(ds.TopBlocks(keep=0.5, order="cycle"), heads=(0,)), ds.Rule(HALF))
    schedule, layers = make(ds.Plan(rules), layers=3)
    schedule.start_forward(GRID)
    for layer, order in zip(layers, ("raster", "column", "tile"), strict=True):
        q, k, v = qkv()
        out = attend(layer, q, k, v)
        for head, pattern in ((0, ds.TopBlocks(keep=0.5, order=order)), (1, HALF)):
            one = slice(head, head + 1)
            expected = ds.sparse_attention(q[:, :, one], k[:, :, one], v[:, :, one], pattern, GRID)
            torch.testing.assert_close(out[:, :, one], expected)


def test_cached_patterns_are_not_made_anew_in_every_layer() -> None:
    pattern = ds.Cached(ds.TopBlocks(keep=0.5))
    assert pattern.at_layer(1) is pattern
    assert ds.Cached(ds.TopBlocks(order="cycle")).at_layer(1) == ds.Cached(ds.TopBlocks(order="column"))


def test_memory_belongs_to_run_branch_layer_and_shape() -> None:
    watch = Watch()
    schedule, layers = make(watch, layers=2)
    first, second = object(), object()
    for run in (first, second):
        for step in range(2):
            for branch in ("cond", "uncond"):
                schedule.start_forward(GRID, step=step, total_steps=2, branch=branch, run=run)
                for layer in layers:
                    attend(layer, *qkv())
    memories = {id(state.memory) for state in watch.seen}
    assert len(memories) == 2 * 2 * 2, "two runs x two branches x two layers"
    assert all(state.memory["calls"] == [0, 1] for state in watch.seen)
    small = ds.Grid(2, 8, 16)
    schedule.start_forward(small, step=1, total_steps=2, branch="cond", run=second)
    attend(layers[0], *qkv(small))
    assert watch.seen[-1].memory["calls"] == [1], "another shape starts afresh"
    schedule.end_run()
    schedule.start_forward(GRID, step=0, total_steps=2, branch="cond", run=second)
    attend(layers[0], *qkv())
    assert watch.seen[-1].memory["calls"] == [0], "a run that ended starts afresh, whatever its name"


def test_static_masks_are_built_once_per_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    built = []
    rule = ds.Radial.token_rule
    monkeypatch.setattr(
        ds.Radial, "token_rule", lambda self, grid, device: built.append(grid) or rule(self, grid, device)
    )
    schedule, layers = make(ds.Radial(), layers=3)
    other = ds.Grid(2, 8, 16)
    for grid in (GRID, other, GRID, other):
        schedule.start_forward(grid)
        for layer in layers:
            attend(layer, *qkv(grid))
    assert built == [GRID, other]


def test_layers_die_with_their_model_and_ids_are_never_reused() -> None:
    _, (layer,) = make(HALF)
    number, q = layer.id.clone(), torch.randn(1, 4, 1, 8)
    twin, sent = copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))
    assert len({int(layer.id), int(twin.id), int(sent.id)}) == 3
    assert twin.schedule is not layer.schedule
    assert sent.schedule.plan == layer.schedule.plan
    del layer
    gc.collect()
    with pytest.raises(RuntimeError, match="enable"):
        torch.ops.dit_sparse.attention(q, q, q, None, number, 0.0, False, None, False, None)


def test_the_op_is_sound_and_one_graph_serves_all_layers_and_steps() -> None:
    schedule, layers = make(ds.Plan((ds.Rule(HALF, steps=(0.5, 1.0)),)), layers=3)
    q, k, v = qkv()
    schedule.start_forward(GRID, step=1, total_steps=2)
    arguments = (q, k, v, None, layers[0].id, 0.0, False, None, False, None)
    library.opcheck(torch.ops.dit_sparse.attention.default, arguments)
    graphs = []

    def count(graph: torch.fx.GraphModule, _: object) -> object:
        graphs.append(graph)
        return graph

    compiled = torch.compile(lambda x, layer: attend(layer, x, k, v) * 2, fullgraph=True, backend=count)
    for step in (0, 1):
        schedule.start_forward(GRID, step=step, total_steps=2)
        for layer in layers:
            torch.testing.assert_close(compiled(q, layer), attend(layer, q, k, v) * 2)
    assert len(graphs) == 1
    assert set(schedule.summary().dense_reasons) == {"plan: dense"}


@pytest.mark.parametrize(
    "options",
    [{"dense_steps": -1}, {"dense_steps": 1.5}, {"dense_steps": (1, 2, 3)}, {"dense_layers": "x"},
     {"min_tokens": -1}, {"backend": "cuda"}],
)  # fmt: skip
def test_bad_options_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"dense_steps|dense_layers|min_tokens|backend"):
        Options(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda q, k, v: (q.double(), k.double(), v.double()), TypeError, "float64"),
        (lambda q, k, v: (q[:, 1:], k[:, 1:], v[:, 1:]), ValueError, "517 tokens"),
        (lambda q, k, v: (q, k.to("meta"), v), ValueError, "one device"),
        (lambda q, k, v: (q, k.half(), v), TypeError, "one dtype"),
        (lambda q, k, v: (q[0], k[0], v[0]), ValueError, r"\[B, S, H, D\]"),
    ],
)
def test_bad_tensors_are_refused(change, error, message) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=message):
        ds.sparse_attention(*change(*qkv()), ds.TopBlocks(), GRID, backend="cpu")


def test_float64_runs_on_the_reference() -> None:
    q, k, v = (x.double() for x in qkv())
    out = ds.sparse_attention(q, k, v, ds.Dense(), GRID, backend="reference")
    torch.testing.assert_close(out, dense_attention(q, k, v))


def test_a_sum_counts_every_call_and_holds_few_tensors() -> None:
    total = Sum()
    assert float(total) == 0.0
    parts = [torch.randint(0, 2**40, (size % 5 + 1,)).double() for size in range(3 * MOST_WAITING)]
    for number, part in enumerate(parts):
        total.add(part)
        if number % 100 == 0:
            assert float(total) == float(torch.cat(parts[: number + 1]).sum())
    assert float(total) == float(torch.cat(parts).sum())
    assert len(total._parts) <= MOST_WAITING
