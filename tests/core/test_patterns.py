"""Every pattern against a definition written a second time, slowly, and its blocks against its token mask."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import dit_sparse as ds
from dit_sparse.patterns import PATTERNS, PatternState, StaticPattern, pattern_from_dict, pattern_from_text
from dit_sparse.patterns.base import static_selection, video_blocks_of

EXAMPLES: dict[str, list[ds.Pattern]] = {
    "dense": [ds.Dense()],
    "skip": [ds.Skip()],
    "neighborhood": [
        ds.Neighborhood(window=0.4),
        ds.Neighborhood(window=(1, 0.5, 1.0), stride=(1, 2, 3), order="raster"),
        ds.Neighborhood(window=(0.3, 2, 2), dilation=(1, 2, 1), causal=(True, False, True), order="morton"),
    ],
    "radial": [ds.Radial(), ds.Radial(sink=False), ds.Radial(kind="block", decay=0.5)],
    "topblocks": [ds.TopBlocks(keep=0.3), ds.TopBlocks(keep=1.0, order="raster")],
    "cached": [ds.Cached(ds.TopBlocks(keep=0.5), refresh_steps=2)],
}
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
def test_json_round_trip(pattern: ds.Pattern) -> None:
    assert pattern_from_dict(pattern.to_dict()) == pattern


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


def window_by_hand(length: int, w: int, s: int, d: int, causal: bool, i: int) -> set[int]:
    """Keys of query i on one axis, as the definition reads: within the query's residue class, a shifted window."""
    members = [x for x in range(length) if x % d == i % d]
    place, last = members.index(i), len(members) - 1
    if causal:
        leader = min(place - place % s + s - 1, last)
        return set(members[max(0, leader - w + 1) : place + 1])
    leader = min(place - place % s + s // 2, last)
    start = min(max(0, leader - w // 2), last + 1 - w)
    return set(members[start : start + w])


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_neighborhood_is_the_product_of_three_windows(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.integers(1, 6)) for _ in range(3))
    dilation = tuple(data.draw(st.integers(1, n)) for n in shape)
    window = tuple(data.draw(st.integers(1, n // d)) for n, d in zip(shape, dilation, strict=True))
    stride = tuple(data.draw(st.integers(1, w)) for w in window)
    causal = tuple(data.draw(st.booleans()) for _ in range(3))
    mask = ds.Neighborhood(window, stride, dilation, causal).token_mask(ds.Grid(*shape))
    places = list(itertools.product(*map(range, shape)))
    for q, query in enumerate(places):
        per_axis = [
            window_by_hand(*arguments) for arguments in zip(shape, window, stride, dilation, causal, query, strict=True)
        ]
        expected = [all(x in keys for x, keys in zip(key, per_axis, strict=True)) for key in places]
        assert mask[q].tolist() == expected


@settings(max_examples=60, deadline=None)
@given(GRIDS, st.booleans())
def test_radial_follows_the_papers_rule(grid: ds.Grid, sink: bool) -> None:
    grid = ds.Grid(*grid.shape)
    s, mask = grid.frame_tokens, ds.Radial(sink=sink).token_mask(grid)
    for i, j in itertools.product(range(grid.frames), repeat=2):
        distance, power = abs(i - j), 1
        while power * 2 <= distance:
            power *= 2
        for k, m in itertools.product(range(s), repeat=2):
            if power <= s:
                kept = (abs(k - m) + 1) * power <= s
            else:
                kept = k == m and distance % (-(-power // s)) == 0
            assert bool(mask[i * s + k, j * s + m]) == (kept or (sink and j == 0))


def test_radial_grows_like_n_log_n() -> None:
    pairs = [int(ds.Radial(sink=False).token_mask(ds.Grid(frames, 4, 4)).sum()) for frames in (8, 16, 32, 64)]
    growth = [many / few for few, many in itertools.pairwise(pairs)]
    assert growth == sorted(growth, reverse=True), "the factor per doubling falls towards 2; n squared would stay at 4"
    assert growth[-1] < 2.5


def published_radial_by_hand(grid: ds.Grid, decay: float, sink: bool) -> list[list[bool]]:
    """The published code's mask as METHODS describes it, with plain loops over frame pairs and blocks."""
    s, n = grid.frame_tokens, grid.video_tokens
    token = torch.zeros(n, n, dtype=torch.bool)
    for i, j in itertools.product(range(grid.frames), repeat=2):
        distance = abs(i - j)
        width = 2.0 ** s.bit_length() / 2.0 ** distance.bit_length()
        window = s if distance <= 1 else max(width * decay, 128)
        if (width < 128 and distance % int(128 / width) != 0) and not (sink and j == 0):
            continue
        rows, columns = torch.arange(s)[:, None], torch.arange(s)
        near = torch.ones(s, s, dtype=torch.bool) if sink and j == 0 else (rows - columns).abs() <= window
        token[i * s : (i + 1) * s, j * s : (j + 1) * s] = near
    kept = []
    for rows in token.split(128):
        kept.append([])
        for part in rows.split(128, dim=1):
            share = part.float().mean(0)
            kept[-1].append(bool((share > 1 / 3).sum() > 0.6 * (share > 0).sum()))
    return kept


@pytest.mark.parametrize(
    ("grid", "decay", "sink"),
    [
        (ds.Grid(12, 16, 16), 0.2, True),  # a frame is two blocks
        (ds.Grid(9, 13, 17), 0.95, False),  # blocks straddle frames, the last one is short
        (ds.Grid(20, 5, 7), 0.5, True),  # a frame is smaller than a block: the frame frequency drops
    ],
)
def test_radial_block_form_is_the_published_one(grid: ds.Grid, decay: float, sink: bool) -> None:
    mask = ds.Radial(kind="block", decay=decay, sink=sink).block_mask(grid)
    assert mask.tolist() == published_radial_by_hand(grid, decay, sink)


@settings(max_examples=40, deadline=None)
@given(GRIDS, st.floats(0.01, 1.0), st.integers(0, 2**31))
def test_topblocks_keeps_the_best_blocks(grid: ds.Grid, keep: float, seed: int) -> None:
    pattern = ds.TopBlocks(keep=keep, order="tile:2x3x4")
    layout = pattern.token_order().layout(grid)
    generator = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(2, grid.tokens, 3, 16, generator=generator) for _ in range(2))
    selection = pattern.select(q, k, grid, PatternState(layout, 0.25))
    chosen = video_blocks_of(selection.indices, layout).unflatten(0, (2, 3))
    blocks = [slice(int(s), int(s + n)) for s, n in zip(layout.start, layout.length, strict=True)]
    blocks = blocks[: layout.video_blocks]
    count = pattern.kept_blocks(len(blocks))
    for b, h in itertools.product(range(2), range(3)):
        for row, query in enumerate(blocks):
            mean_q = q[b, query, h].mean(0)
            score = torch.stack([mean_q @ k[b, at, h].mean(0) * 0.25 for at in blocks])
            score += torch.tensor([float(at.stop - at.start) for at in blocks]).log()
            worst_kept, best_left = score[chosen[b, h, row]].min(), score[~chosen[b, h, row]]
            assert int(chosen[b, h, row].sum()) == count
            assert not best_left.numel() or worst_kept >= best_left.max() - 1e-5
    text = ds.Grid(*grid.shape, grid.prefix, grid.suffix).text_tokens
    if text:
        whole = selection.indices.block_mask()
        assert whole[:, layout.video_blocks :].all()
        assert whole[:, :, layout.video_blocks :].all()


def test_topblocks_ties_go_to_the_lower_block() -> None:
    pattern, grid = ds.TopBlocks(keep=0.5, order="raster"), ds.Grid(4, 8, 16)
    layout = pattern.token_order().layout(grid)
    flat = torch.ones(1, grid.tokens, 1, 8)
    chosen = video_blocks_of(pattern.select(flat, flat, grid, PatternState(layout, 1.0)).indices, layout)
    assert chosen[0].tolist() == [[True, True, False, False]] * 4


def test_cached_selects_again_after_refresh_steps() -> None:
    pattern, grid = ds.Cached(ds.TopBlocks(keep=0.25, order="raster"), refresh_steps=3), ds.Grid(8, 8, 16)
    layout, memory = pattern.token_order().layout(grid), {}
    chosen = []
    for step in (0, 1, 2, 3, 4, 9, 1):
        q, k = (torch.randn(1, grid.tokens, 1, 8) for _ in range(2))
        chosen.append(pattern.select(q, k, grid, PatternState(layout, 1.0, step, {}, memory)))
    reused = [later is earlier for earlier, later in itertools.pairwise(chosen)]
    assert reused == [True, True, False, True, False, False], "fresh at steps 3, 9 and when the step goes back"


@pytest.mark.parametrize("grid", [ds.Grid(3, 5, 7, suffix=9), ds.Grid(2, 9, 16, prefix=3)], ids=str)
@pytest.mark.parametrize("pattern", ALL, ids=str)
def test_attention_equals_the_masked_oracle(pattern: ds.Pattern, grid: ds.Grid) -> None:
    q, k, v = (torch.randn(2, grid.tokens, 4, 24) for _ in range(3))
    layout = pattern.token_order().layout(grid)
    order = torch.arange(grid.tokens) if layout.order is None else layout.order
    if isinstance(pattern, StaticPattern):
        mask = pattern.token_mask(grid).expand(8, -1, -1)
    else:
        indices = pattern.select(q[:, order], k[:, order], grid, PatternState(layout, 24**-0.5)).indices
        mask = torch.empty(8, grid.tokens, grid.tokens, dtype=torch.bool)
        for head, row in enumerate(indices.head_of.tolist()):
            mask[head][order[:, None], order] = indices.token_mask(row)
    logits = torch.einsum("bqhd,bkhd->bhqk", q.double(), k.double()) * 24**-0.5
    logits = logits.masked_fill(~mask.view(2, 4, grid.tokens, grid.tokens), -torch.inf)
    expected = torch.einsum("bhqk,bkhd->bqhd", logits.softmax(-1).nan_to_num(), v.double())
    out, lse = ds.sparse_attention(q, k, v, pattern, grid, backend="cpu", return_lse=True)
    assert (out - expected).abs().max() < 1e-5
    torch.testing.assert_close(lse, logits.logsumexp(-1).transpose(1, 2).float(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ds.Neighborhood(window=0), "window"),
        (lambda: ds.Neighborhood(window=1.5), "window"),
        (lambda: ds.Neighborhood(window=(1, 2)), "three"),
        (lambda: ds.Neighborhood(window=True), "window"),
        (lambda: ds.Neighborhood(window=3, stride=0), "stride"),
        (lambda: ds.Neighborhood(window=3, causal=1), "causal"),
        (lambda: ds.Neighborhood(window=9).check(ds.Grid(3, 9, 9)), "frames window=9 on 3 tokens"),
        (lambda: ds.Neighborhood(window=2, dilation=2).check(ds.Grid(3, 9, 9)), "dilation"),
        (lambda: ds.Neighborhood(window=2, stride=3).check(ds.Grid(9, 9, 9)), "stride"),
        (lambda: ds.Radial(kind="spiral"), "kind"),
        (lambda: ds.Radial(decay=0.0), "decay"),
        (lambda: ds.TopBlocks(keep=0), "keep"),
        (lambda: ds.TopBlocks(keep=1.2), "keep"),
        (lambda: ds.Cached(pattern="topblocks"), "Pattern"),
        (lambda: ds.Cached(ds.TopBlocks(), refresh_steps=0), "refresh_steps"),
        (lambda: pattern_from_text("cached:refresh_steps=2"), "needs the field 'pattern'"),
        (lambda: pattern_from_text("topblock"), "unknown pattern 'topblock'; known: dense"),
        (lambda: pattern_from_text("topblocks:kep=0.2"), "no field 'kep'; its fields are keep, order"),
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
