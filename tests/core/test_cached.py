"""Cached selections: when they are made anew, what they belong to, and what monitoring says of them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import dit_sparse as ds
from dit_sparse import execution
from dit_sparse.attention import Layer, attend, dense_attention
from dit_sparse.options import Options
from dit_sparse.patterns import PatternState
from dit_sparse.patterns.cached import Stale
from dit_sparse.schedule import Schedule
from dit_sparse.selection import video_blocks_of

GRID = ds.Grid(8, 8, 16, suffix=5)  # 8 video blocks, one of text
ONE = ds.TopBlocks(keep=0.125, order="raster")


def make(pattern: ds.Pattern, heads: int = 2, **options: object) -> tuple[Schedule, Layer]:
    chosen = Options(**{"min_tokens": 0} | options)  # type: ignore[arg-type]
    schedule = Schedule(ds.Plan.of(pattern), layer_names=("blocks.0.attn1",), heads=heads, options=chosen)
    return schedule, Layer("blocks.0.attn1", 0, schedule, dense_attention)


def pointing(shifts: list[int], grid: ds.Grid = GRID) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, k, v [1, S, H, 16] where the queries of video block i of head h read key block (i + shift) mod n."""
    blocks = grid.video_tokens // 128
    block = torch.arange(grid.tokens) // 128
    noise = [torch.randn(1, grid.tokens, len(shifts), 16) for _ in range(3)]
    q, k = 0.05 * noise[0], 0.05 * noise[1]
    for head, shift in enumerate(shifts):
        q[0, :, head] += 8.0 * torch.nn.functional.one_hot((block + shift) % blocks, 16)
        k[0, :, head] += 8.0 * torch.nn.functional.one_hot(block, 16) * (block < blocks)[:, None]
    return q, k, noise[2]


def shifts_of(schedule: Schedule, grid: ds.Grid = GRID) -> list[list[int]]:
    """Read from each remembered selection by how many blocks every head's first row is shifted."""
    found = []
    for memory in schedule.execution._memory.values():
        chosen = video_blocks_of(memory["selection"].indices, ONE.token_order().layout(grid))
        found.append([int(row[0].nonzero()[0]) for row in chosen])
    return found


def test_drift_renews_the_heads_that_drifted_one_step_after_the_check() -> None:
    schedule, layer = make(ds.Cached(ONE, refresh_steps=2, recall=0.5))
    seen = []
    for step, shifts in enumerate([[1, 2]] * 3 + [[1, 4]] * 5):
        schedule.start_forward(GRID, step=step, total_steps=8)
        attend(layer, *pointing(shifts))
        seen += shifts_of(schedule)
    # chosen at 0; looked at after steps 2 (fine), 4 (head 1 has drifted since 3), 6 (fine again)
    assert seen == [[1, 2]] * 5 + [[1, 4]] * 3


def test_a_mask_that_holds_is_never_made_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    select = ds.TopBlocks.select
    monkeypatch.setattr(ds.TopBlocks, "select", lambda *given: calls.append(1) or select(*given))
    schedule, layer = make(ds.Cached(ONE, refresh_steps=1, recall=0.5))
    for step in range(6):
        schedule.start_forward(GRID, step=step, total_steps=6)
        attend(layer, *pointing([3, 5]))
    assert len(calls) == 1


def test_densities_follow_one_another_and_the_last_stays() -> None:
    pattern = ds.Cached(ds.TopBlocks(keep=0.9, order="raster"), refresh_steps=2, densities=(0.5, 0.25, 0.125))
    layout, memory, kept = pattern.token_order().layout(GRID), {}, []
    for step in range(9):
        q, k = (torch.randn(1, GRID.tokens, 1, 8) for _ in range(2))
        selection = pattern.select(q, k, GRID, PatternState(layout, 1.0, step, {}, memory))
        kept.append(float(selection.visited_pairs) / GRID.video_tokens**2)
    assert kept == [0.5] * 2 + [0.25] * 2 + [0.125] * 5


