"""Every pattern of the table set to keep everything, by whatever way it has: each must then equal dense attention."""

from __future__ import annotations

import dit_sparse as ds
from dit_sparse.estimate.table import SCORES

EVERYTHING: dict[str, list[ds.Pattern]] = {
    "dense": [ds.Dense()],
    "neighborhood": [
        ds.Neighborhood(window=1.0),
        ds.Neighborhood(window=1.0, clamp="tile", order="hilbert"),
    ],
    "frames": [ds.Frames("spatial", 1.0), ds.Frames("temporal", 1.0, sink=True)],
    "autoframes": [ds.AutoFrames(1.0)],
    "stripes": [ds.Stripes("diagonal", 1.0), ds.Stripes("multi-diagonal", 1.0), ds.Stripes("vertical", 1.0)],
    "powers": [ds.Powers(window=1.0)],
    "strided": [ds.Strided(1, order="gilbert")],
    "topblocks": [
        *(ds.TopBlocks(1.0, score=score, order="tile:2x3x5") for score in SCORES),
        ds.TopBlocks(1.0, clusters=5),
        ds.TopBlocks(1.0, heads="adaptive", sinks="none", dense_text=False, order="column"),
        ds.TopBlocks(1.0, compensate=True, order="axes:whf"),
        ds.TopBlocks(mass=1.0),
        ds.TopBlocks(recall=1.0),
        ds.TopBlocks(threshold=-1e6, sinks="text+first_frame+diagonal"),
    ],
    "cached": [ds.Cached(ds.TopBlocks(1.0)), ds.Cached(ds.TopBlocks(1.0), residual=True)],
}
CANNOT = {
    "skip": "gives zeros",
    "radial": "narrows with the distance between frames, but for one frame; its block form has a floor, not a ceiling",
}
