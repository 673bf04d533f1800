"""How many key blocks a kernel must read for 95 % of the bundled model's softmax mass, beside how many keys hold it.

python -m dit_sparse.assets.train.block_shares --bundled assets/bundled --height 128 --out docs/bundled-blocks.json

The JSON: `orders` has, by token order, `by_step` with `token_share` and `block_share`, both [steps measured][layers]
[heads], and `points`, pairs of token and block share of which both rise, to interpolate between log-log.
"""

from __future__ import annotations

import argparse
import itertools
import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dit_sparse.assets.train import measure
from dit_sparse.assets.train.attention import sampling_levels
from dit_sparse.assets.train.parts import TextToVideo, read_trained, write_json
from dit_sparse.grid import Grid
from dit_sparse.kernels.indices import BLOCK
from dit_sparse.order import TokenOrder

ORDERS = ("raster", "strips", "tile")
CURVE_BINS = 16  # of the token share, in equal ratios from the least to the largest
LEAST_HEADS = 6  # behind a point of the curve, each step of a head counted
TABLE_EDGES = (0.0, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


@dataclass(frozen=True)
class SampledBlocks:
    """Hold the query blocks of a token order that are looked at, and all of its key blocks."""

    query_blocks: tuple[Tensor, ...]  # int64 [1 to 128] each: raster numbers of the block's tokens
    key_block_of: Tensor  # int64 [tokens]: the block of each token, by raster number
    key_blocks: int


def sample_blocks(order: TokenOrder, grid: Grid, count: int, seed: int, device: torch.device) -> SampledBlocks:
    """Draw `count` query blocks, one in each of as many equal runs of the sequence; all where there are fewer.

    Raises: ValueError for a count under 1.
    """
    if count < 1:
        raise ValueError(f"at least one query block must be sampled, got {count}; give more with --blocks")
    index = order.layout(grid).video_index()
    count = min(count, len(index))
    edges = torch.arange(count + 1) * len(index) // count
    within = torch.rand(count, generator=torch.Generator().manual_seed(seed))
    picked = edges[:-1] + (within * edges.diff()).long()
    key_block_of = torch.empty(grid.video_tokens, dtype=torch.int64)
    for number, tokens in enumerate(index):
        key_block_of[tokens[tokens >= 0]] = number
    rows = tuple(tokens[tokens >= 0].to(device) for tokens in index[picked])
    return SampledBlocks(rows, key_block_of.to(device), len(index))


def shares(query: Tensor, key: Tensor, sampled: SampledBlocks) -> Tensor:
    """Return the shares of keys and of key blocks behind 95 % of the mass, fp64 [2, B, H]; query, key [B, H, S, D].

    Keys: the fewest of each row, mean over the rows of the sampled query blocks. Key blocks: the fewest of which the
    rows of a query block read that much in the mean, those with the largest mass; mean over the query blocks.
    """
    keys_needed, blocks_needed = [], []
    with torch.autocast(query.device.type, enabled=False):  # it would round the scores to bf16
        transposed = key.float().transpose(-1, -2) * key.shape[-1] ** -0.5
        for rows in sampled.query_blocks:
            weights = (query[:, :, rows].float() @ transposed).softmax(dim=-1)
            keys_needed.append(measure.count_for_mass(weights))
            of_keys = weights.mean(dim=-2, dtype=torch.float64)
            of_blocks = of_keys.new_zeros(*of_keys.shape[:-1], sampled.key_blocks)
            blocks_needed.append(measure.count_for_mass(of_blocks.index_add_(-1, sampled.key_block_of, of_keys)))
    token_share = torch.cat(keys_needed, dim=-1).double().mean(dim=-1) / key.shape[-2]
    block_share = torch.stack(blocks_needed, dim=-1).double().mean(dim=-1) / sampled.key_blocks
    return torch.stack([token_share, block_share])


def look_at_orders(query: Tensor, key: Tensor, sampled: list[SampledBlocks]) -> Tensor:
    """Return `shares` in every order, mean over the batch: fp64 [orders, 2, H]."""
    return torch.stack([shares(query, key, one).mean(dim=1) for one in sampled]).cpu()


def measure_orders(
    model: TextToVideo,
    height: int,
    orders: list[str],
    steps: int,
    every: int,
    clips: int,
    blocks: int,
    device: torch.device,
) -> dict[str, Any]:
    """Measure every `every`-th of `steps` sampling steps on held-out clips noised to their levels.

    Clips go one by one and query blocks too, so 16 GiB are enough at 17,408 tokens. Each clip has query blocks of its
    own, the same at all steps.

    Raises: RuntimeError where a layer's attention was not seen.
    """
    numbers = list(range(0, steps, every))
    levels = sampling_levels(steps)
    layers, heads = len(model.transformer.blocks), model.transformer.config.num_attention_heads
    found = np.zeros((len(numbers), clips, layers, len(orders), 2, heads))
    for clip in range(clips):
        latents, ids = measure.held_out(torch.tensor([clip], device=device), height)
        grid = Grid(latents.shape[2], latents.shape[3] // 2, latents.shape[4] // 2)  # patches of 1×2×2
        sampled = [sample_blocks(TokenOrder.parse(order), grid, blocks, clip, device) for order in orders]
        for at, number in enumerate(numbers):
            spy = measure.AttentionSpy(grid.tokens, partial(look_at_orders, sampled=sampled))
            with spy, torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                measure.denoising_error(model, latents, ids, levels[number])
            if len(spy.found) != layers:
                raise RuntimeError(
                    f"the model has {layers} self-attention layers over {grid.tokens} tokens, but torch's "
                    f"scaled_dot_product_attention saw {len(spy.found)} such calls; leave diffusers' attention backend "
                    "at native and choose a height of which the tokens are not those of the text"
                )
            found[at, clip] = torch.stack(spy.found).numpy()
    token_share, block_share = found.mean(axis=1).round(6).transpose(3, 2, 0, 1, 4)  # [orders, steps, layers, heads]
    return {
        "tokens": grid.tokens, "grid": grid.shape, "block_tokens": BLOCK, "mass": measure.MASS, "of_steps": steps,
        "steps": numbers, "clips": clips,
        "orders": {
            order: {
                "query_blocks": len(sampled[i].query_blocks),
                "key_blocks": sampled[i].key_blocks,
                "points": curve(token_share[i].flatten(), block_share[i].flatten()),
                "by_step": {"token_share": token_share[i].tolist(), "block_share": block_share[i].tolist()},
            }
            for i, order in enumerate(orders)
        },
    }  # fmt: skip


def curve(token_share: np.ndarray, block_share: np.ndarray) -> list[list[float]]:
    """Return [token share, block share] along both [n]: the first rises strictly, the second never falls.

    Medians of bins of the token share in equal ratios; a bin of fewer than LEAST_HEADS joins the next one, the last
    the one before. The block share is the largest median up to its bin.
    """
    edges = np.geomspace(token_share.min(), token_share.max(), CURVE_BINS + 1)
    bin_of = np.searchsorted(edges[1:-1], token_share, side="right")
    groups: list[list[int]] = []
    waiting: list[int] = []
    for number in range(CURVE_BINS):
        waiting += np.flatnonzero(bin_of == number).tolist()
        if len(waiting) >= LEAST_HEADS:
            groups.append(waiting)
            waiting = []
    if groups:
        groups[-1] += waiting
    else:
        groups.append(waiting)
    tokens = [np.median(token_share[group]) for group in groups]
    blocks = np.maximum.accumulate([np.median(block_share[group]) for group in groups])
    return np.stack([tokens, blocks], axis=1).round(7).tolist()


def table(measured: dict[str, Any]) -> str:
    """Return Markdown: shares by order, then ratios of block to token share by token share, step, layer and head."""
    orders = measured["orders"]
    by_order = {
        order: (np.array(one["by_step"]["token_share"]), np.array(one["by_step"]["block_share"]))
        for order, one in orders.items()
    }
    lines = [
        f"{measured['tokens']:,} tokens, every step of a head counted:", "",
        "| order | query blocks of | token share: mean / median | block share: mean / median | ratio of means "
        "| median ratio |", "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for order, (tokens, blocks) in by_order.items():
        lines.append(
            f"| {order} | {orders[order]['query_blocks']} of {orders[order]['key_blocks']} "
            f"| {tokens.mean():.4f} / {np.median(tokens):.4f} | {blocks.mean():.4f} / {np.median(blocks):.4f} "
            f"| {blocks.mean() / tokens.mean():.2f} | {np.median(blocks / tokens):.2f} |"
        )
    lines += ["", "Median ratio (number of heads) by token share:", ""]
    lines += _header("token share", list(by_order))
    for low, high in itertools.pairwise(TABLE_EDGES):
        cells = []
        for tokens, blocks in by_order.values():
            within = (tokens > low) & (tokens <= high)
            cells.append(f"{np.median((blocks / tokens)[within]):.2f} ({within.sum()})" if within.any() else "")
        lines.append(f"| {low:g} to {high:g} | {' | '.join(cells)} |")
    lines += ["", "Ratio of the means over layers and heads by sampling step:", ""]
    lines += _header(f"step of {measured['of_steps']}", list(by_order))
    for at, number in enumerate(measured["steps"]):
        cells = [f"{blocks[at].mean() / tokens[at].mean():.2f}" for tokens, blocks in by_order.values()]
        lines.append(f"| {number} | {' | '.join(cells)} |")
    for order, (tokens, blocks) in by_order.items():
        ratio = blocks.mean(axis=0) / tokens.mean(axis=0)
        lines += ["", f"Ratio of the means over steps by layer and head, {order}:", ""]
        lines += _header("layer", [f"head {head}" for head in range(ratio.shape[1])])
        lines += [f"| {layer} | {' | '.join(f'{one:.2f}' for one in heads)} |" for layer, heads in enumerate(ratio)]
    return "\n".join(lines)


def _header(first: str, others: list[str]) -> list[str]:
    return [f"| {' | '.join([first, *others])} |", "|---" * (len(others) + 1) + "|"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--bundled", type=Path, help="folder of the pipeline, or of trained shards")
    source.add_argument("--measured", type=Path, help="JSON that --out wrote: only print its tables")
    parser.add_argument("--height", type=int, default=128)
    parser.add_argument("--orders", nargs="+", default=list(ORDERS), help="token orders, as in tile:2x8x8")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--every", type=int, default=3)
    parser.add_argument("--clips", type=int, default=2)
    parser.add_argument("--blocks", type=int, default=16, help="query blocks looked at; all where there are fewer")
    parser.add_argument("--out", type=Path, help="JSON to write")
    options = parser.parse_args()
    if options.out and not options.out.parent.is_dir():
        parser.error(f"--out: the folder {options.out.parent} does not exist; make it first")

    if options.measured:
        measured = json.loads(options.measured.read_text())
    else:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model = read_trained(options.bundled).to(device).eval()
        measured = measure_orders(
            model, options.height, options.orders, options.steps, options.every, options.clips, options.blocks, device
        )
    if options.out:
        write_json(options.out, measured)
    print(table(measured))


if __name__ == "__main__":
    main()