def test_residual_gives_dense_where_it_is_made_and_is_added_after() -> None:
    pattern = ds.Cached(ONE, refresh_steps=2, residual=True)
    schedule, layer = make(pattern)
    plain, plain_layer = make(ds.Cached(ONE, refresh_steps=2))
    residual = torch.zeros(())
    for step in range(4):
        q, k, v = pointing([1, 2])
        for one in (schedule, plain):
            one.start_forward(GRID, step=step, total_steps=4)
        out, sparse, dense = attend(layer, q, k, v), attend(plain_layer, q, k, v), dense_attention(q, k, v)
        if step % 2 == 0:
            torch.testing.assert_close(out, dense, atol=1e-5, rtol=1e-5)
            residual = dense - sparse
        else:
            torch.testing.assert_close(out, sparse + residual, atol=1e-5, rtol=1e-5)


def test_a_call_that_fails_owes_its_residual_to_the_next_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted between choosing and attending, at the first selection and at a later one; the loop goes on."""
    schedule, layer = make(ds.Cached(ONE, refresh_steps=2, residual=True))
    attend_selection = execution.attend_selection
    inputs = [pointing([shift, shift]) for shift in (1, 2, 3, 4)]

    def interrupted(*given: object) -> object:
        raise KeyboardInterrupt

    for step, (q, k, v) in enumerate(inputs):
        for failing in (True, False):
            monkeypatch.setattr(execution, "attend_selection", interrupted if failing else attend_selection)
            schedule.start_forward(GRID, step=step, total_steps=4)
            if failing:
                with pytest.raises(KeyboardInterrupt):
                    attend(layer, q, k, v)
                continue
            out = attend(layer, q, k, v)
            if step % 2 == 0:
                torch.testing.assert_close(out, dense_attention(q, k, v), atol=1e-5, rtol=1e-5)
            else:
                assert not torch.allclose(out, dense_attention(q, k, v), atol=1e-3)


@pytest.mark.parametrize("inner", [ONE, ds.TopBlocks(keep=0.5, clusters=4), ds.AutoFrames(0.2)], ids=str)
@pytest.mark.parametrize("residual", [False, True])
def test_what_the_host_knows_changes_nothing(
    inner: ds.Pattern, residual: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host may learn late that no head is stale: it then chooses anew for nothing, and the output is the same."""
    steps = [pointing(shifts) for shifts in ([1, 2], [1, 2], [1, 5], [1, 5], [1, 5])]
    runs = []
    for late in (False, True):
        if late:
            monkeypatch.setattr(Stale, "surely_none", lambda self: False)
        schedule, layer = make(ds.Cached(inner, refresh_steps=1, recall=0.4, residual=residual))
        runs.append([])
        for step, (q, k, v) in enumerate(steps):
            schedule.start_forward(GRID, step=step, total_steps=len(steps))
            runs[-1].append(attend(layer, q, k, v))
    for early, later in zip(*runs, strict=True):
        torch.testing.assert_close(early, later, atol=1e-6, rtol=1e-5)


