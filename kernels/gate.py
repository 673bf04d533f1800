"""Correctness gate: one table of cases that the tests and the benchmark run every backend through."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from dit_sparse.kernels import reference
from dit_sparse.kernels.indices import BlockIndices, random_indices

Run = Callable[[Tensor, Tensor, Tensor, BlockIndices, float, "Tensor | None", bool], tuple[Tensor, Tensor, Tensor]]

# A kernel sums in another order and rescales as it goes, so it may err this much more than the low-precision reference.
ERROR_FACTOR = 3.0


@dataclass(frozen=True)
class Case:
    """Describe one call; reason says why it is in the table."""

    name: str
    reason: str
    head_dim: int = 64
    batch: int = 1
    heads: int = 2
    kv_heads: int = 2
    q_segments: tuple[int, ...] = (384,)
    kv_segments: tuple[int, ...] = (384,)
    density: float = 0.5
    partial: float = 0.0
    unique: int | None = None
    empty_row: bool = False
    shuffle: bool = False
    kv_lengths: tuple[int, ...] | None = None  # keys beyond hold NaN
    head_major: bool = False  # tensors are transposed views of [B, H, S, D]
    compensate: bool = False  # means stand for the blocks that are not visited


@dataclass(frozen=True)
class Outcome:
    """Hold the worst errors of one run against FP64, and what was allowed; lse is the worse one of both LSEs."""

    name: str
    dtype: str
    out_error: float
    out_bound: float
    lse_error: float
    lse_bound: float
    nan_count: int

    @property
    def passed(self) -> bool:
        return self.nan_count == 0 and self.out_error <= self.out_bound and self.lse_error <= self.lse_bound


CASES: tuple[Case, ...] = (
    Case("full", "the hot loop alone"),
    Case("d128", "two swizzle atoms in a row", head_dim=128, q_segments=(640,), kv_segments=(640,)),
    Case("d72", "padded to 128, and 144-byte rows", head_dim=72, partial=0.3, kv_segments=(300, 77)),
    Case("d96", "padded to 128", head_dim=96, partial=0.3),
    Case("d32", "the smallest head", head_dim=32),
    Case("ragged", "short blocks amid the sequence, as tiles and text make", 128, 1, 2, 2, (333, 50), (281, 120)),
    Case("masks", "bit tiles on every block", 64, partial=1.0, unique=1),
    Case("masks_d128", "full and masked blocks in one row", 128, partial=0.5),
    Case("ragged_masks", "bit tiles on short blocks, any order", 64, 1, 2, 2, (300, 77), (205, 130), partial=0.6,
         shuffle=True),
    Case("kv_lengths", "a batch entry cut inside a block, one cut to nothing", 64, 3, 2, 2, kv_lengths=(300, 384, 0)),
    Case("kv_lengths_masks", "lengths, bit tiles and short blocks at once", 128, 2, 2, 2, (130,), (400, 40), 0.7, 0.5,
         kv_lengths=(333, 440)),
    Case("cross", "fewer keys than queries, and one short block only", 64, 2, 2, 2, (400,), (77,), density=1.0),
    Case("gqa", "two query heads share a key head, two rows of bits four heads", 64, 2, 4, 2, partial=0.3, unique=2),
    Case("empty", "query block 0 sees nothing", 64, partial=0.3, empty_row=True),
    Case("dense", "keep everything", 64, density=1.0),
    Case("head_major", "strides of [B, H, S, D]", 128, 2, 3, 3, head_major=True),
    Case("means", "no partial loop before the means", kv_segments=(896,), density=0.4, compensate=True),
    Case("means_many", "several words of bits and steps of means, the last ones short", 64, q_segments=(200,),
         kv_segments=(7,) * 75 + (128,) * 2 + (5,) * 75, density=0.1, compensate=True),
    Case("means_ragged", "means of short blocks, in any order", 128, 1, 2, 2, (333, 50), (281, 120), 0.3, shuffle=True,
         compensate=True),
    Case("means_masks", "a masked block is visited: no mean stands for what its mask hides", 128, density=0.4,
         partial=0.7, compensate=True),
    Case("means_kv_lengths", "a skipped block cut by a length, a batch entry cut to nothing", 64, 3, 2, 2,
         kv_segments=(400, 40), density=0.4, kv_lengths=(333, 440, 0), compensate=True),
    Case("means_gqa", "two query heads share a mean, two rows of bits four heads, lists of their own by lengths", 64, 2,
         4, 2, density=0.3, partial=0.3, unique=2, kv_lengths=(384, 200), compensate=True),
    Case("means_alone", "query block 0 visits nothing", 64, partial=0.3, empty_row=True, compensate=True),
    Case("means_d72", "means of padded heads, strides of [B, H, S, D]", 72, 2, 3, 3, (300, 77), (300, 77), 0.3,
         head_major=True, compensate=True),
)  # fmt: skip


def build(case: Case, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, BlockIndices, Tensor | None]:
    """Draw q, k, v [B, S, H, D], indices and kv_lengths of a case, on the CPU; keys beyond a length are NaN."""
    generator = torch.Generator().manual_seed(seed)

    def draw(tokens: int, heads: int) -> Tensor:
        if case.head_major:
            values = torch.randn((case.batch, heads, tokens, case.head_dim), generator=generator)
            return values.to(dtype).transpose(1, 2)
        return torch.randn((case.batch, tokens, heads, case.head_dim), generator=generator).to(dtype)

    q = draw(sum(case.q_segments), case.heads)
    k, v = draw(sum(case.kv_segments), case.kv_heads), draw(sum(case.kv_segments), case.kv_heads)
    indices = random_indices(
        case.batch, case.heads, case.q_segments, case.kv_segments, density=case.density, partial=case.partial,
        unique=case.unique, empty_row=case.empty_row, shuffle=case.shuffle, seed=seed,
    )  # fmt: skip
    indices = replace(indices, head_of=indices.head_of.flip(0))  # a head's own number must not name its row
    if case.kv_lengths is None:
        return q, k, v, indices, None
    for b, length in enumerate(case.kv_lengths):
        k[b, length:] = torch.nan
        v[b, length:] = torch.nan
    return q, k, v, indices, torch.tensor(case.kv_lengths, dtype=torch.int32)


def check(run: Run, case: Case, dtype: torch.dtype, device: torch.device | str = "cpu") -> Outcome:
    """Run one case with NaN-poisoned torch.empty and compare it with the FP64 oracle.

    The bound is ERROR_FACTOR times the error of an independent low-precision reference, plus one rounding of the
    largest value; for both LSEs the same in fp32. The oracle takes means in FP64 and leaves them so; the low-precision
    reference rounds them as a kernel must, so what that costs is part of the bound.
    """
    q, k, v, indices, kv_lengths = build(case, dtype)
    scale = case.head_dim**-0.5
    call = (indices, scale, kv_lengths, case.compensate)
    exact, *exact_lses = reference.attention(q.double(), k.double(), v.double(), *call)
    rough, *rough_lses = reference.attention(q, k, v, *call, round_weights=True)
    exact_lse, rough_lse = torch.stack(exact_lses), torch.stack(rough_lses)
    out_bound = _bound(rough, exact, torch.finfo(dtype).eps)
    lse_bound = _bound(rough_lse, exact_lse, torch.finfo(torch.float32).eps)
    there = (None if x is None else x.to(device) for x in (q, k, v, kv_lengths))
    q, k, v, kv_lengths = there  # type: ignore[assignment]  # q, k and v are never None
    with poisoned_empty():
        out, *lses = run(q, k, v, indices.to(device), scale, kv_lengths, case.compensate)
    out, lse = out.cpu(), torch.stack(lses).cpu()
    nan_count = int(out.isnan().sum() + lse.isnan().sum() + (lse.isinf() != exact_lse.isinf()).sum())
    return Outcome(
        case.name, str(dtype).removeprefix("torch."), _error(out, exact), out_bound, _error(lse, exact_lse), lse_bound,
        nan_count,
    )  # fmt: skip


@contextmanager
def poisoned_empty() -> Iterator[None]:
    """Make torch.empty hand out NaN, so that an element that nobody writes is found."""
    plain = torch.empty

    def poisoned(*args: Any, **kwargs: Any) -> Tensor:
        tensor = plain(*args, **kwargs)
        return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

    with mock.patch.object(torch, "empty", poisoned):
        yield


def _error(result: Tensor, exact: Tensor) -> float:
    finite = exact.isfinite()
    return float((result.double() - exact).abs()[finite].amax()) if bool(finite.any()) else 0.0


def _bound(rough: Tensor, exact: Tensor, eps: float) -> float:
    finite = exact.isfinite()
    largest = float(exact[finite].abs().amax()) if bool(finite.any()) else 0.0
    return ERROR_FACTOR * _error(rough, exact) + eps * max(largest, torch.finfo(torch.float32).tiny)
