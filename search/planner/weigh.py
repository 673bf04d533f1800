"""From scores and prices to the solver's problem, and from its answer to a plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np

from dit_sparse.patterns import Dense, Pattern, StaticPattern
from dit_sparse.plan import ModelBinding, Plan, Rule
from dit_sparse.search.planner.groups import StepGroups
from dit_sparse.search.planner.prices import Prices
from dit_sparse.search.planner.problem import MOST_FAMILIES, Choice, Floats, Problem
from dit_sparse.search.planner.scoring import MEASURED, Scores
from dit_sparse.search.planner.store import Store, Unit

PRICES_TRIED = 12  # of a loss in milliseconds, at which a shortlist is judged


class Place(NamedTuple):
    """Name one unit of the problem."""

    group: int
    transformer: str
    layer: int


@dataclass(frozen=True, eq=False)
class Scored:
    """Hold the mean scores over the prompts of all places that were called, float64 [U, H, C] each, dense first.

    calls: [U], attention calls of a place in a whole run. Places with fewer heads than others are padded with heads
    that only dense serves, at no cost.
    """

    places: tuple[Place, ...]
    candidates: tuple[Pattern, ...]
    calls: Floats
    real: Floats  # [U, H]: 1 for heads that exist
    recall: Floats
    error: Floats
    projected: Floats
    density: Floats

    def only(self, chosen: Sequence[int]) -> Scored:
        """Keep some of the candidates."""
        kept = {name: getattr(self, name)[..., list(chosen)] for name in MEASURED}
        candidates = tuple(self.candidates[index] for index in chosen)
        return Scored(self.places, candidates, self.calls, self.real, **kept)


def gather(
    store: Store,
    prompts: int,
    layers: Sequence[tuple[str, int]],
    candidates: Sequence[Pattern],
    groups: StepGroups,
    steps: int,
) -> Scored:
    """Read all units of a finished capture.

    Raises: ValueError where no layer was ever called with a known grid.
    """
    found: dict[Place, tuple[Scores, float]] = {}
    for group in sorted(groups.sampled(steps).values()):
        for name, index in layers:
            units = [store.load(Unit(prompt, group, name, index)) for prompt in range(prompts)]
            heard = [unit for unit in units if unit is not None and unit.calls]
            if heard:
                mean = Scores.mean(heard)
                calls = mean.calls / len(heard) * len(groups.steps_of(group, steps))
                found[Place(group, name, index)] = mean, calls
    if not found:
        raise ValueError("no attention call could be scored: every one ran dense for a reason that summary() tells")
    heads = max(scores.recall.shape[1] for scores, _ in found.values())
    shape = (len(found), heads, len(candidates))
    arrays = {name: np.full(shape, np.inf if name == "projected" else 1.0) for name in MEASURED}
    real = np.zeros(shape[:2])
    for number, (scores, _) in enumerate(found.values()):
        own = scores.recall.shape[1]
        real[number, :own] = 1.0
        for name in MEASURED:
            arrays[name][number, :own, 1:] = getattr(scores, name).double().numpy().T
    for name, exact in (("recall", 1.0), ("error", 0.0), ("projected", 0.0), ("density", 1.0)):
        arrays[name][..., 0] = exact
    of_run = np.array([calls for _, calls in found.values()])
    return Scored(tuple(found), tuple(candidates), of_run, real, **arrays)


def make_problem(scored: Scored, prices: Prices, weights: Floats, batch: int = 1) -> Problem:
    """Weigh the scores; weights [U]: what a squared error of a layer's output adds to that of the clip.

    batch: clips that a priced call serves; milliseconds are those of one clip.
    """
    families = _families(scored.candidates)
    names = list(dict.fromkeys(families))
    head = np.array([prices.by_pattern[str(pattern)].head for pattern in scored.candidates])
    launch = np.zeros(len(names))
    for pattern, family in zip(scored.candidates, families, strict=True):
        launch[names.index(family)] = max(launch[names.index(family)], prices.by_pattern[str(pattern)].launch)
    calls = scored.calls[:, None] / batch
    return Problem(
        loss=scored.projected * weights[:, None, None],
        head_ms=calls[..., None] * head * scored.real[..., None],
        family=np.array([names.index(family) for family in families]),
        launch_ms=calls * launch,
        mixed_ms=calls[:, 0] * prices.mixed,
    )


def shortlist(scored: Scored, prices: Prices, weights: Floats) -> Scored:
    """Keep as many candidates as the solver can weigh: dense, what shares launches, and the most useful of the rest.

    A static pattern is a launch of its own. Those are kept, one after the other, that lower the least sum of time and
    priced loss most, launches left out, over prices of a loss from the most useful to the least.
    """
    families = _families(scored.candidates)
    joined = [n for n, p in enumerate(scored.candidates) if not isinstance(p, StaticPattern) or isinstance(p, Dense)]
    alone = [n for n in range(len(scored.candidates)) if n not in joined]
    room = MOST_FAMILIES - len({families[n] for n in joined})
    if len(alone) <= room:
        return scored
    head = np.array([prices.by_pattern[str(pattern)].head for pattern in scored.candidates])
    ms = (scored.calls[:, None] * head)[:, None]
    loss = scored.projected * weights[:, None, None]
    sums = np.where(np.isfinite(loss), loss, 0.0).sum((0, 1))
    worth = ms.max() * loss.shape[1] * len(loss) / np.quantile(sums[1:], np.linspace(0.02, 0.98, PRICES_TRIED))
    kept: list[int] = []
    best = np.stack([(ms + price * loss)[..., joined].min(-1) for price in worth])  # [prices, U, H]
    for _ in range(room):
        gains = {n: _gain(best, ms[..., n], loss[..., n], worth) for n in alone if n not in kept}
        chosen = max(gains, key=lambda n: (gains[n], -n))
        if gains[chosen] <= 0.0:
            break
        kept.append(chosen)
        best = np.minimum(best, np.stack([ms[..., chosen] + price * loss[..., chosen] for price in worth]))
    return scored.only(sorted([*joined, *kept]))


def to_plan(
    scored: Scored,
    choice: Choice,
    groups: StepGroups,
    name: str,
    model: ModelBinding | None,
    provenance: Mapping[str, Any],
    one_transformer: bool,
) -> Plan:
    """Write a choice as rules: heads of a layer with one pattern together, then layers, then windows of steps."""
    wanted: dict[tuple[int, str, Pattern, tuple[int, ...]], list[int]] = {}
    for place, chosen, real in zip(scored.places, choice, scored.real, strict=True):
        patterns = [scored.candidates[c] for c in chosen[: int(real.sum())]]
        for pattern in dict.fromkeys(patterns):
            if not isinstance(pattern, Dense):
                heads = tuple(h for h, one in enumerate(patterns) if one == pattern)
                every = heads if len(heads) < len(patterns) else ()
                wanted.setdefault((place.group, place.transformer, pattern, every), []).append(place.layer)
    by_place: dict[tuple[str, Pattern, tuple[int, ...], tuple[int, ...]], list[int]] = {}
    for (group, transformer, pattern, heads), layers in wanted.items():
        by_place.setdefault((transformer, pattern, heads, tuple(sorted(layers))), []).append(group)
    rules = [
        Rule(pattern, window, None if one_transformer else transformer, layers, heads or None)
        for (transformer, pattern, heads, layers), of in by_place.items()
        for window in _windows(sorted(of), groups)
    ]
    rules.sort(key=lambda rule: (rule.steps, rule.transformer or "", rule.layers or (), rule.heads or ()))
    return Plan(tuple(rules), name, model, provenance)


def densities(scored: Scored, choice: Choice) -> tuple[float, float]:
    """Return the density of what a choice makes sparse (1 where it is nothing), and that of the whole run."""
    kept = np.take_along_axis(scored.density, choice[..., None], axis=-1)[..., 0]
    weight = scored.calls[:, None] * scored.real
    sparse = weight * (choice > 0)
    own = float((kept * sparse).sum() / sparse.sum()) if sparse.any() else 1.0
    return own, float((kept * weight).sum() / weight.sum())


def _families(candidates: Sequence[Pattern]) -> list[Pattern]:
    return [pattern.family() for pattern in candidates]


def _gain(best: Floats, ms: Floats, loss: Floats, worth: Floats) -> float:
    """Say what one more candidate saves, each price counted alike."""
    priced = np.stack([ms + price * loss for price in worth])
    saved = np.maximum(best - priced, 0.0).sum((1, 2)) / best.sum((1, 2))
    return float(saved.sum())


def _windows(groups_of_rule: Sequence[int], groups: StepGroups) -> list[tuple[float, float]]:
    """Join neighbouring groups to windows."""
    runs = [
        [group for _, group in run] for _, run in groupby(enumerate(groups_of_rule), lambda pair: pair[1] - pair[0])
    ]
    return [(groups.window(run[0])[0], groups.window(run[-1])[1]) for run in runs]
