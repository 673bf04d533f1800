"""What two plans do differently: rules that only one has, and the calls that get another pattern."""

from __future__ import annotations

import itertools
from collections import defaultdict
from dataclasses import dataclass, replace
from typing import Any

from dit_sparse.patterns import Pattern
from dit_sparse.plan import ModelBinding, Plan, Rule, format_indices
from dit_sparse.search.plans import rule_lines


@dataclass(frozen=True)
class Change:
    """Give the calls, of layers x heads in a window of steps [start, end), whose pattern is `a` in one plan, `b` in
    the other. transformer: component name, None where neither plan names one, "others" beside those that they name.
    """

    steps: tuple[float, float]
    transformer: str | None
    layers: tuple[int, ...]
    heads: tuple[int, ...]
    a: Pattern
    b: Pattern

    def to_dict(self) -> dict[str, Any]:
        place = {"layers": format_indices(self.layers), "heads": format_indices(self.heads)}
        patterns = {"a": self.a.to_dict(), "b": self.b.to_dict()}
        return {"steps": list(self.steps), "transformer": self.transformer, **place, **patterns}

    def row(self) -> tuple[str, ...]:
        steps = "-".join(f"{100 * share:.4g}%" for share in self.steps)
        indices = format_indices(self.layers), format_indices(self.heads)
        return steps, self.transformer or "", *indices, f"{self.a} -> {self.b}"


@dataclass(frozen=True)
class Difference:
    """Hold what differs. changes: None where the number of layers or heads is not known."""

    models: tuple[ModelBinding | None, ModelBinding | None]
    only_a: tuple[Rule, ...]
    only_b: tuple[Rule, ...]
    changes: tuple[Change, ...] | None

    @property
    def same(self) -> bool | None:
        """Say whether both plans do the same, None where rules differ and that cannot be told."""
        if self.models[0] != self.models[1]:
            return False
        return None if self.changes is None else not self.changes

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {
            "same": self.same,
            "models": [None if model is None else str(model) for model in self.models],
            "only_a": [rule.to_dict() for rule in self.only_a],
            "only_b": [rule.to_dict() for rule in self.only_b],
            "changes": None if self.changes is None else [change.to_dict() for change in self.changes],
        }


def diff_plans(a: Plan, b: Plan, layers: int | None = None, heads: int | None = None) -> Difference:
    """Compare two plans, over so many layers and heads; None: those of the model that a plan is bound to.

    Names and provenance do not count.

    Raises:
        ValueError: fewer than one layer or head, fewer than a rule names, or plans bound to different sizes where none
            is given.
    """
    models = (a.model, b.model)
    layers, heads = (_size(what, given, models) for what, given in (("layers", layers), ("heads", heads)))
    only_a = tuple(rule for rule in a.rules if rule not in b.rules)
    only_b = tuple(rule for rule in b.rules if rule not in a.rules)
    changes: tuple[Change, ...] | None = None
    if a.rules == b.rules:
        changes = ()
    elif layers is not None and heads is not None:
        for plan in (a, b):
            replace(plan, model=None).check("the model compared on", layers, heads)
        changes = _changes(a.for_depth(layers), b.for_depth(layers), layers, heads)
    return Difference(models, only_a, only_b, changes)


def difference_lines(found: Difference) -> list[str]:
    """Return the verdict, or the rules and the calls that differ, as lines of text."""
    if found.same:
        return ["the same plan"]
    lines = []
    if found.models[0] != found.models[1]:
        lines += [f"{mark} is made for {model or 'any model'}" for mark, model in zip("AB", found.models, strict=True)]
    for mark, rules in (("A", found.only_a), ("B", found.only_b)):
        lines += [f"only in {mark}: {rule}" for rule in rule_lines(Plan(rules)) if rules]
    if found.changes is None:
        lines.append("which calls differ depends on the model: give --layers and --heads for a table of them")
    elif not found.changes:
        lines.append("every call gets the same pattern")
    else:
        lines += _table([("steps", "transformer", "layers", "heads", "A -> B"), *(one.row() for one in found.changes)])
    return lines


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    """Lay out rows under their headings, without columns that are empty; lines are never cut."""
    columns = [column for column in zip(*rows, strict=True) if any(column[1:])]
    padded = [[cell.ljust(max(map(len, column))) for cell in column] for column in columns]
    return ["  ".join(cells).rstrip() for cells in zip(*padded, strict=True)]


def _size(what: str, given: int | None, models: tuple[ModelBinding | None, ...]) -> int | None:
    bound = sorted({getattr(model, what) for model in models if model is not None})
    if given is None and len(bound) > 1:
        raise ValueError(f"the plans are bound to models of {bound[0]} and {bound[1]} {what}: give --{what}")
    size = given if given is not None or not bound else int(bound[0])
    if size is not None and size < 1:
        raise ValueError(f"{what} must be at least 1, got {size}")
    return size


def _changes(a: Plan, b: Plan, layers: int, heads: int) -> tuple[Change, ...]:
    rules = (*a.rules, *b.rules)
    bounds = sorted({0.0, 1.0, *(float(bound) for rule in rules for bound in rule.steps)})
    named = sorted({rule.transformer for rule in rules if rule.transformer is not None})
    found: dict[Change, list[Change]] = defaultdict(list)  # by the change without its steps
    for transformer in [*named, "others"] if named else [None]:
        for window in itertools.pairwise(bounds):
            for change in _window_changes(a, b, window, transformer, layers, heads):
                runs = found[replace(change, steps=(0.0, 1.0))]
                if runs and runs[-1].steps[1] == window[0]:
                    runs[-1] = replace(change, steps=(runs[-1].steps[0], window[1]))
                else:
                    runs.append(change)
    changes = [change for runs in found.values() for change in runs]
    return tuple(sorted(changes, key=lambda change: (change.transformer or "", change.steps, change.layers)))


def _window_changes(
    a: Plan, b: Plan, window: tuple[float, float], transformer: str | None, layers: int, heads: int
) -> list[Change]:
    here = [
        replace(plan, rules=tuple(rule for rule in plan.rules if rule.steps[0] <= window[0] < rule.steps[1]))
        for plan in (a, b)
    ]
    layers_of: dict[tuple[Pattern, Pattern, tuple[int, ...]], list[int]] = defaultdict(list)
    for layer in range(layers):
        heads_of: dict[tuple[Pattern, Pattern], list[int]] = defaultdict(list)
        of_a, of_b = (plan.patterns_at(window[0], transformer or "transformer", layer, heads) for plan in here)
        for head, pair in enumerate(zip(of_a, of_b, strict=True)):
            if pair[0] != pair[1]:
                heads_of[pair].append(head)
        for (in_a, in_b), some in heads_of.items():
            layers_of[in_a, in_b, tuple(some)].append(layer)
    return [
        Change(window, transformer, tuple(some_layers), some_heads, in_a, in_b)
        for (in_a, in_b, some_heads), some_layers in layers_of.items()
    ]
