"""The one table of scores, and how their names are read."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from dit_sparse.estimate.blocks import Blocks
from dit_sparse.estimate.row_scores import exact_score, lowbit_score, sampled_score
from dit_sparse.estimate.scores import antidiagonal_score, lse_score, mean_score, proxy_score, region_score
from dit_sparse.kernels.indices import BLOCK


class Score(NamedTuple):
    """Name an estimate, and the default and the range of the number behind its colon; no range: it takes none."""

    estimate: Callable[[Tensor, Tensor, Blocks, int], Tensor]
    default: int = 1
    range: tuple[int, int] | None = None


SCORES: dict[str, Score] = {
    "mean": Score(mean_score),
    "lse": Score(lse_score, 4, (1, BLOCK)),  # sub-blocks of a block
    "antidiagonal": Score(antidiagonal_score, 8, (1, BLOCK)),  # tokens of a group
    "exact": Score(exact_score),
    "sampled": Score(sampled_score, 1, (1, BLOCK)),  # rows of a query block
    "lowbit": Score(lowbit_score, 4, (2, 8)),  # bits of a number
    "proxy": Score(proxy_score, 4, (1, 1024)),  # heads of a group
    "region": Score(region_score, 8, (1, 1024)),  # blocks of a region
}


def parse_score(text: str) -> tuple[Score, int]:
    """Read `mean` or `lse:4`.

    Raises: ValueError for an unknown word, or a number that it does not take.
    """
    kind, colon, number = text.partition(":") if isinstance(text, str) else (text, "", "")
    if kind not in SCORES:
        raise ValueError(f"score must be one of {', '.join(SCORES)}, got {text!r}")
    score = SCORES[kind]
    if not colon:
        return score, score.default
    if score.range is None:
        raise ValueError(f"score {kind!r} takes no number, got {text!r}")
    least, most = score.range
    if not number.isdecimal() or not least <= int(number) <= most:
        raise ValueError(f"score {kind!r} takes a number from {least} to {most}, got {text!r}")
    return score, int(number)
