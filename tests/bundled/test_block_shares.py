"""Shares of keys and of key blocks behind 95 % of the mass, beside loops over single keys; the curve; the command."""

from __future__ import annotations

import json
import math
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from dit_sparse.assets.train import block_shares, measure
from dit_sparse.assets.train.attention import sampling_levels
from dit_sparse.assets.train.block_shares import LEAST_HEADS, curve, sample_blocks, shares
from dit_sparse.assets.train.parts import TextToVideo, read_trained
from dit_sparse.grid import Grid
from dit_sparse.order import TokenOrder
from dit_sparse.pipelines.bundled import FOLDER

CPU = torch.device("cpu")
RAGGED = Grid(3, 11, 13)  # 429 tokens: the last block of a run is short, tiles are ragged at three borders


def _needed(shares_of_one: list[float]) -> int:
    """Take the largest share until 95 % is reached, one by one."""
    left, mass, taken = list(shares_of_one), 0.0, 0
    while mass < 0.95:
        largest = max(left)
        left.remove(largest)
        mass += largest
        taken += 1
    return taken


def _slow(q: Tensor, k: Tensor, blocks: list[list[int]], looked_at: list[list[int]]) -> tuple[float, float]:
    """Return the token and the block share of one head: q, k [S, D]; blocks of token numbers."""
    of_rows, of_blocks = [], []
    for rows in looked_at:
        mass = [0.0] * len(blocks)
        for row in rows:
            logits = [float(q[row] @ key) / math.sqrt(q.shape[1]) for key in k]
            top = max(logits)
            total = sum(math.exp(one - top) for one in logits)
            weights = [math.exp(one - top) / total for one in logits]
            of_rows.append(_needed(weights) / len(weights))
            for number, tokens in enumerate(blocks):
                mass[number] += sum(weights[token] for token in tokens) / len(rows)
        of_blocks.append(_needed(mass) / len(blocks))
    return sum(of_rows) / len(of_rows), sum(of_blocks) / len(of_blocks)


# runs of 128 tokens; a curve that reorders them; tiles of unequal size
@pytest.mark.parametrize("order", ["raster", "strips:2x3", "tile:2x4x5"])
def test_shares_are_those_of_a_loop_over_keys(order: str) -> None:
    q, k = torch.randn(2, 2, 2, RAGGED.tokens, 8)
    q = q * torch.tensor([1.0, 4.0])[:, None, None]  # one diffuse and one sharp head
    index = TokenOrder.parse(order).layout(RAGGED).video_index().tolist()
    blocks = [[token for token in tokens if token >= 0] for tokens in index]
    sampled = sample_blocks(TokenOrder.parse(order), RAGGED, 2, random.randrange(1000), CPU)
    looked_at = [rows.tolist() for rows in sampled.query_blocks]
    assert all(rows in blocks for rows in looked_at)
    found = shares(q, k, sampled)
    assert found.shape == (2, 2, 2)
    for sample in range(2):
        for head in range(2):
            tokens, of_blocks = _slow(q[sample, head].double(), k[sample, head].double(), blocks, looked_at)
            # fp32 sums may meet 95 % one key earlier or later in a few rows; a block's mass is summed in fp64
            assert float(found[0, sample, head]) == pytest.approx(tokens, abs=0.05 / RAGGED.tokens)
            assert float(found[1, sample, head]) == pytest.approx(of_blocks, abs=1e-9)


def test_a_block_with_all_the_mass_is_read_alone_and_even_mass_needs_95_percent() -> None:
    grid = Grid(8, 16, 16)  # 16 blocks of 128
    sampled = sample_blocks(TokenOrder("raster"), grid, 3, 0, CPU)
    q, k = torch.ones(1, 2, grid.tokens, 4), torch.zeros(1, 2, grid.tokens, 4)
    at = random.randrange(16)
    k[:, 1, 128 * at : 128 * at + 128] = 20.0
    token_share, block_share = shares(q, k, sampled)[:, 0].tolist()
    assert token_share == pytest.approx([math.ceil(0.95 * 2048) / 2048, math.ceil(0.95 * 128) / 2048], abs=2 / 2048)
    assert block_share == [1.0, 1 / 16]  # 15 of 16 blocks are 93.75 %


@pytest.mark.parametrize("order", ["raster", "strips", "tile"])
def test_sampled_blocks_spread_over_the_sequence(order: str) -> None:
    grid = Grid(17, 16, 16)
    draws = {seed: sample_blocks(TokenOrder(order), grid, 8, seed, CPU) for seed in range(5)}
    for sampled in draws.values():
        numbers = [int(sampled.key_block_of[rows[0]]) for rows in sampled.query_blocks]
        run = sampled.key_blocks / 8
        assert all(run * at - 1 < number < run * (at + 1) for at, number in enumerate(numbers))
        assert numbers == sorted(set(numbers))
        assert all(
            (sampled.key_block_of[rows] == n).all() for rows, n in zip(sampled.query_blocks, numbers, strict=True)
        )
        assert int(sampled.key_block_of.bincount().max()) <= 128
    assert len({tuple(int(rows[0]) for rows in sampled.query_blocks) for sampled in draws.values()}) > 1
    every = sample_blocks(TokenOrder(order), grid, 10_000, 0, CPU)
    assert len(every.query_blocks) == every.key_blocks
    assert torch.cat(every.query_blocks).sort().values.equal(torch.arange(grid.tokens))


