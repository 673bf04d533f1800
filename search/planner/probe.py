"""Sensitivity: what a squared error of one layer's output, at one part of the schedule, adds to that of the clip."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dit_sparse.patterns import StaticPattern
from dit_sparse.pipelines.generate import Job
from dit_sparse.plan import Plan, Rule
from dit_sparse.search.planner.groups import StepGroups
from dit_sparse.search.planner.problem import Floats
from dit_sparse.search.planner.renders import Renders
from dit_sparse.search.planner.weigh import Place, Scored

BANDS = 8  # of neighbouring layers that are told apart
ROUNDS = 50
PROBED_DENSITY = 0.2


def unprobed(scored: Scored) -> Floats:
    """Return weights [U] that take all places for equally important: a place's share of all attention calls."""
    return scored.calls / scored.calls.sum()


def bands_of(places: Sequence[Place]) -> list[tuple[str, tuple[int, ...]]]:
    """Cut the layers of each transformer into at most BANDS runs of neighbours."""
    found = []
    for name in dict.fromkeys(place.transformer for place in places):
        layers = np.array(sorted({place.layer for place in places if place.transformer == name}))
        found += [(name, tuple(map(int, part))) for part in np.array_split(layers, min(BANDS, len(layers)))]
    return found


def probes(scored: Scored, groups: StepGroups) -> list[tuple[str, Plan, Floats]]:
    """Return what to render: one plan for each step group and each band of layers, and which places it makes sparse.

    All use the candidate that chooses by content whose mean density is nearest to PROBED_DENSITY, or else any.
    """
    number = _probe_candidate(scored)
    pattern = scored.candidates[number]
    found = []
    for group in sorted({place.group for place in scored.places}):
        inside = np.array([float(place.group == group) for place in scored.places])
        found.append((f"steps {group}", Plan((Rule(pattern, groups.window(group)),), "probe"), inside))
    for name, layers in bands_of(scored.places):
        inside = np.array([float(p.transformer == name and p.layer in layers) for p in scored.places])
        found.append(
            (
                f"{name} layers {layers[0]}-{layers[-1]}",
                Plan((Rule(pattern, (0.0, 1.0), name, layers),), "probe"),
                inside,
            )
        )
    return found


def sensitivities(scored: Scored, groups: StepGroups, renders: Renders, jobs: Sequence[Job]) -> Floats:
    """Render the probes on some jobs; return weights [U].

    A place's weight is the product of a factor for its steps and one for its band of layers, such that the errors of
    the probes' places, weighed and added up, come to the squared errors that were measured: errors of places are
    taken for small and independent.
    """
    asked = probes(scored, groups)
    told = np.array(
        [renders.of(plan, f"sensitivity, {name}", jobs, timed=False).squared_error for name, plan, _ in asked]
    )
    errors = np.where(np.isfinite(scored.projected), scored.projected, 0.0)[..., _probe_candidate(scored)].sum(1)
    calls = scored.calls / scored.calls.sum()
    return factored(errors * calls, np.stack([inside for _, _, inside in asked]), told) * calls


def factored(errors: Floats, inside: Floats, told: Floats) -> Floats:
    """Solve told[p] = sum over u of inside[p, u] * weight[u] * errors[u] for positive weights [U], as nearly as can be.

    Weights are products of one factor for each probe that holds the place; multiplicative updates, each probe in turn,
    keep them positive and leave equal what no probe tells apart.
    """
    floor = max(float(told.max()), 1e-30) * 1e-6
    weights = np.full(errors.shape, told.sum() / max(float((inside @ errors).sum()), 1e-30))
    for _ in range(ROUNDS):
        for row, seen in zip(inside, told, strict=True):
            predicted = float((row * weights * errors).sum())
            if predicted > 0.0:
                factor = max(float(seen), floor) / predicted
                weights = np.where(row > 0, weights * factor**0.5, weights)
    return weights


def _probe_candidate(scored: Scored) -> int:
    mean = scored.density[..., 1:].mean((0, 1))
    static = [isinstance(pattern, StaticPattern) for pattern in scored.candidates[1:]]
    distance = np.abs(mean - PROBED_DENSITY) + np.where(static, 10.0, 0.0)
    return 1 + int(distance.argmin())
