"""Problems of the pattern search, drawn at random, and every choice there is."""

from __future__ import annotations

import itertools

import numpy as np
from numpy.typing import NDArray

from dit_sparse.search.planner.solve import Problem

Floats = NDArray[np.float64]


def draw(
    seed: int,
    U: int = 2,
    H: int = 2,
    C: int = 4,
    F: int = 3,
    *,
    whole: bool = False,
    scales: tuple[float, ...] = (1, 1),
) -> Problem:
    """Draw a problem; whole: of few small numbers, so that choices tie. scales: of ms and of loss."""
    r = np.random.default_rng(seed)

    def some(*shape: int) -> Floats:
        return r.integers(0, 5, shape).astype(np.float64) if whole else 10 ** r.uniform(-1.5, 1, shape)

    loss = np.where(r.random((U, H, C)) < 0.15, np.inf, some(U, H, C) * scales[1])
    loss[..., 0] = 0
    ms = some(*((U, H, C) if r.random() < 0.5 else (U, C))) * scales[0]
    fees = r.choice([0.0, 0.3, 2.0]) * scales[0]
    return Problem(loss, ms, r.integers(0, F, C), fees * some(U, F), fees * some(U))


def draw_large(seed: int, U: int, H: int, C: int = 40, F: int = 8) -> Problem:
    """Draw what a model might give: loss grows as density falls, by orders of magnitude between heads."""
    r = np.random.default_rng(seed)
    family = np.r_[0, 1 + np.arange(C - 1) % (F - 1)]
    density = np.r_[1.0, r.uniform(0.02, 0.8, C - 1)]
    dense_ms = r.uniform(0.5, 1.5, (U, 1))
    hard, taste = 10 ** r.uniform(-7, -3, (U, H, 1)), 10 ** r.normal(0, 0.6, (U, H, F))
    loss = hard * taste[..., family] * (1 / density - 1) * 10 ** r.normal(0, 0.1, (U, H, C))
    loss[..., 0] = 0
    return Problem(
        loss, dense_ms * (density + 0.02), family, dense_ms * r.uniform(0.1, 1.5, (U, F)), 2 * dense_ms[:, 0]
    )


def all_choices(problem: Problem) -> tuple[Floats, Floats]:
    """Return (ms, loss) of every choice that takes only what is offered, worked out from the definition."""
    U, H, C = problem.loss.shape
    ms, loss = [], []
    for u in range(U):
        unit_ms, unit_loss = [], []
        for choice in itertools.product(range(C), repeat=H):
            used = {int(problem.family[c]) for c in choice}
            heads = [problem.head_ms[u, c] if problem.head_ms.ndim == 2 else problem.head_ms[u, h, c] for h, c in
                     enumerate(choice)]  # fmt: skip
            fees = sum(problem.launch_ms[u, f] for f in used) + (problem.mixed_ms[u] if len(used) > 1 else 0.0)
            unit_ms.append(sum(heads) + fees)
            unit_loss.append(sum(problem.loss[u, h, c] for h, c in enumerate(choice)))
        offered = np.isfinite(unit_loss)
        ms.append(np.array(unit_ms)[offered])
        loss.append(np.array(unit_loss)[offered])
    total_ms, total_loss = ms[0], loss[0]
    for more_ms, more_loss in zip(ms[1:], loss[1:], strict=True):
        total_ms, total_loss = np.add.outer(total_ms, more_ms).ravel(), np.add.outer(total_loss, more_loss).ravel()
    return total_ms, total_loss
