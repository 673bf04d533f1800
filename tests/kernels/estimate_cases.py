"""Cases of pooling, scores and block mass with their definitions as plain loops: for the twins, Triton and the GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from dit_sparse.kernels.gate import ERROR_FACTOR, poisoned_empty
from dit_sparse.kernels.indices import segment_blocks


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


def check_pool_both(
    run: Callable[..., tuple[Tensor, Tensor]], case: TokenCase, dtype: torch.dtype, device: str = "cpu"
) -> None:
    """Compare means of queries and keys with fp64 loops; hidden keys and queries past the blocks hold NaN."""
    start, length = blocks_of(case, case.kv_segments)
    q, k = (tokens(case, sum(case.kv_segments) + case.spare, heads, dtype) for heads in (case.heads, case.kv_heads))
    q_blocks, kv_lengths = max(1, len(start) - 1), lengths_of(case)
    given = ((q, start[:q_blocks], length[:q_blocks], None), (k, start, length, kv_lengths))
    exact, rough = ([_means(x.to(compute), *rest) for x, *rest in given] for compute in (torch.float64, torch.float32))
    _poison(q, replace(case, kv_lengths=None))
    _poison(k, case)
    with poisoned_empty():
        means = run(*_there(device, q, k, start, length), q_blocks, *_there(device, kv_lengths))
    for found, *expected in zip(means, exact, rough, strict=True):
        assert found.dtype == torch.float32
        _assert_close(found.cpu(), *expected, torch.finfo(torch.float32).eps)


def check_scores(run: Callable[..., Tensor], case: TokenCase, device: str = "cpu") -> None:
    """Compare scores of block means with fp64."""
    start, length = blocks_of(case, case.kv_segments)
    kv_lengths, scale = lengths_of(case), case.head_dim**-0.5
    mean_q, mean_k = (
        3.0 * torch.randn(case.batch, blocks, heads, case.head_dim)
        for blocks, heads in ((case.rows, case.heads), (len(start), case.kv_heads))
    )
    limit = torch.full((case.batch,), sum(case.kv_segments), dtype=torch.int32) if kv_lengths is None else kv_lengths
    seen = torch.minimum((limit[:, None] - start).clamp(min=0), length)
    counts, group = seen[:, None, None], case.heads // case.kv_heads
    products = partial(_scaled_products, mean_q, mean_k.repeat_interleave(group, 2), scale)
    exact, rough = (products(compute) + counts.to(compute).log() for compute in (torch.float64, torch.float32))
    with poisoned_empty():
        found = run(*_there(device, mean_q, mean_k, start, length), scale, *_there(device, kv_lengths)).cpu()
    assert found.dtype == torch.float32
    assert torch.equal(found.isinf(), exact.isinf())
    exact, rough, found = (x.nan_to_num(neginf=0.0) for x in (exact, rough, found))
    # Three products of tf32 leave out the product of the two remainders: a bit or two of the terms, which may cancel.
    terms = _scaled_products(mean_q.abs(), mean_k.repeat_interleave(group, 2).abs(), scale, torch.float64)
    _assert_close(found, exact, rough, 4 * torch.finfo(torch.float32).eps, float((terms + exact.abs()).max()))


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


def _scaled_products(mean_q: Tensor, mean_k: Tensor, scale: float, compute: torch.dtype) -> Tensor:
    return torch.einsum("bqhd,bkhd->bhqk", mean_q.to(compute), mean_k.to(compute)) * scale


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


def _assert_close(result: Tensor, exact: Tensor, rough: Tensor, eps: float, size: float | None = None) -> None:
    """Allow some times the error of the same loops in low precision, and one rounding of the largest value or size."""
    assert not result.isnan().any()
    error, allowed = float((result - exact).abs().max()), float((rough - exact).abs().max())
    size = float(exact.abs().max()) if size is None else size
    assert error <= ERROR_FACTOR * allowed + eps * size, (error, allowed, size)
