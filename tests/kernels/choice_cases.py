"""Cases of the choice of blocks with its definition as plain loops: for the twin, Triton and the GPU."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dit_sparse.kernels.choice import choose_blocks
from dit_sparse.kernels.indices import unpack_bits


@dataclass(frozen=True)
class ChoiceCase:
    """Describe scores and the rule for them; shares of blocks are drawn."""

    reason: str
    rule: str
    value: float = 0.0  # of mass and threshold
    keys: int = 70
    rows: int = 3
    queries: int = 4
    dense: int = 1  # query blocks beyond the scored ones
    at_least: int = 1
    always: float = 0.0
    forced: float = 0.0
    hidden: float = 0.0  # scores of -inf
    ties: bool = False
    spread: float = 2.0


CHOICE_CASES = (
    ChoiceCase("counts from none to more than there are", "keep"),
    ChoiceCase("equal scores: the lower index", "keep", ties=True),
    ChoiceCase("sinks outside the budget, forced ones in it", "keep", always=0.1, forced=0.2, hidden=0.1),
    ChoiceCase("every score hidden", "keep", hidden=1.0, forced=0.1),
    ChoiceCase("the crossing block included", "mass", 0.7),
    ChoiceCase("a crossing among equal scores", "mass", 0.43, ties=True),
    ChoiceCase("forced ones may be enough", "mass", 0.3, always=0.1, forced=0.3, hidden=0.2),
    ChoiceCase("all of the mass is all of the blocks", "mass", 1.0, hidden=0.2, spread=30.0),
    ChoiceCase("nothing to share out", "mass", 0.5, hidden=1.0, always=0.1),
    ChoiceCase("above the mean", "threshold", 0.8, always=0.1, hidden=0.2),
    ChoiceCase("below the mean", "threshold", -1.5, forced=0.1, ties=True),
    ChoiceCase("none is high enough: at least three", "threshold", 50.0, at_least=3, forced=0.02),
    ChoiceCase("none is above a mean that all meet", "threshold", 0.0, at_least=2, spread=0.0),
    ChoiceCase("one key block, no text", "mass", 0.9, keys=1, dense=0),
    ChoiceCase("whole words", "keep", keys=64, dense=0),
    ChoiceCase("a row for two warps", "mass", 0.8, keys=1500, rows=1, ties=True),
    ChoiceCase("a row for eight warps", "keep", keys=5000, rows=1, queries=2, forced=0.01),
)


def draw_choice(case: ChoiceCase) -> tuple[Tensor, dict[str, Any]]:
    """Draw scores [R, Q, K] and the keywords of choose_blocks."""
    shape = (case.rows, case.queries, case.keys)
    score = torch.randn(shape) * case.spread
    if case.ties:
        score = score.round()
        score[..., ::3] *= -1.0  # -0.0 equals 0.0
    score[torch.rand(shape) < case.hidden] = -torch.inf
    keywords: dict[str, Any] = {
        "counted": case.keys - case.keys // 5,
        "q_len": torch.randint(1, 129, (case.queries + case.dense,), dtype=torch.int32),
        "kv_len": torch.randint(1, 129, (case.keys,), dtype=torch.int32),
        "at_least": case.at_least,
        "always": torch.rand(case.keys) < case.always if case.always else None,
        "forced": torch.rand(shape[1:]) < case.forced if case.forced else None,
        case.rule: case.value,
    }
    if case.rule == "keep":
        keywords["keep"] = torch.randint(0, case.keys + 3, shape[: 2 - case.rows % 2], dtype=torch.int32)
    return score, keywords


def check_choice(case: ChoiceCase, device: str = "cpu") -> None:
    """Compare what choose_blocks keeps with the definition, row by row."""
    score, keywords = draw_choice(case)
    there = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in keywords.items()}
    chosen = choose_blocks(score.to(device), **there)
    bits, pairs = chosen.bits.cpu(), chosen.pairs.tolist()
    kept = unpack_bits(bits, case.keys)
    assert not unpack_bits(bits, bits.shape[-1] * 32)[..., case.keys :].any()
    assert kept[:, case.queries :].all()
    counted, q_len, kv_len = keywords["counted"], keywords["q_len"].tolist(), keywords["kv_len"].tolist()
    for row in range(case.rows):
        expected_pairs = 0
        for query in range(case.queries):
            expected = chosen_by_definition(score[row, query].tolist(), row, query, keywords)
            assert set(kept[row, query].nonzero().flatten().tolist()) == expected
            if query < counted:
                expected_pairs += q_len[query] * sum(kv_len[block] for block in expected if block < counted)
        assert pairs[row] == expected_pairs


def chosen_by_definition(score: list[float], row: int, query: int, keywords: dict[str, Any]) -> set[int]:
    """Choose the blocks of one row with a sort and a running sum in Python's doubles."""
    always = set() if keywords["always"] is None else set(keywords["always"].nonzero().flatten().tolist())
    forced = set() if keywords["forced"] is None else set(keywords["forced"][query].nonzero().flatten().tolist())
    forced -= always
    finite = [block for block in range(len(score)) if block not in always and score[block] > -math.inf]
    rest = sorted((block for block in finite if block not in forced), key=lambda block: (-score[block], block))
    number = 0
    if keywords.get("keep") is not None:
        keep = keywords["keep"]
        number = int(keep[row] if keep.dim() == 1 else keep[row, query]) - len(forced)
    elif "mass" in keywords:
        total = sum(math.exp(score[block]) for block in finite)
        reached = sum(math.exp(score[block]) for block in forced)
        while number < len(rest) and (reached < keywords["mass"] * total or keywords["mass"] == 1.0):
            reached += math.exp(score[rest[number]])
            number += 1
    elif finite:
        mean = sum(score[block] for block in finite) / len(finite)
        deviation = math.sqrt(sum((score[block] - mean) ** 2 for block in finite) / len(finite))
        number = sum(score[block] > mean + keywords["threshold"] * deviation for block in rest)
    return always | forced | set(rest[: max(0, number, keywords["at_least"] - len(forced))])
