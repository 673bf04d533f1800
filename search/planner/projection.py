"""Project what a budget per head would buy on released models, whose weights are not here: no measurement.

python -m dit_sparse.search.planner.projection --ratio docs/bundled-blocks.json --prices shipped --out projection.json

Each head gets the TopBlocks budget that holds 95 % of its softmax mass: the published share of its tokens, turned into
a share of blocks by a curve measured on another model, priced by a table of one GPU.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dit_sparse.grid import Grid
from dit_sparse.kernels.indices import BLOCK
from dit_sparse.patterns import Dense, Pattern, TopBlocks
from dit_sparse.search.planner.price_table import PriceTable, read_table
from dit_sparse.search.planner.prices import CallShape, Prices
from dit_sparse.search.report_parts import markdown_table
from dit_sparse.search.staging import write_text

MASS = 0.95
COVERED = 0.95  # share of the heads for which the third uniform budget is enough
TITLE = "Projection, not a measurement: a budget per head on released models"
LIMITS = (
    f"Budgets hold {MASS:.0%} of the softmax mass of each head in the mean over its queries and steps, as published; a "
    "head whose need changes over the steps is served too little in some and too much in others. Published shares are "
    "of tokens; those of blocks follow from a curve of another model. No clip was rendered and nothing was run."
)
HEADINGS = (
    "budget", "share of blocks", "heads below their 95 %", "attention ms of a forward", "attention", "end to end",
)  # fmt: skip
Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Model:
    """Name a model: its shares in the published file, its forward in the measured one, and its attention call.

    stock: the row of the forwards that is dense; where padded text is left out, that is no sparsity.
    """

    shares: str
    forward: str
    stock: str
    shape: CallShape


MODELS = (
    Model("wan2.1-t2v-14b", "wan2.1-14b-720p", "stock", CallShape(Grid(21, 45, 80), 1, 40, 128, "bfloat16")),
    Model(
        "hunyuanvideo-t2v", "hunyuanvideo-720p", "Dense()",
        CallShape(Grid(33, 45, 80, suffix=256), 1, 24, 128, "bfloat16"),
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Projected:
    """Hold one way to spend blocks. share: mean of the blocks that heads are given, where dense counts as all.

    broken: share of the heads that are given less than their budget. seconds: of a forward, from its measured parts.
    """

    name: str
    share: float
    broken: float
    attention_ms: float
    attention_speedup: float
    seconds: float
    speedup: float


def read_points(path: Path) -> list[tuple[float, float]]:
    """Read the curve from token shares to block shares of the order `strips`: a list `points`, or `orders` with one.

    Raises: ValueError where it is none, FileNotFoundError where there is no file.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"curve {path} does not exist: write it with `python -m dit_sparse.assets.train.block_shares`"
        )
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        values = values if "points" in values else values["orders"][TopBlocks().order]
        points = [(float(token), float(block)) for token, block in values["points"]]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"curve {path} must hold points [[share of tokens, share of blocks], ...], got {error!r}"
        ) from error
    rises = all(one[0] < two[0] and one[1] <= two[1] for one, two in itertools.pairwise(points))
    if not points or not rises or not all(0.0 < share <= 1.0 for point in points for share in point):
        raise ValueError(f"curve {path} must hold points in (0, 1] that rise in both shares, got {points}")
    return points


def block_share(token_share: float, points: Points) -> float:
    """Turn a share of tokens into one of blocks: straight in logarithms, of one ratio beyond the points.

    Never less than the tokens, nor more than all.
    """
    at = bisect_left([point[0] for point in points], token_share)
    if at in (0, len(points)):
        end = points[min(at, len(points) - 1)]
        found = token_share * end[1] / end[0]
    else:
        low, high = points[at - 1], points[at]
        slope = math.log(high[1] / low[1]) / math.log(high[0] / low[0])
        found = low[1] * (token_share / low[0]) ** slope
    return min(1.0, max(token_share, found))


def budgets_of(token_shares: Sequence[Sequence[float]], points: Points, blocks: int) -> list[list[float]]:
    """Return the share of `blocks` key blocks of each layer and head, in whole blocks, at least one."""
    return [[_whole(block_share(share, points), blocks) for share in heads] for heads in token_shares]


def layer_ms(budgets: Sequence[float], prices: Prices) -> tuple[float, list[float]]:
    """Return the least milliseconds of a layer whose heads have these budgets, and the share that each head gets.

    Heads may be dense (share 1) where that is cheaper; those with a budget share a launch.
    """
    sparse: list[Pattern] = [TopBlocks(share) for share in budgets]
    dense: list[Pattern] = [Dense()] * len(budgets)
    own = [min(pair, key=lambda one: prices.by_pattern[str(one)].head) for pair in zip(sparse, dense, strict=True)]
    ms, best = min(((prices.of(way), way) for way in (sparse, dense, own)), key=lambda pair: pair[0])
    return ms, [1.0 if isinstance(one, Dense) else share for one, share in zip(best, budgets, strict=True)]