def test_no_query_blocks_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one query block must be sampled, got 0"):
        sample_blocks(TokenOrder("raster"), RAGGED, 0, 0, CPU)


def test_the_curve_rises_through_enough_heads_and_follows_a_law() -> None:
    tokens = np.exp(np.random.uniform(math.log(1e-4), 0.0, size=360))
    noisy = np.minimum(1.0, 4 * tokens ** np.random.uniform(0.5, 1.0)) * np.random.uniform(0.3, 1.0, size=360)
    points = np.array(curve(tokens, noisy))
    assert (np.diff(points[:, 0]) > 0).all()
    assert (np.diff(points[:, 1]) >= 0).all()
    assert tokens.min() <= points[0, 0] < points[-1, 0] <= tokens.max()
    assert noisy.min() <= points[0, 1] <= points[-1, 1] <= noisy.max()
    shuffled = np.random.permutation(360)
    assert curve(tokens[shuffled], noisy[shuffled]) == points.tolist()
    for low, high in zip(points[:-1, 0], points[1:, 0], strict=True):
        # half a bin of heads lies between its median and its border, on both sides of the border
        assert ((tokens >= low) & (tokens <= high)).sum() >= LEAST_HEADS
    law = np.array(curve(tokens, 0.3 * tokens))
    assert len(law) > 8
    np.testing.assert_allclose(law[:, 1], 0.3 * law[:, 0], atol=2e-7)


def test_the_curve_never_falls_and_bins_of_few_heads_join_others() -> None:
    tokens = np.array([0.001] * LEAST_HEADS + [0.01] * (LEAST_HEADS - 1) + [0.1] * LEAST_HEADS + [1.0])
    blocks = np.array([0.3] * LEAST_HEADS + [0.2] * (LEAST_HEADS - 1) + [0.1] * LEAST_HEADS + [0.9])
    points = curve(tokens, blocks)
    # .01 waits for .1, and the single head at 1 joins them; their median, .1, is under the .3 before
    assert points == [[0.001, 0.3], [0.1, 0.3]]
    assert curve(tokens[:2], blocks[:2]) == [[0.001, 0.3]]
    one_bin = np.linspace(0.01, 0.0105, LEAST_HEADS)
    left_over = np.ones(LEAST_HEADS - 1)  # moves the median from the middle of the bin to its end
    assert curve(np.append(one_bin, left_over), np.append(2 * one_bin, left_over)) == [[0.0105, 0.021]]


def test_the_command_measures_writes_and_prints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "blocks.json"
    given = ["--bundled", str(FOLDER), "--height", "16", "--steps", "2", "--every", "1", "--clips", "1"]
    monkeypatch.setattr(sys, "argv", ["block_shares", *given, "--orders", "raster", "strips", "--out", str(out)])
    block_shares.main()
    printed = capsys.readouterr().out
    measured = json.loads(out.read_text())
    assert (measured["tokens"], measured["grid"], measured["steps"]) == (272, [17, 4, 4], [0, 1])
    latents, ids = measure.held_out(torch.tensor([0]), 16)
    model = read_trained(FOLDER).eval()
    expected = [measure.attention(model, latents, ids, level, queries=272).by_head for level in sampling_levels(2)]
    for order in ("raster", "strips"):
        one = measured["orders"][order]
        assert (one["query_blocks"], one["key_blocks"]) == (3, 3)
        # Every row was looked at, in whatever order: but for rounding it is what the other measure finds.
        short = np.array(one["by_step"]["token_share"])
        assert short.shape == np.array(one["by_step"]["block_share"]).shape == (2, 6, 6)
        if order == "raster":
            first = short
        np.testing.assert_allclose(short, first, atol=2e-6)
        np.testing.assert_allclose(short, expected, atol=1e-5)
        assert one["points"] == curve(short.flatten(), np.array(one["by_step"]["block_share"]).flatten())
        assert f"| {order} | 3 of 3 | {short.mean():.4f} / {np.median(short):.4f} |" in printed
    monkeypatch.setattr(sys, "argv", ["block_shares", "--measured", str(out)])
    block_shares.main()
    assert capsys.readouterr().out.strip() in printed


def test_a_missing_folder_is_told_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = ["--bundled", str(FOLDER), "--out", str(tmp_path / "none" / "x.json")]
    monkeypatch.setattr(sys, "argv", ["block_shares", *given])
    with pytest.raises(SystemExit):
        block_shares.main()


def test_attention_that_is_not_seen_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "denoising_error", lambda *_: 0.0)
    with pytest.raises(RuntimeError, match=r"6 self-attention layers over 272 tokens.* saw 0 such calls"):
        block_shares.measure_orders(TextToVideo(), 16, ["raster"], 1, 1, 1, 1, CPU)
