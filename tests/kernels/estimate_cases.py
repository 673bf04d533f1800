"""Cases of pooling, choice and block mass with their definitions as plain loops: for the twins, Triton and the GPU."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dit_sparse.kernels.choice import Choice, choose_blocks
from dit_sparse.kernels.gate import ERROR_FACTOR, poisoned_empty
from dit_sparse.kernels.indices import segment_blocks, unpack_bits


@dataclass(frozen=True)
class TokenCase:
    """Describe tensors of tokens cut in blocks."""

    reason: str
    head_dim: int = 64
    batch: int = 1
    rows: int = 150  # query tokens
    heads: int = 2
    kv_heads: int = 2
    q_segments: tuple[int, ...] = (150,)
    kv_segments: tuple[int, ...] = (256, 77)
    spare: int = 0  # tokens beyond the blocks
    kv_lengths: tuple[int, ...] | None = None
    head_major: bool = False
    shuffle: bool = False


TOKEN_CASES = (
    TokenCase("full blocks and a short one"),
    TokenCase("the usual head; more than one row tile", 128, rows=200, q_segments=(128, 72)),
    TokenCase("a padded head, lengths inside, at and before blocks", 40, 3, kv_lengths=(200, 333, 0)),
    TokenCase("shared key heads, and a head that the columns do not divide", 24, 2, 3, 6, 2, (3,)),
    TokenCase("strides of [B, H, S, D], spare tokens", 64, 2, spare=19, head_major=True),
    TokenCase("blocks in any order", 32, rows=333, q_segments=(256, 77), shuffle=True),
    TokenCase("one token, one row", 16, 1, 1, 1, 1, (1,), (1,)),
)


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
    wanted: bool = False
    spread: float = 2.0


CHOICE_CASES = (
    ChoiceCase("counts from none to more than there are", "keep"),
    ChoiceCase("equal scores: the lower index", "keep", ties=True),
    ChoiceCase("sinks outside the budget, forced ones in it", "keep", always=0.1, forced=0.2, hidden=0.1),
    ChoiceCase("rows that another step chose", "keep", wanted=True),
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
    ChoiceCase("a row for two warps", "mass", 0.8, keys=1500, rows=1, ties=True, wanted=True),
    ChoiceCase("a row for eight warps", "keep", keys=5000, rows=1, queries=2, forced=0.01),
)


def tokens(case: TokenCase, count: int, heads: int, dtype: torch.dtype) -> Tensor:
    """Draw [B, count, H, D]."""
    shape = (case.batch, heads, count, case.head_dim) if case.head_major else (case.batch, count, heads, case.head_dim)
    values = torch.randn(shape)
    values = (values * 40).round().clamp(-127, 127).to(dtype) if dtype == torch.int8 else values.to(dtype)
    return values.transpose(1, 2) if case.head_major else values


def blocks_of(case: TokenCase, segments: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    start, length = segment_blocks(segments)
    order = torch.randperm(len(start)) if case.shuffle else torch.arange(len(start))
    return start[order], length[order]


def lengths_of(case: TokenCase) -> Tensor | None:
    return None if case.kv_lengths is None else torch.tensor(case.kv_lengths, dtype=torch.int32)


def check_pool(
    run: Callable[..., Tensor], case: TokenCase, dtype: torch.dtype, out_dtype: torch.dtype, device: str = "cpu"
) -> None:
    """Compare means with fp64 loops; hidden tokens hold NaN."""
    x = tokens(case, sum(case.kv_segments) + case.spare, case.kv_heads, dtype)
    start, length = blocks_of(case, case.kv_segments)
    kv_lengths = lengths_of(case)
    exact, rough = (_means(x.to(compute), start, length, kv_lengths) for compute in (torch.float64, torch.float32))
    _poison(x, case)
    with poisoned_empty():
        means = run(*_there(device, x, start, length, kv_lengths), out_dtype).cpu()
    assert means.dtype == out_dtype
    _assert_close(means, exact, rough.to(out_dtype), torch.finfo(out_dtype).eps)


def check_mass(
    run_rows: Callable[..., Tensor], run_blocks: Callable[..., Tensor], case: TokenCase, dtype: torch.dtype,
    device: str = "cpu",
) -> None:  # fmt: skip
    """Compare log masses of rows and masses of query blocks with fp64; hidden keys hold NaN."""
    q = tokens(case, case.rows, case.heads, dtype)
    k = tokens(case, sum(case.kv_segments) + case.spare, case.kv_heads, dtype)
    start, length = blocks_of(case, case.kv_segments)
    q_start, q_len = blocks_of(case, case.q_segments)
    kv_lengths = lengths_of(case)
    factors: tuple[Tensor | None, Tensor | None] = (None, None)
    if dtype == torch.int8:
        factors = (torch.rand(q.shape[:3]) / 30, torch.rand(k.shape[:3]) / 30)
    scale = case.head_dim**-0.5
    lse = torch.randn(q.shape[:3]) + 4.0
    lse[:, 0] = -torch.inf
    given = (q, k, start, length, scale, kv_lengths, factors)
    exact, rough = (_log_masses(*given, compute) for compute in (torch.float64, torch.float32))
    exact_sum, rough_sum = (_sums(x, lse.to(x.dtype), q_start, q_len) for x in (exact, rough))
    _poison(k, case)
    blocks, visible = (start, length), (kv_lengths, *factors)
    with poisoned_empty():
        log_mass = run_rows(*_there(device, q, k, *blocks), scale, *_there(device, *visible)).cpu()
        mass = run_blocks(*_there(device, q, k, lse, q_start, q_len, *blocks), scale, *_there(device, *visible)).cpu()
    assert torch.equal(log_mass.isinf(), exact.isinf())
    eps = torch.finfo(torch.float32).eps
    exact, rough, log_mass = (x.nan_to_num(neginf=0.0) for x in (exact, rough, log_mass))
    # Four roundings of the result: into powers of two, the logarithm, its sum with the largest logit, and back.
    _assert_close(log_mass, exact, rough, 4 * eps)
    # An exponent that is rounded moves its power by as many eps as it is large.
    exponent = float(exact.abs().max()) + float(lse[lse.isfinite()].abs().max() if lse.isfinite().any() else 0.0)
    _assert_close(mass, exact_sum, rough_sum, eps * max(1.0, exponent))


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
        "kv_len": torch.randint(1, 129, (case.keys,), dtype=torch.int32),
        "query_blocks": case.queries + case.dense,
        "at_least": case.at_least,
        "always": torch.rand(case.keys) < case.always if case.always else None,
        "forced": torch.rand(shape[1:]) < case.forced if case.forced else None,
        case.rule: case.value,
    }
    if case.rule == "keep":
        keywords["keep"] = torch.randint(0, case.keys + 3, shape[: 2 - case.rows % 2], dtype=torch.int32)
    if case.wanted:
        words = -(-case.keys // 32)
        bits = torch.randint(-(2**31), 2**31, (case.rows, case.queries + case.dense, words)).to(torch.int32)
        keywords["previous"] = Choice(bits, torch.randint(0, 999, shape[:2], dtype=torch.int32))
        keywords["wanted"] = torch.rand(case.rows) < 0.5
    return score, keywords


def check_choice(case: ChoiceCase, device: str = "cpu") -> None:
    """Compare what choose_blocks keeps with the definition, row by row."""
    score, keywords = draw_choice(case)
    there = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in keywords.items()}
    previous = keywords.get("previous")
    if previous is not None:
        there["previous"] = Choice(previous.bits.to(device), previous.kept_keys.to(device))
    chosen = choose_blocks(score.to(device), **there)
    bits, kept_keys = chosen.bits.cpu(), chosen.kept_keys.cpu()
    kept = unpack_bits(bits, case.keys)
    padding = unpack_bits(bits, bits.shape[-1] * 32)[..., case.keys :]
    for row in range(case.rows):
        if previous is not None and not keywords["wanted"][row]:
            assert torch.equal(bits[row], previous.bits[row])
            assert torch.equal(kept_keys[row], previous.kept_keys[row])
            continue
        assert not padding[row].any()
        assert kept[row, case.queries :].all()
        for query in range(case.queries):
            expected = chosen_by_definition(score[row, query].tolist(), row, query, keywords)
            assert set(kept[row, query].nonzero().flatten().tolist()) == expected
            counted = [int(keywords["kv_len"][block]) for block in expected if block < keywords["counted"]]
            assert int(kept_keys[row, query]) == sum(counted)


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


def _means(x: Tensor, start: Tensor, length: Tensor, kv_lengths: Tensor | None) -> Tensor:
    out = x.new_zeros((x.shape[0], len(start), *x.shape[2:]))
    for b in range(x.shape[0]):
        limit = x.shape[1] if kv_lengths is None else int(kv_lengths[b])
        for block, (first, count) in enumerate(zip(start.tolist(), length.tolist(), strict=True)):
            seen = range(first, min(first + count, limit))
            for token in seen:
                out[b, block] += x[b, token] / len(seen)
    return out


def _log_masses(
    q: Tensor, k: Tensor, start: Tensor, length: Tensor, scale: float, kv_lengths: Tensor | None,
    factors: tuple[Tensor | None, Tensor | None], compute: torch.dtype,
) -> Tensor:  # fmt: skip
    queries, keys = (
        x.to(compute) if f is None else x.to(compute) * f[..., None].to(compute)
        for x, f in zip((q, k), factors, strict=True)
    )
    out = torch.full((q.shape[0], q.shape[2], q.shape[1], len(start)), -torch.inf, dtype=compute)
    for b in range(q.shape[0]):
        limit = k.shape[1] if kv_lengths is None else int(kv_lengths[b])
        for head in range(q.shape[2]):
            for block, (first, count) in enumerate(zip(start.tolist(), length.tolist(), strict=True)):
                seen = slice(first, max(first, min(first + count, limit)))
                logits = queries[b, :, head] @ keys[b, seen, head // (q.shape[2] // k.shape[2])].T * scale
                out[b, head, :, block] = logits.exp().sum(-1).log()
    return out


def _sums(log_mass: Tensor, lse: Tensor, q_start: Tensor, q_len: Tensor) -> Tensor:
    level = lse.transpose(1, 2)[..., None]
    share = torch.where(level == -torch.inf, 0.0, (log_mass - level).exp())
    pairs = zip(q_start.tolist(), q_len.tolist(), strict=True)
    return torch.stack([share[:, :, first : first + count].sum(2) for first, count in pairs], 2)


def _poison(x: Tensor, case: TokenCase) -> None:
    """Fill what lies past the lengths and past the blocks with NaN, or with the largest integer."""
    worst = 127 if x.dtype == torch.int8 else torch.nan
    for b, limit in enumerate(case.kv_lengths or [sum(case.kv_segments)] * case.batch):
        x[b, limit:] = worst


def _there(device: str, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(None if tensor is None else tensor.to(device) for tensor in tensors)


def _assert_close(result: Tensor, exact: Tensor, rough: Tensor, eps: float) -> None:
    """Allow some times the error of the same loops in low precision, and one rounding of the largest value."""
    assert not result.isnan().any()
    error, allowed = float((result - exact).abs().max()), float((rough - exact).abs().max())
    assert error <= ERROR_FACTOR * allowed + eps * float(exact.abs().max()), (error, allowed)
