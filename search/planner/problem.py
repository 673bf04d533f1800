"""What the pattern search chooses from: losses and times of every candidate, and what a choice comes to."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Choice = NDArray[np.int64]  # [U, H], a candidate for every head of every unit

DENSE = 0  # the candidate that every head may use, without loss
MOST_FAMILIES = 12  # a unit's subsets of families are enumerated


@dataclass(frozen=True, eq=False)
class Problem:
    """Hold U units (step group, transformer, layer) of H heads with C candidates in F families.

    loss: [U, H, C], what a choice adds to the expected squared error of the clip; inf where it is not offered.
    head_ms: [U, H, C] or [U, C], time of one head over all calls of the unit; not read where nothing is offered.
    family: [C], numbers from 0; candidates of one family share a launch within a unit.
    launch_ms: [U, F], paid once by every family that a head of the unit uses.
    mixed_ms: [U], paid once by a unit that uses more than one family.

    Raises: ValueError for shapes that do not fit, NaN or negative numbers, a lossy candidate 0, too many families.
    """

    loss: Floats
    head_ms: Floats
    family: NDArray[np.int64]
    launch_ms: Floats
    mixed_ms: Floats

    def __post_init__(self) -> None:
        for name in ("loss", "head_ms", "launch_ms", "mixed_ms"):
            object.__setattr__(self, name, np.asarray(getattr(self, name), dtype=np.float64))
        object.__setattr__(self, "family", _whole(self.family))
        if self.loss.ndim != 3 or 0 in self.loss.shape:
            raise ValueError(f"loss must be [units, heads, candidates], none of them 0, got {list(self.loss.shape)}")
        U, H, C = self.loss.shape
        _shape("head_ms", self.head_ms, (U, H, C), (U, C))
        _shape("family", self.family, (C,))
        _shape("mixed_ms", self.mixed_ms, (U,))
        families = int(self.family.max()) + 1
        if self.family.min() < 0:
            raise ValueError(f"family must count from 0, got {self.family.min()} at {int(self.family.argmin())}")
        if self.launch_ms.ndim != 2 or len(self.launch_ms) != U or self.launch_ms.shape[1] < families:
            raise ValueError(
                f"launch_ms must be [units, families] = [{U}, at least {families}], got {list(self.launch_ms.shape)}"
            )
        if (used := len(np.unique(self.family))) > MOST_FAMILIES:
            raise ValueError(
                f"at most {MOST_FAMILIES} families can be weighed against each other, as every subset of them is "
                f"tried; family names {used}: leave out those that no head is likely to use"
            )
        _sound("loss", self.loss, np.isnan(self.loss) | (self.loss < 0))
        for name, array in (("launch_ms", self.launch_ms), ("mixed_ms", self.mixed_ms)):
            _sound(name, array, ~(np.isfinite(array) & (array >= 0)))
        _sound("head_ms", self.ms, np.isfinite(self.loss) & ~(np.isfinite(self.ms) & (self.ms >= 0)))
        _sound("loss of candidate 0 (dense, which loses nothing)", self.loss[..., DENSE], self.loss[..., DENSE] != 0)

    @property
    def ms(self) -> Floats:
        """Return head_ms as [U, H, C]."""
        return np.broadcast_to(self.head_ms if self.head_ms.ndim == 3 else self.head_ms[:, None], self.loss.shape)


def evaluate(problem: Problem, choice: Choice) -> tuple[float, float]:
    """Return (ms, loss) of a choice [U, H]; both are inf where it takes what is not offered.

    The sums are correctly rounded: choices that differ only in which head takes what come to the same figure.

    Raises: ValueError for another shape, or for numbers that are no candidates.
    """
    U, H, C = problem.loss.shape
    choice = _whole(choice)
    if choice.shape != (U, H) or choice.min() < 0 or choice.max() >= C:
        raise ValueError(
            f"choice must be [units, heads] = [{U}, {H}] of candidates in [0, {C}), got {list(choice.shape)} "
            f"from {choice.min(initial=0)} to {choice.max(initial=0)}"
        )
    loss = np.take_along_axis(problem.loss, choice[..., None], axis=-1)
    if np.isinf(loss).any():
        return math.inf, math.inf
    ms = np.take_along_axis(problem.ms, choice[..., None], axis=-1)
    runs = families_used(problem, choice)
    launches, mixed = problem.launch_ms[runs], problem.mixed_ms[runs.sum(axis=1) > 1]
    return math.fsum(np.concatenate([ms.ravel(), launches, mixed])), math.fsum(loss.ravel())


def uniform(problem: Problem, candidate: int) -> Choice:
    """Return the choice that takes one candidate wherever it is offered, and dense elsewhere.

    Raises: ValueError if there is no such candidate.
    """
    candidates = problem.loss.shape[-1]
    if not 0 <= candidate < candidates:
        raise ValueError(f"candidate must be in [0, {candidates}), got {candidate}")
    return np.where(np.isfinite(problem.loss[..., candidate]), candidate, DENSE)


def families_used(problem: Problem, choice: Choice) -> NDArray[np.bool_]:
    """Say which families a choice runs in each unit: [U, F]."""
    runs = np.zeros(problem.launch_ms.shape, dtype=np.bool_)
    runs[np.arange(len(choice))[:, None], problem.family[choice]] = True
    return runs


def _whole(array: NDArray[np.int64]) -> NDArray[np.int64]:
    array = np.asarray(array)
    if not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"families and choices must be whole numbers, got an array of {array.dtype}")
    return array.astype(np.int64)


def _shape(name: str, array: NDArray[np.generic], *wanted: tuple[int, ...]) -> None:
    if array.shape not in wanted:
        words = " or ".join(str(list(shape)) for shape in wanted)
        raise ValueError(f"{name} must be {words} to go with loss, got {list(array.shape)}")


def _sound(name: str, array: Floats, wrong: NDArray[np.bool_]) -> None:
    if wrong.any():
        place = tuple(int(i) for i in np.argwhere(wrong)[0])
        want = "0" if "candidate 0" in name else "a number >= 0"
        raise ValueError(f"{name} must be {want}, got {array[place]} at {list(place)} and {wrong.sum() - 1} more")
