"""What `dit-sparse bench kernels` measures: a table of sections, each a few units that one process runs in turn."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dit_sparse.grid import Grid
from dit_sparse.kernels.bench import block_indices, kept_blocks
from dit_sparse.kernels.contenders import (
    CUDNN,
    FA4_DENSE,
    OWN,
    Contender,
    Inputs,
    kernel,
    whole_call,
    with_means,
)
from dit_sparse.kernels.indices import BLOCK, segment_blocks
from dit_sparse.patterns import Neighborhood, Pattern, PatternState, TopBlocks
from dit_sparse.search.kernel_job import Entry, Job
from dit_sparse.search.kernel_launches import launch_choices, launch_contenders
from dit_sparse.search.kernel_selection import host, selection
from dit_sparse.search.kernel_shapes import GRIDS, SHAPES, blocks_of, draw, even_inputs, pairs_of

HEAD_DIM = 128  # of the sections on grids
DENSITY = 0.25  # of the sections about masks and grids
HEAD_DENSITIES = Path(__file__).with_name("head_density.json")
EVEN_GRID = Grid(20, 32, 56)  # 4×4×8 tiles of 128 tokens divide it: the peers with masks take it


@dataclass(frozen=True)
class Section:
    """Name what is measured; run does one unit."""

    what: str
    units: tuple[str, ...]
    run: Callable[[str, Job], None]
    usual: bool = True  # part of a run that names no section


def full(unit: str, job: Job) -> None:
    """Time full 128-blocks: unit is `shape@density`."""
    shape, density = SHAPES[unit.split("@")[0]], float(unit.split("@")[1])
    count = max(1, round(density * shape.blocks))
    inputs = even_inputs(shape, [count] * shape.heads, job.spec.device)
    sparse = [kernel(name) for name in job.spec.backends if density < 1.0 or name in OWN]
    calls = [whole_call(name) for name in job.spec.backends if name in OWN and density < 1.0]
    dense = [CUDNN, FA4_DENSE] if density == 1.0 and "fa4" in job.spec.backends else [CUDNN]
    job.measure([Entry(one, inputs) for one in (*dense, *sparse, *calls)], _work(inputs, shape.head_dim))


def partial(unit: str, job: Job) -> None:
    """Time masked blocks beside the same lists read whole, over as many blocks of 128 tokens."""
    if unit == "even_grid":
        grid, heads, pattern = EVEN_GRID, 12, Neighborhood(order="tile:4x4x8")
    else:
        grid, heads = GRIDS[unit]
        pattern = Neighborhood()
    fitted = pattern.nearest(grid, DENSITY, job.spec.device)[0]
    inputs = _chosen(fitted, grid, heads, job.spec.device)
    visited, masked = blocks_of(inputs)
    start, length = (x.to(job.spec.device) for x in segment_blocks([BLOCK * inputs.indices.key_blocks]))
    whole = replace(
        inputs.indices, q_start=start, q_len=length, kv_start=start, kv_len=length, partial_bits=None, mask_id=None,
        masks=None,
    )  # fmt: skip
    twin = Inputs(*draw(BLOCK * whole.key_blocks, heads, HEAD_DIM, job.spec.device), whole)
    numbers = {"visited_blocks": visited}
    peers = ("flex",) if unit == "even_grid" else ()  # short blocks amid the sequence are beyond it
    names = [name for name in job.spec.backends if name in (*OWN, *peers)]
    share = {"masked_share": masked / visited}
    entries = [Entry(kernel(name), inputs, _work(inputs) | share) for name in names]
    entries += [Entry(kernel(name), twin, _work(twin), f"{name} whole") for name in names]
    job.measure(entries, numbers)


def ragged(unit: str, job: Job) -> None:
    """Time blocks as the usual order cuts them on a real grid, beside 128-blocks of about as many tokens."""
    grid, heads = GRIDS[unit]
    layout = TopBlocks().token_order().layout(grid, job.spec.device)
    indices = []
    for start, length in (
        (layout.start, layout.length),
        tuple(x.to(job.spec.device) for x in segment_blocks([BLOCK * round(grid.tokens / BLOCK)])),
    ):
        counts = [max(1, round(DENSITY * len(start)))] * heads
        even = block_indices(kept_blocks(counts, len(start), job.spec.device), BLOCK * len(start), BLOCK * len(start))
        indices.append(replace(even, q_start=start, q_len=length, kv_start=start, kv_len=length))
    real, even_grid = (Inputs(*draw(int(one.kv_len.sum()), heads, HEAD_DIM, job.spec.device), one) for one in indices)
    own = [name for name in job.spec.backends if name in OWN]
    numbers = {"blocks": layout.blocks, "tokens_per_block": grid.tokens / layout.blocks}
    entries = [Entry(kernel(name), real, _work(real)) for name in own]
    entries += [Entry(kernel(name), even_grid, _work(even_grid), f"{name} even") for name in own]
    job.measure(entries, numbers)


def uneven(unit: str, job: Job) -> None:
    """Time heads that keep as much as a real layer's do beside heads that keep their mean: unit is `shape@layer`."""
    name, layer = unit.split("@")
    found = json.loads(HEAD_DENSITIES.read_text())["kept95"][layer]
    shape = SHAPES[name]
    densities = random.sample(found, shape.heads)  # a layer has 40 heads
    counts = [max(1, round(density * shape.blocks)) for density in densities]
    mean = sum(counts) / len(counts)
    rounded = [int(mean)] * shape.heads
    for head in range(round(sum(counts) - sum(rounded))):
        rounded[head] += 1
    entries = []
    for label, each in (("", counts), ("even", rounded)):
        inputs = even_inputs(shape, each, job.spec.device)
        for backend in [name for name in job.spec.backends if name in (*OWN, "fa4")]:
            entries.append(Entry(kernel(backend), inputs, _work(inputs), f"{backend} {label}".strip()))
    job.measure(entries, {"mean_density": mean / shape.blocks, "largest_density": max(counts) / shape.blocks})


