"""Which attention calls are self-attention over the grid, told by their numbers of tokens."""

from __future__ import annotations

import pytest

from dit_sparse.grid import Grid
from dit_sparse.moment import CROSS, Moment

VIDEO = Grid(3, 8, 12)  # 288 tokens


@pytest.mark.parametrize(
    ("text", "grid", "queries", "keys", "expected"),
    [
        ("cross", VIDEO, 288, 288, VIDEO),
        ("cross", VIDEO, 288, 20, CROSS),  # to a short text
        ("cross", VIDEO, 288, 512, CROSS),  # to a long one
        ("cross", VIDEO, 300, 300, "do not match"),  # a wrong grid must be said aloud
        ("cross", VIDEO, 100, 100, "do not match"),
        ("prefix", VIDEO, 308, 308, Grid(3, 8, 12, prefix=20)),
        ("suffix", VIDEO, 308, 308, Grid(3, 8, 12, suffix=20)),
        ("suffix", VIDEO, 576, 576, Grid(3, 8, 12, suffix=288)),  # Motif's decoder: the encoder's copy behind
        ("prefix", Grid(3, 8, 12, suffix=96), 404, 404, Grid(3, 8, 12, 20, 96)),  # references behind, text before
        ("prefix", Grid(3, 8, 12, suffix=96), 288, 288, VIDEO),  # Flux 3: blocks of the image alone
        ("prefix", Grid(3, 8, 12, suffix=300), 300, 320, CROSS),  # Qwen-Image 2.1: a reference's own segment
        ("prefix", VIDEO, 20, 20, CROSS),  # the text's own attention
        ("prefix", VIDEO, 308, 4, CROSS),  # IP-Adapter
        ("prefix", VIDEO, 288, 308, Grid(3, 8, 12, prefix=20)),  # Cosmos 3: queries are the video alone
        ("cross", Grid(3, 8, 12, prefix=20), 288, 308, Grid(3, 8, 12, prefix=20)),
        ("prefix", VIDEO, 300, 308, "do not match"),  # video and a part of the text ask
    ],
)
def test_calls_are_told_apart(text: str, grid: Grid, queries: int, keys: int, expected: Grid | str) -> None:
    found = Moment(grid, text).grid_of(queries, keys)
    if isinstance(expected, Grid) or expected == CROSS:
        assert found == expected
    else:
        assert isinstance(found, str)
        assert expected in found


def test_without_a_grid_the_reason_is_told() -> None:
    assert Moment(reason="no shapes").grid_of(1, 1) == "no shapes"