def project(
    model: Model, token_shares: Sequence[Sequence[float]], points: Points, table: PriceTable, forwards: Sequence[Any]
) -> dict[str, Any]:
    """Project one model: dense, each head its own budget, and uniform budgets; forwards: rows of `bench forward`.

    Raises: ValueError for shares of another number of heads, a forward that is not there, or what the table lacks.
    """
    shape = model.shape
    if not token_shares or any(len(heads) != shape.heads for heads in token_shares):
        raise ValueError(f"{model.shares} must have shares of {shape.heads} heads in each layer")
    whole, rest = (_seconds(forwards, model.forward, plan) for plan in (model.stock, "without attention"))
    blocks = TopBlocks().token_order().layout(shape.grid).video_blocks
    budgets = budgets_of(token_shares, points, blocks)
    every = np.sort(np.array(budgets).flatten())
    uniform = {
        "uniform: the largest budget of any head": float(every[-1]),
        "uniform: the mean of the budgets": _whole(float(every.mean()), blocks),
        f"uniform: enough for {COVERED:.0%} of the heads": float(every[math.ceil(COVERED * len(every)) - 1]),
    }
    shares = sorted({*every.tolist(), *uniform.values()})
    prices = table.prices([TopBlocks(share) for share in shares], shape)
    dense_ms = len(budgets) * prices.of([Dense()] * shape.heads)

    def row(name: str, asked: Sequence[Sequence[float]]) -> Projected:
        found = [layer_ms(heads, prices) for heads in asked]
        ms, given = sum(one[0] for one in found), np.array([one[1] for one in found])
        seconds = rest + (whole - rest) * ms / dense_ms
        broken = float((given < np.array(budgets)).mean())
        return Projected(name, float(given.mean()), broken, ms, dense_ms / ms, seconds, whole / seconds)

    rows = [Projected("dense", 1.0, 0.0, dense_ms, 1.0, whole, 1.0), row("each head its own", budgets)]
    rows += [row(name, [[share] * shape.heads] * len(budgets)) for name, share in uniform.items()]
    return {
        "model": model.shares,
        "grid": asdict(shape.grid),
        "layers": len(budgets),
        "heads": shape.heads,
        "mean_token_share": float(np.mean(token_shares)),
        "mean_block_share": float(every.mean()),
        "uniform_block_shares": uniform,
        "dense_forward_seconds": whole,
        "forward_seconds_without_attention": rest,
        "rows": [asdict(one) for one in rows],
    }


def to_markdown(found: Mapping[str, Any]) -> str:
    """Write a projection for people."""
    lines = [f"# {found['title']}", "", found["limits"], ""]
    for model in found["models"]:
        rows = [
            (
                row["name"], f"{row['share']:.3f}", f"{row['broken']:.1%}", f"{row['attention_ms']:.0f}",
                f"{row['attention_speedup']:.2f}×", f"{row['speedup']:.2f}×",
            )
            for row in model["rows"]
        ]  # fmt: skip
        grid = "×".join(str(model["grid"][axis]) for axis in ("frames", "height", "width"))
        lines += [
            f"## {model['model']}, {grid} tokens", "",
            f"{model['layers']} layers of {model['heads']} heads. Mean share for {MASS:.0%} of the mass: "
            f"{model['mean_token_share']:.3f} of the tokens, {model['mean_block_share']:.3f} of the blocks. A dense "
            f"forward took {model['dense_forward_seconds']:.2f} s, {model['forward_seconds_without_attention']:.2f} s "
            "of it without attention (measured).", "", markdown_table(HEADINGS, rows), "",
        ]  # fmt: skip
    lines += ["## Sources", "", *(f"- {name}: {source}" for name, source in found["sources"].items()), ""]
    return "\n".join(lines)


def _whole(share: float, blocks: int) -> float:
    """Round a share up to whole blocks; what floating point adds to a whole number is none."""
    return min(blocks, max(1, math.ceil(share * blocks - 1e-9))) / blocks


def _seconds(forwards: Sequence[Any], architecture: str, plan: str) -> float:
    for row in forwards:
        if (row["architecture"], row["plan"]) == (architecture, plan):
            return float(row["seconds"])
    raise ValueError(
        f"no forward of {architecture} with the plan {plan!r} was measured: see `dit-sparse bench forward`"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    measurements = Path("docs/measurements")
    parser.add_argument("--ratio", type=Path, required=True, help="JSON with points [[token share, block share], ...]")
    parser.add_argument("--prices", default="shipped", help="shipped, or a file of `dit-sparse bench prices`")
    parser.add_argument("--shares", type=Path, default=measurements / "released-attention.json")
    parser.add_argument("--forwards", type=Path, default=measurements / "forwards-h200.json")
    parser.add_argument("--out", type=Path, required=True, help="JSON to write; a Markdown file goes beside it")
    options = parser.parse_args()
    published, forwards = (json.loads(path.read_text(encoding="utf-8")) for path in (options.shares, options.forwards))
    table, points = read_table(options.prices), read_points(options.ratio)
    models = []
    for model in MODELS:
        shares = published["models"][model.shares]
        found = project(model, shares["kept95_layer_head"], points, table, forwards["rows"])
        by_step = shares["kept95_step"]
        models.append({**found, "mean_token_share_by_step": [min(by_step), max(by_step)]})
    found = {
        "title": TITLE,
        "limits": LIMITS,
        "sources": {
            "token shares": f"{options.shares.as_posix()}: {published['source']}",
            "blocks for tokens": f"{options.ratio.as_posix()}, blocks of {BLOCK}",
            "prices": f"{table.where}, torch {table.torch_version}, Triton {table.triton_version}, {table.created}",
            "forwards": f"{options.forwards.as_posix()} ({forwards['environment']['gpu']}); "
            + ", ".join(f"{model.shares} dense is {model.stock}" for model in MODELS),
        },
        "models": models,
    }
    write_text(options.out, json.dumps(found, indent=1) + "\n")
    write_text(options.out.with_suffix(".md"), to_markdown(found))
    print(to_markdown(found))


if __name__ == "__main__":
    main()