def compensation(unit: str, job: Job) -> None:
    """Time launches with and without the means of skipped blocks: unit is `shape@density`. Both write the LSE."""
    shape, density = SHAPES[unit.split("@")[0]], float(unit.split("@")[1])
    count = max(1, round(density * shape.blocks))
    inputs = even_inputs(shape, [count] * shape.heads, job.spec.device)
    own = [name for name in job.spec.backends if name in OWN]
    contenders: list[Contender] = [kernel(name) for name in own] + [with_means(name) for name in own]
    # the means of 128 blocks are one block of keys
    numbers = {"kept_blocks": float(count), "pooled_blocks": float(-(-shape.blocks // BLOCK))}
    job.measure([Entry(one, inputs) for one in contenders], {**_work(inputs), **numbers})


def launches(unit: str, job: Job) -> None:
    """Time the launch configurations of our own kernels one by one: unit is `shape@density`."""
    shape, density = SHAPES[unit.split("@")[0]], float(unit.split("@")[1])
    inputs = even_inputs(shape, [max(1, round(density * shape.blocks))] * shape.heads, job.spec.device)
    own = [name for name in job.spec.backends if name in OWN]
    contenders = [CUDNN] + [kernel(name) for name in own]
    for name in own:
        contenders += launch_contenders(name, launch_choices(name, shape.head_dim), shape.head_dim)
    job.measure([Entry(one, inputs) for one in contenders], _work(inputs))


def _work(inputs: Inputs, head_dim: int = HEAD_DIM) -> dict[str, float]:
    pairs = pairs_of(inputs)
    every = float(inputs.q.shape[1]) * inputs.k.shape[1] * inputs.q.shape[2]
    return {"pairs": pairs, "density": pairs / every, "head_dim": float(head_dim)}


def _chosen(pattern: Pattern, grid: Grid, heads: int, device: str) -> Inputs:
    """Draw inputs in a pattern's kernel order, with the blocks that it chooses."""
    layout = pattern.token_order().layout(grid, device)
    q, k, v = draw(grid.tokens, heads, HEAD_DIM, device)
    return Inputs(q, k, v, pattern.select(q, k, grid, PatternState(layout, q.shape[-1] ** -0.5)).indices)


def _at(shapes: Sequence[str], densities: Sequence[float] | None = None) -> tuple[str, ...]:
    return tuple(f"{name}@{density}" for name in shapes for density in densities or SHAPES[name].densities)


DENSE_UNITS = _at(("wan_480p", "cogvideox", "wan_720p", "ltx", "hunyuan"), (1.0,))  # the longest last


SECTIONS: dict[str, Section] = {
    "full": Section("full blocks beside the peers", _at(tuple(SHAPES)), full),
    "partial": Section("masked blocks beside full ones", (*GRIDS, "even_grid"), partial),
    "ragged": Section("short blocks beside even ones", tuple(GRIDS), ragged),
    "uneven": Section("heads of unlike density", ("wan_480p@10", "wan_720p@30"), uneven),
    "compensation": Section("means for skipped blocks", _at(("wan_480p", "wan_720p"), (0.25, 0.10)), compensation),
    "selection": Section("choosing blocks beside reading them", ("wan_480p", "wan_720p"), selection),
    "host": Section("what a launch costs the host", ("wan_480p",), host),
    "dense": Section("every block, beside dense peers", DENSE_UNITS, full),
    "launches": Section("launch configurations", _at(("wan_480p", "cogvideox"), (0.25,)), launches, usual=False),
}
