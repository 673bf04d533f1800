"""Scoring beside a dense run: the clip stays the dense one, scores are those of the definition, units resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import dit_sparse as ds
from dit_sparse.attention import Layer
from dit_sparse.execution import Tensors, dense
from dit_sparse.moment import Call, Moment
from dit_sparse.patterns import Cached, Dense, Neighborhood, Pattern, Radial, StaticPattern, TopBlocks
from dit_sparse.pipelines.generate import Job, generate
from dit_sparse.record import LayerRecord
from dit_sparse.schedule import Schedule
from dit_sparse.search.planner.candidates import candidates, suggested
from dit_sparse.search.planner.capture import Watch, bytes_beside_model, capture, watched
from dit_sparse.search.planner.groups import StepGroups
from dit_sparse.search.planner.prices import CallShape
from dit_sparse.search.planner.scoring import MEASURED, Sampled, Scores, Scoring, Visit
from dit_sparse.search.planner.store import Store, Unit
from tests.pipelines.test_padded_text import PIPELINES as PADDED
from tests.pipelines.test_padded_text import generate as generate_latents
from tests.pipelines.tiny import PROMPT, cogvideox, wan

GRID = ds.Grid(5, 8, 9)  # 360 video tokens: three blocks, the last one short
JOB = Job(PROMPT, seed=3, steps=5, frames=9, height=64, width=64, guidance=3.0)
LOOKED_AT: list[Pattern] = [Dense(), Neighborhood(window=0.5), TopBlocks(0.5), Cached(TopBlocks(0.5), 3)]
GROUPS = StepGroups((0.0, 0.4, 1.0))


def _quiet(what: str, done: int, total: int) -> None:
    pass


def _capture(pipe: Any, folder: Path, stop: Any = lambda: False, jobs: Any = (JOB,)) -> tuple[bool, Store]:
    store = Store(folder, {"test": 1})
    return capture(pipe, jobs, LOOKED_AT, GROUPS, store, stop, _quiet, rows=256), store


@pytest.fixture(params=[wan, cogvideox], ids=["text across", "text in front"])
def pipe(request: pytest.FixtureRequest) -> Any:
    return request.param()


def _scores_of(
    patterns: list[Pattern], grid: ds.Grid, rows: int, weights: Tensor | None, batch: int = 1
) -> tuple[Scores, Tensors, Tensor]:
    """Score patterns on random tensors with 4 heads; returns the call, too, and its dense output."""
    q, k, v = (torch.randn(batch, grid.tokens, 4, 16) * 1.5 for _ in range(3))
    heard: list[Scores] = []
    scoring = Scoring(
        "cpu",
        lambda layer, moment, given, call: [Visit(p) for p in patterns],
        lambda layer, moment, scores: heard.append(scores),
        lambda layer: weights,
        rows,
    )
    layer = Layer("layer", 0, Schedule(ds.Plan.of(TopBlocks())), ds.attention.dense_attention)
    given, call = Tensors(q, k, v, None, None, False, None), Call(((Dense(), (0, 1, 2, 3)),), grid, None, 0)
    out = scoring.sparse(layer, given, call, Moment(grid, step=0, total_steps=4), LayerRecord("layer"))
    assert torch.equal(out, dense(layer, given, call))
    return heard[0], given, out


@pytest.mark.parametrize("grid", [GRID, ds.Grid(5, 8, 9, prefix=7), ds.Grid(3, 8, 16, suffix=20)], ids=str)
@pytest.mark.parametrize("batch", [1, 2])
def test_scores_are_those_of_the_definition(grid: ds.Grid, batch: int) -> None:
    weights = torch.randn(24, 64)
    patterns: list[Pattern] = [Neighborhood(window=0.4), Radial(), Neighborhood(window=1.0)]
    scores, given, _ = _scores_of(patterns, grid, grid.video_tokens, weights, batch)
    rows = slice(grid.prefix, grid.prefix + grid.video_tokens)
    q, k, v = (x.double().transpose(1, 2) for x in (given.q, given.k, given.v))  # [B, H, S, D]
    weight = (q[:, :, rows] @ k.transpose(-1, -2) / 4.0).softmax(-1)
    exact = weight @ v
    full = torch.einsum("bhrd,chd->brc", exact, weights.double().unflatten(1, (4, 16)))
    for number, pattern in enumerate(patterns):
        assert isinstance(pattern, StaticPattern)
        seen = pattern.token_mask(grid)[rows]
        read = weight * seen
        wrong = read / read.sum(-1, keepdim=True) @ v - exact
        projected = torch.einsum("bhrd,chd->bhrc", wrong, weights.double().unflatten(1, (4, 16)))
        expected = {
            "recall": read.sum(-1).mean((0, 2)),
            "error": wrong.square().sum((0, 2, 3)) / exact.square().sum((0, 2, 3)),
            "projected": projected.square().sum((0, 2, 3)) / full.square().sum(),
            "density": torch.full((4,), pattern.densities(grid, sampled_blocks=None)[1]),
        }
        for name, value in expected.items():
            torch.testing.assert_close(getattr(scores, name)[number].double(), value.double(), atol=2e-5, rtol=2e-4)


def test_a_sample_tells_what_all_rows_tell() -> None:
    grid = ds.Grid(9, 16, 16)  # 18 blocks
    patterns: list[Pattern] = [TopBlocks(0.3), TopBlocks(0.3, clusters=4)]
    found, seed = [], torch.seed()
    for rows in (1024, grid.video_tokens):
        torch.manual_seed(seed)
        found.append(_scores_of(patterns, grid, rows, None)[0])
    sampled, whole = found
    torch.testing.assert_close(sampled.error, whole.error, atol=0.02, rtol=0.2)
    torch.testing.assert_close(sampled.recall, whole.recall, atol=0.02, rtol=0.1)
    assert not torch.equal(sampled.error, whole.error)


@pytest.mark.parametrize("wanted", [1, 300, 10_000])
@pytest.mark.parametrize("order", ["raster", "tile:2x4x4", "strips"])
def test_sampled_blocks_are_distinct_and_whole(wanted: int, order: str) -> None:
    layout = ds.TokenOrder.parse(order).layout(GRID)
    sampled = Sampled.of(layout, wanted)
    assert len(sampled.blocks.unique()) == len(sampled.blocks)
    starts, lengths = layout.start[sampled.blocks], layout.length[sampled.blocks]
    expected = [token for s, n in zip(starts, lengths, strict=True) for token in range(int(s), int(s + n))]
    assert sampled.rows.tolist() == expected
    assert len(expected) == GRID.video_tokens or wanted < GRID.video_tokens


def test_the_clip_stays_the_dense_one(pipe: Any, tmp_path: Path) -> None:
    expected = generate(pipe, JOB).frames
    processors = dict(pipe.transformer.attn_processors)
    watch = Watch(LOOKED_AT[1:], GROUPS, 0, {Unit(0, g, "transformer", n) for g in range(2) for n in range(2)})
    with watched(pipe, watch, "cpu", 256):
        found = generate(pipe, JOB).frames
    assert (found == expected).all()
    assert watch.heard
    assert all(now is processors[name] for name, now in pipe.transformer.attn_processors.items())


def test_every_unit_is_kept_with_all_candidates(pipe: Any, tmp_path: Path) -> None:
    finished, store = _capture(pipe, tmp_path)
    assert finished
    for group in range(2):
        for layer in range(2):
            scores = store.load(Unit(0, group, "transformer", layer))
            assert scores is not None
            heads = pipe.transformer.config.num_attention_heads
            assert scores.recall.shape == (3, heads)
            assert ((scores.recall > 0) & (scores.recall <= 1)).all()
            assert (scores.error >= 0).all()
            assert scores.projected.isfinite().all()
            assert ((scores.density > 0) & (scores.density <= 1)).all()


def test_a_stopped_search_goes_on_without_measuring_a_unit_again(tmp_path: Path) -> None:
    pipe, polls = wan(), iter([False, True, *[True] * 20])
    finished, store = _capture(pipe, tmp_path / "a", lambda: next(polls))
    assert not finished
    files = {file: file.read_bytes() for file in (tmp_path / "a" / "units").iterdir()}
    changed = {file: file.stat().st_mtime_ns for file in files}
    assert 0 < len(files) < 4
    finished, store = _capture(pipe, tmp_path / "a")
    assert finished
    assert {file: file.stat().st_mtime_ns for file in files} == changed
    _, other = _capture(pipe, tmp_path / "b")
    for group in range(2):
        for layer in range(2):
            unit = Unit(0, group, "transformer", layer)
            one, two = store.load(unit), other.load(unit)
            assert one is not None
            assert two is not None
            assert torch.equal(one.error, two.error)


def test_a_layer_that_is_never_called_is_told_as_such(tmp_path: Path) -> None:
    """The second expert of Wan 2.2 takes over at the low noise levels."""
    finished, store = _capture(wan(experts=2), tmp_path)
    assert finished
    calls = {
        (group, name): [s.calls for n in range(2) if (s := store.load(Unit(0, group, name, n))) is not None]
        for group in range(2)
        for name in ("transformer", "transformer_2")
    }
    assert all(len(of) == 2 for of in calls.values())
    assert {tuple(sorted(of)) for of in calls.values()} == {(0, 0), (2, 2)}  # guidance makes two of one
    assert calls[1, "transformer_2"] == [2, 2]


def test_a_finished_search_runs_no_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = wan()
    _capture(pipe, tmp_path)
    monkeypatch.setattr(pipe.transformer, "forward", lambda *args, **kwargs: pytest.fail("a step was run"))
    assert _capture(pipe, tmp_path)[0]


def test_a_kept_choice_is_judged_when_it_is_oldest() -> None:
    """Cached(…, 3) at step 3 of the group that begins at step 2 uses what was chosen at step 2."""
    watch = Watch(LOOKED_AT[1:], GROUPS, 0, {Unit(0, 0, "transformer", 0), Unit(0, 1, "transformer", 0)})
    layer = Layer("layer", 0, Schedule(ds.Plan.of(TopBlocks())), ds.attention.dense_attention)
    q = torch.zeros(1, GRID.tokens, 4, 16)
    given, call = Tensors(q, q, q, None, None, False, None), Call(((Dense(), (0, 1, 2, 3)),), GRID, None, 0)
    asked = {step: watch.visits(layer, Moment(GRID, step=step, total_steps=5), given, call) for step in range(5)}
    assert watch.shape == CallShape(GRID, 1, 4, 16, "float32", 4)
    assert GROUPS.sampled(5) == {1: 0, 3: 1}
    assert [v.measured for v in asked[1]] == [True, True, True]
    assert [(v.pattern, v.measured) for v in asked[0]] == [(LOOKED_AT[3], False)]
    assert [(v.pattern, v.measured) for v in asked[2]] == [(LOOKED_AT[3], False)]
    assert not asked[4]


def test_a_damaged_unit_is_set_aside_and_measured_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _, store = _capture(wan(), tmp_path)
    unit = Unit(0, 1, "transformer", 1)
    path = tmp_path / "units" / unit.file
    good, whole = path.read_bytes(), store.load(unit)
    assert whole is not None
    where = {"crc": good.index(b'"crc"'), "calls": good.index(b'"calls":"2"') + len(b'"calls":"')}
    flips = [
        good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :] for at in (where["crc"] + 1, where["calls"], len(good) - 1)
    ]
    for bad in (good[:-7], b"", *flips):
        path.write_bytes(bad)
        caplog.clear()
        assert store.load(unit) is None
        assert "made again" in caplog.text
        assert path.with_name(path.name + ".damaged").read_bytes() == bad
        again = _capture(wan(), tmp_path)[1].load(unit)
        assert again is not None
        for name in MEASURED:
            torch.testing.assert_close(getattr(again, name), getattr(whole, name), rtol=0, atol=0)


def test_a_folder_holds_one_search(tmp_path: Path) -> None:
    Store(tmp_path, {"prompts": ["a"], "seed": 0})
    Store(tmp_path, {"seed": 0, "prompts": ["a"]})
    with pytest.raises(ValueError, match="differs in seed"):
        Store(tmp_path, {"prompts": ["a"], "seed": 1})
    (tmp_path / "search.json").write_text("{")
    with pytest.raises(ValueError, match="damaged"):
        Store(tmp_path, {"prompts": ["a"], "seed": 0})


def test_candidates_follow_from_the_patterns() -> None:
    found = candidates(ds.Grid(9, 12, 16), densities=(0.2, 0.6))
    assert isinstance(found[0], Dense)
    assert len(set(found)) == len(found)
    names = {pattern.name for pattern in found}
    assert {"topblocks", "cached", "neighborhood", "stripes", "frames"} <= names
    assert all(ds.patterns.pattern_from_text(text) for text in suggested())


@pytest.mark.parametrize(
    ("specs", "densities", "message"),
    [
        (["topblocks:keep=2"], (0.1,), "share"),
        (["topblocks"], (0.0,), "densities"),
        (["topblocks"], (0.01,), "no cand"),
    ],
)
def test_what_gives_no_candidate_is_refused(specs: list[str], densities: tuple[float, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        candidates(GRID, specs, densities)


@pytest.mark.parametrize("edges", [(0.0,), (0.1, 1.0), (0.0, 0.9), (0.0, 0.5, 0.5, 1.0)])
def test_bad_step_edges_are_refused(edges: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="rise from 0 to 1"):
        StepGroups(edges)


@pytest.mark.parametrize("total", [1, 2, 4, 16, 50])
def test_every_step_is_in_one_group(total: int) -> None:
    groups = StepGroups()
    steps = [step for group in range(len(groups)) for step in groups.steps_of(group, total)]
    assert steps == list(range(total))
    assert all(step in groups.steps_of(group, total) for step, group in groups.sampled(total).items())


def test_memory_is_told_for_a_large_model() -> None:
    grid = ds.Grid(21, 45, 80)
    tensors = 4 * grid.tokens * 40 * 128 * 2
    assert tensors < bytes_beside_model(grid, 1, 40, 128, 2, 0) < 1.1 * tensors


@pytest.mark.parametrize("name", sorted(PADDED))
def test_padded_text_stays_stock_to_the_bit(name: str) -> None:
    """A pattern leaves padded text out; a run that is scored must not."""
    pipe, inputs = PADDED[name]()
    pipe.set_progress_bar_config(disable=True)
    expected = generate_latents(pipe, inputs)
    layers = {Unit(0, g, "transformer", n) for g in range(2) for n in range(8)}
    watch = Watch(LOOKED_AT[1:], GROUPS, 0, layers)
    with watched(pipe, watch, "cpu", 256):
        found = generate_latents(pipe, inputs)
    assert torch.equal(found, expected)
    assert watch.heard
    assert watch.shape is not None
    assert watch.shape.grid.text_tokens > 0
