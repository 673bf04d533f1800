"""TopBlocks: its fields, how they are written, and what follows from them without a call."""

from __future__ import annotations

import json
import math

import pytest
import torch

import dit_sparse as ds
from dit_sparse.patterns import PatternState, pattern_from_dict, pattern_from_text
from tests.core.examples import EXAMPLES

TILE = "tile:2x2x3"


def test_layers_take_the_partitions_in_turn() -> None:
    pattern = ds.TopBlocks(0.3, "cycle", score="lse:2")
    orders = [str(pattern.at_layer(layer).token_order()) for layer in range(7)]
    assert orders == ["raster", "column", "tile", "raster", "column", "tile", "raster"]
    assert pattern.at_layer(4) == ds.TopBlocks(0.3, "column", score="lse:2")
    assert str(pattern.token_order()) == "tile"
    assert ds.TopBlocks(0.3).at_layer(4) == ds.TopBlocks(0.3)


@pytest.mark.parametrize(
    "pattern",
    [
        ds.TopBlocks(0.5, order=TILE),
        ds.TopBlocks(mass=0.9, at_least=0.1, score="lse:2", order=TILE),
        ds.TopBlocks(recall=0.9, order=TILE),
    ],
    ids=str,
)
def test_density_is_set_by_keep(pattern: ds.TopBlocks) -> None:
    grid = ds.Grid(4, 8, 12, suffix=4)
    q, k = torch.randn(2, 1, grid.tokens, 4, 8).unbind()
    for target in (0.1, 0.35, 1.0):
        fitted = pattern.with_density(grid, target)
        assert fitted.score == pattern.score
        assert fitted.keep == target
        pairs = fitted.select(q, k, grid, PatternState(fitted.token_order().layout(grid), 1.0)).visited_pairs
        assert abs(float(pairs.mean()) / grid.video_tokens**2 - target) < 0.02


def test_densities_out_of_reach_are_refused() -> None:
    with pytest.raises(ValueError, match=r"from 0\.250 to 1 .* keep, got the target 0\.1"):
        ds.TopBlocks(order="raster").with_density(ds.Grid(4, 8, 16), 0.1)
    with pytest.raises(ValueError, match=r"from 0\.438 to 1"):  # 1 of 4 blocks is the first frame, and each its own
        ds.TopBlocks(order="raster", sinks="first_frame+diagonal").with_density(ds.Grid(4, 8, 16), 0.3)


def test_plain_calls_stay_as_they_were() -> None:
    assert ds.TopBlocks() == ds.TopBlocks(0.25) == ds.TopBlocks(keep=0.25)
    assert ds.TopBlocks(0.35, "tile:4x4x8").order == "tile:4x4x8"
    assert ds.TopBlocks(mass=0.9).keep is None


@pytest.mark.parametrize("pattern", EXAMPLES["topblocks"], ids=str)
def test_json_brings_every_field_back(pattern: ds.TopBlocks) -> None:
    assert pattern_from_dict(json.loads(json.dumps(pattern.to_dict()))) == pattern


def test_text_forms() -> None:
    assert pattern_from_text("topblocks:score=lse:4,mass=0.9") == ds.TopBlocks(score="lse:4", mass=0.9)
    assert pattern_from_text("topblocks:sinks=text,clusters=9,dense_text=false") == ds.TopBlocks(
        sinks="text", clusters=9, dense_text=False
    )
    assert pattern_from_text("topblocks:sinks=text+diagonal,keep=0.2") == ds.TopBlocks(0.2, sinks="text+diagonal")
    assert pattern_from_text("topblocks:sinks=none,recall=0.95") == ds.TopBlocks(sinks="none", recall=0.95)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"keep": 0.2, "mass": 0.9}, "one of keep, mass, threshold, recall, error, got keep and mass"),
        ({"keep": 0}, "keep must be a share"),
        ({"keep": 1.2}, "keep must be a share"),
        ({"mass": True}, "mass must be a share"),
        ({"recall": "high"}, "recall must be a share"),
        ({"error": -0.1}, "error must be a share"),
        ({"threshold": math.inf}, "finite number of deviations"),
        ({"keep": 0.2, "at_least": 0.1}, "beside keep=0.2"),
        ({"heads": "some"}, "equal or adaptive"),
        ({"heads": "adaptive", "mass": 0.9}, "shares out keep, got mass"),
        ({"score": "median"}, "score must be one of mean, lse"),
        ({"score": "mean:4"}, "takes no number"),
        ({"score": "lse:0"}, "a number from 1 to 128"),
        ({"score": "lowbit:9"}, "a number from 2 to 8"),
        ({"score": "lse:"}, "a number from 1 to 128"),
        ({"score": 4}, "score must be one of"),
        ({"clusters": 0}, "clusters must be"),
        ({"clusters": (3, 4, 5)}, "clusters must be"),
        ({"clusters": 4, "sinks": "text+diagonal"}, "no first frame and no diagonal"),
        ({"sinks": "images"}, "joined by"),
        ({"sinks": "text+text"}, "joined by"),
        ({"sinks": None}, "joined by"),
        ({"dense_text": 1}, "dense_text must be True or False"),
        ({"compensate": "yes"}, "compensate must be True or False"),
        ({"order": "spiral"}, "token order"),
    ],
)
def test_bad_fields_are_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ds.TopBlocks(**fields)  # type: ignore[arg-type]
