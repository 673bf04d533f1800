"""Every pattern in several configurations: what the tests that loop over the table run."""

from __future__ import annotations

import dit_sparse as ds

EXAMPLES: dict[str, list[ds.Pattern]] = {
    "dense": [ds.Dense()],
    "skip": [ds.Skip()],
    "neighborhood": [
        ds.Neighborhood(window=0.4),
        ds.Neighborhood(window=(1, 0.5, 1.0), stride=(1, 2, 3), order="raster"),
        ds.Neighborhood(window=(0.3, 2, 2), dilation=(1, 2, 1), causal=(True, False, True), order="morton"),
        ds.Neighborhood(window=0.4, stride=(2, 3, 2), clamp="tile"),
    ],
    "radial": [ds.Radial(), ds.Radial(sink=False, order="morton"), ds.Radial(kind="block", decay=0.5)],
    "frames": [ds.Frames(), ds.Frames("temporal", 0.2), ds.Frames("spatial", 0.3, sink=True, order="tile")],
    "autoframes": [ds.AutoFrames(), ds.AutoFrames(0.1, sink=True, rows=7)],
    "stripes": [
        ds.Stripes("diagonal", 0.1),
        ds.Stripes("multi-diagonal", 0.2),
        ds.Stripes("vertical", 0.3, order="tile"),
    ],
    "powers": [ds.Powers(), ds.Powers(unit=1, window=(0, 1, 0.2), sink=True, order="raster")],
    "strided": [ds.Strided(), ds.Strided(3, tile=(1, 2, 5), local=(0, 1, 0), order="tile"), ds.Strided(2, phase=1)],
    "topblocks": [
        ds.TopBlocks(keep=0.3),
        ds.TopBlocks(keep=1.0, order="raster"),
        ds.TopBlocks(mass=0.8, at_least=0.2, score="lse:4", sinks="text+first_frame+diagonal"),
        ds.TopBlocks(threshold=0.5, score="antidiagonal:8", order="hilbert"),
        ds.TopBlocks(keep=0.4, score="exact", heads="adaptive"),
        ds.TopBlocks(recall=0.7, score="sampled:2", order="tile:1x4x4"),
        ds.TopBlocks(error=0.5, score="lowbit:4", compensate=True),
        ds.TopBlocks(keep=0.5, score="proxy:2", clusters=(4, 6)),
        ds.TopBlocks(keep=0.5, score="region:2", order="cycle", sinks="none", dense_text=False),
    ],
    "cached": [
        ds.Cached(ds.TopBlocks(keep=0.5), refresh_steps=2),
        ds.Cached(ds.TopBlocks(mass=0.6, order="tile:2x4x4"), 3, recall=0.9),
        ds.Cached(ds.TopBlocks(score="sampled"), 3, densities=(0.3,)),
    ],
}