def test_two_pipelines_and_two_branches_share_nothing() -> None:
    pattern = ds.Cached(ONE, refresh_steps=100)
    (first, first_layer), (second, second_layer) = make(pattern), make(pattern)
    for step, (branch, shift) in enumerate([("cond", 1), ("uncond", 2), ("cond", 3), ("uncond", 4)]):
        for schedule, layer, more in ((first, first_layer, 0), (second, second_layer, 3)):
            schedule.start_forward(GRID, step=step // 2, total_steps=2, branch=branch)
            attend(layer, *pointing([shift + more] * 2))
    assert shifts_of(first) == [[1, 1], [2, 2]]
    assert shifts_of(second) == [[4, 4], [5, 5]]


def test_another_resolution_starts_afresh() -> None:
    other = ds.Grid(6, 8, 16)
    schedule, layer = make(ds.Cached(ONE, refresh_steps=100))
    for grid, shift in ((GRID, 1), (other, 2), (GRID, 3)):
        schedule.start_forward(grid, step=0, total_steps=2)
        attend(layer, *pointing([shift] * 2, grid))
    assert sorted(shifts_of(schedule)) == [[1, 1], [2, 2]], "each size keeps what it chose itself"


def test_an_exception_in_mid_run_leaves_nothing_for_the_next_one() -> None:
    schedule, layer = make(ds.Cached(ONE, refresh_steps=100))
    first, second = object(), object()
    schedule.start_forward(GRID, step=0, total_steps=2, run=first)
    attend(layer, *pointing([1, 1]))
    schedule.start_forward(GRID, step=1, total_steps=2, run=first)
    q, k, v = pointing([1, 1])
    with pytest.raises(ValueError, match=r"k and v"):
        attend(layer, q, k, v[:, :-1])
    schedule.start_forward(GRID, step=0, total_steps=2, run=second)
    attend(layer, *pointing([2, 2]))
    assert shifts_of(schedule) == [[2, 2]]


@pytest.mark.parametrize("pattern", [ONE, ds.Neighborhood(window=0.5), ds.TopBlocks(keep=1.0)], ids=str)
def test_monitoring_measures_what_the_mask_loses(pattern: ds.Pattern) -> None:
    grid = ds.Grid(4, 8, 16, prefix=3)
    schedule, layer = make(pattern, heads=3, monitor=True)
    schedule.start_forward(grid, step=7, total_steps=9)
    q, k, v = (torch.randn(2, grid.tokens, 3, 16) for _ in range(3))
    out = attend(layer, q, k, v)
    video = slice(grid.prefix, None)
    wrong = out[:, video] - dense_attention(q, k, v)[:, video]
    error = wrong.square().sum((0, 1, 3)).sqrt() / dense_attention(q, k, v)[:, video].square().sum((0, 1, 3)).sqrt()
    summary = schedule.summary()
    (measured,) = summary.layers[0].measured
    assert (measured.step, measured.heads) == (7, (0, 1, 2))
    assert measured.recall.shape == measured.error.shape == (3,)
    torch.testing.assert_close(measured.error, error, atol=0.03, rtol=0.1)
    layout = pattern.token_order().layout(grid)
    q, k = layout.to_kernel(q), layout.to_kernel(k)
    indices = pattern.select(q, k, grid, PatternState(layout, 0.25)).indices
    weights = torch.einsum("bqhd,bkhd->bhqk", q, k).mul(0.25).softmax(-1)
    kept = torch.stack([indices.token_mask(int(row)) for row in indices.head_of]).view(2, 3, *weights.shape[2:])
    recall = (weights * kept).sum(-1)[:, :, : grid.video_tokens].mean((0, 2))
    torch.testing.assert_close(measured.recall, recall, atol=0.02, rtol=0.0)
    found = summary.to_dict()["layers"][0]["measured"][0]
    assert found["recall"] == pytest.approx(measured.recall.tolist(), abs=1e-4)
    assert "recall" in str(summary)
    assert "diagnostic" in str(summary)


def test_without_monitoring_nothing_is_measured() -> None:
    schedule, layer = make(ONE)
    schedule.start_forward(GRID)
    attend(layer, *pointing([1, 2]))
    assert schedule.summary().measured is None
    assert schedule.summary().to_dict()["measured"] is None


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ds.Cached(ds.Cached(ONE)), "other than Cached"),
        (lambda: ds.Cached(ONE, recall=1.0), "between 0 and 1"),
        (lambda: ds.Cached(ds.Radial(), recall=0.9), "static mask never changes"),
        (lambda: ds.Cached(ONE, recall=0.9, densities=(0.2,)), "not both"),
        (lambda: ds.Cached(ds.Radial(), densities=(0.2,)), "keep of a TopBlocks"),
        (lambda: ds.Cached(ONE, densities=(0.2, 1.5)), "keep"),
        (lambda: ds.Cached(ONE, densities=()), "tuple of shares"),
        (lambda: ds.Cached(ONE, residual=1), "residual"),
    ],
)
def test_bad_caches_are_refused(build: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
