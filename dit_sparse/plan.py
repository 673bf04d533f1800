"""A plan: which pattern runs where. A small JSON file that anyone can read, share and compare."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dit_sparse.nearest import did_you_mean
from dit_sparse.patterns import Dense, Pattern, pattern_from_dict

SCHEMA = 1
FILE_NAME = "plan.json"


@dataclass(frozen=True)
class Rule:
    """Give one pattern to a window of steps, a transformer, some layers and some heads; None means all of them.

    steps: [start, end) as fractions of the scheduler's full schedule, so that a plan serves 4 and 50 steps alike.
    layers: numbers from 0, or negative ones counted from the last (-1), so that a plan may serve any depth.
    transformer: component name, e.g. "transformer_2" for the second expert of Wan 2.2.
    """

    pattern: Pattern
    steps: tuple[float, float] = (0.0, 1.0)
    transformer: str | None = None
    layers: tuple[int, ...] | None = None
    heads: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        numbers = len(self.steps) == 2 and all(isinstance(x, (int, float)) for x in self.steps)
        if not numbers or not 0.0 <= self.steps[0] < self.steps[1] <= 1.0:
            raise ValueError(f"steps must be [start, end) with 0 <= start < end <= 1, got {list(self.steps)}")
        if self.transformer is not None and not isinstance(self.transformer, str):
            raise ValueError(f"transformer must be a component name or null, got {self.transformer!r}")

    def covers(self, fraction: float | None, transformer: str, layer: int) -> bool:
        """Say whether the rule holds at this point; `fraction` None (no step known) only meets windows of all steps."""
        if self.steps != (0.0, 1.0) and (fraction is None or not self.steps[0] <= fraction < self.steps[1]):
            return False
        return self.transformer in (None, transformer) and (self.layers is None or layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        return {
            "steps": list(self.steps),
            "transformer": self.transformer,
            "layers": format_indices(self.layers),
            "heads": format_indices(self.heads),
            "pattern": self.pattern.to_dict(),
        }


@dataclass(frozen=True)
class ModelBinding:
    """Say which model a plan was made for. `layers` counts its sparse-able self-attention layers.

    config: hash of the transformer's config (`dit_sparse.pipelines.config_hash`), or None where any config will do.
    """

    transformer_class: str
    layers: int
    heads: int
    config: str | None = None

    def fits(self, other: ModelBinding) -> bool:
        """Say whether both may be one model: their configs count only where both are known."""
        configs = {self.config, other.config} - {None}
        return replace(self, config=None) == replace(other, config=None) and len(configs) < 2

    def __str__(self) -> str:
        made_of = "" if self.config is None else f", config {self.config}"
        return f"{self.transformer_class} with {self.layers} layers x {self.heads} heads{made_of}"


@dataclass(frozen=True)
class Plan:
    """Hold rules in order: the first rule that covers a step, transformer, layer and head names its pattern.

    What no rule covers runs dense. `provenance` says where the plan comes from; it is carried and never changes
    what runs. Its "grid", such as "17x32x32" or some joined by commas, is where it was measured: on another one
    `Schedule` warns once.
    """

    rules: tuple[Rule, ...] = ()
    name: str = "plan"
    model: ModelBinding | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict, compare=False)

    @classmethod
    def dense(cls) -> Plan:
        """Return the plan without a rule: everything runs the model's own attention."""
        return cls((), "dense")

    @classmethod
    def of(cls, pattern: Pattern, name: str | None = None) -> Plan:
        """Return the plan that uses one pattern everywhere."""
        return cls((Rule(pattern),), name or pattern.name)

    @property
    def needs_total_steps(self) -> bool:
        return any(rule.steps != (0.0, 1.0) for rule in self.rules)

    def patterns_at(self, fraction: float | None, transformer: str, layer: int, heads: int) -> tuple[Pattern, ...]:
        """Return the pattern of each head of one layer at one step (a fraction of the schedule, None if unknown)."""
        chosen: list[Pattern | None] = [None] * heads
        for rule in self.rules:
            if rule.covers(fraction, transformer, layer):
                for head in range(heads) if rule.heads is None else rule.heads:
                    if head < heads and chosen[head] is None:
                        chosen[head] = rule.pattern
            if None not in chosen:
                break
        return tuple(Dense() if pattern is None else pattern for pattern in chosen)

    def for_depth(self, layers: int) -> Plan:
        """Return the plan with layers that were counted from the last replaced by their numbers."""

        def absolute(rule: Rule) -> Rule:
            numbers = None if rule.layers is None else tuple(sorted({index % layers for index in rule.layers}))
            return replace(rule, layers=numbers)

        return replace(self, rules=tuple(absolute(rule) for rule in self.rules))

    def check(self, transformer_class: str, layers: int, heads: int, config: str | None = None) -> None:
        """Refuse a model that the plan cannot mean; `config` None is not known, and not asked for.

        Raises: ValueError when the plan is bound to another model, or names layers or heads that this one lacks.
        """
        if self.model is not None and not self.model.fits(ModelBinding(transformer_class, layers, heads, config)):
            same_size = self.model.fits(ModelBinding(transformer_class, layers, heads))
            found = f"config {config}" if same_size else f"{transformer_class} with {layers} x {heads}"
            way_out = ', or take "config" out of the plan\'s "model" if you know that it serves both' * same_size
            raise ValueError(
                f"plan {self.name!r} was made for {self.model}; this model is {found}. "
                f"Use a plan made for it, or a preset such as 'balanced'{way_out}"
            )
        for number, rule in enumerate(self.rules):
            for what, indices, count in (("layer", rule.layers, layers), ("head", rule.heads, heads)):
                missing = [index for index in indices or () if not -count <= index < count]
                if missing:
                    raise ValueError(
                        f"plan {self.name!r}, rule {number}: {what} {missing[-1]} does not exist; "
                        f"{transformer_class} has {count} {what}s (0-{count - 1})"
                    )

    def to_dict(self) -> dict[str, Any]:
        model: dict[str, Any] | None = None
        if self.model is not None:
            model = {"class": self.model.transformer_class, "layers": self.model.layers, "heads": self.model.heads}
            model |= {} if self.model.config is None else {"config": self.model.config}
        return {
            "schema": SCHEMA,
            "name": self.name,
            "model": model,
            "rules": [rule.to_dict() for rule in self.rules],
            "provenance": dict(self.provenance),
        }

    @classmethod
    def from_dict(cls, values: object, where: str = "plan") -> Plan:
        """Build a plan from its JSON form.

        Raises: ValueError that names the file, the rule and the field at fault.
        """
        fields = _object(values, where, {"schema", "name", "model", "rules", "provenance"}, {"schema", "rules"})
        if fields["schema"] != SCHEMA:
            raise ValueError(
                f"{where}: schema must be {SCHEMA}, got {fields['schema']!r}; update dit-sparse or the plan"
            )
        if not isinstance(fields["rules"], list):
            raise ValueError(f"{where}: rules must be a list, got {fields['rules']!r}")
        rules = tuple(_rule(rule, f"{where}, rule {number}") for number, rule in enumerate(fields["rules"]))
        name = fields.get("name", "plan")
        if not isinstance(name, str):
            raise ValueError(f"{where}: name must be a string, got {name!r}")
        provenance = fields.get("provenance") or {}
        if not isinstance(provenance, Mapping):
            raise ValueError(f"{where}: provenance must be an object, got {provenance!r}")
        return cls(rules, name, _model(fields.get("model"), where), provenance)

    def save(self, folder: str | Path) -> Path:
        """Write `plan.json` into a folder (made if needed), replacing an older one in one step; return its path."""
        path = Path(folder) / FILE_NAME
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.to_dict(), indent=2) + "\n"
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".plan-", suffix=".json")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
        return path

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan from its file or from the folder that holds `plan.json`.

        Raises: FileNotFoundError; ValueError for what is no plan (truncated, no JSON, unknown fields or patterns).
        """
        file = Path(path) / FILE_NAME if Path(path).is_dir() else Path(path)
        if not file.exists():
            raise FileNotFoundError(f"no plan at {file}")
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{file} is not a plan: no valid JSON ({error}). Is the file complete?") from error
        return cls.from_dict(values, str(file))


def parse_indices(text: object, where: str = "indices") -> tuple[int, ...] | None:
    """Read "all" (None) or a list such as "0, 1, 47-49"; -1 is the last.

    Raises: ValueError for anything else.
    """
    if text is None or text == "all":
        return None
    indices: set[int] = set()
    try:
        for part in map(str.strip, str(text).split(",")):
            first, dash, last = part.partition("-") if not part.startswith("-") else (part, "", "")
            numbers = range(int(first), int(last if dash else first) + 1)
            if not numbers:
                raise ValueError(part)
            indices.update(numbers)
    except ValueError:
        raise ValueError(f'{where} must be "all" or a list such as "0, 1, 47-49", got {text!r}') from None
    return tuple(sorted(indices))


def format_indices(indices: tuple[int, ...] | None) -> str:
    """Write indices in the form that `parse_indices` reads, runs shortened to ranges."""
    if indices is None:
        return "all"
    runs: list[list[int]] = []
    for index in sorted(indices):
        if runs and index == runs[-1][1] + 1 and runs[-1][0] >= 0:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def _rule(values: object, where: str) -> Rule:
    fields = _object(values, where, {"steps", "transformer", "layers", "heads", "pattern"}, {"pattern"})
    steps = fields.get("steps", [0.0, 1.0])
    if not isinstance(steps, list) or len(steps) != 2:
        raise ValueError(f"{where}: steps must be [start, end], got {steps!r}")
    try:
        return Rule(
            pattern_from_dict(fields["pattern"], f"{where}, pattern"),
            (steps[0], steps[1]),
            fields.get("transformer"),
            parse_indices(fields.get("layers"), f"{where}, layers"),
            parse_indices(fields.get("heads"), f"{where}, heads"),
        )
    except ValueError as error:
        raise ValueError(str(error) if str(error).startswith(where) else f"{where}: {error}") from error


def _model(values: object, where: str) -> ModelBinding | None:
    if values is None:
        return None
    needed = {"class", "layers", "heads"}
    fields = _object(values, f"{where}, model", needed | {"config"}, needed)
    config = fields.get("config")
    for name in ("layers", "heads"):
        if not isinstance(fields[name], int) or isinstance(fields[name], bool) or fields[name] < 1:
            raise ValueError(f"{where}, model: {name} must be an integer >= 1, got {fields[name]!r}")
    if not isinstance(fields["class"], str):
        raise ValueError(f"{where}, model: class must be the name of a transformer class, got {fields['class']!r}")
    if config is not None and not (isinstance(config, str) and re.fullmatch("[0-9a-f]{16}", config)):
        raise ValueError(f"{where}, model: config must be 16 hex digits, or left out for any config, got {config!r}")
    return ModelBinding(fields["class"], fields["layers"], fields["heads"], config)


def _object(values: object, where: str, known: set[str], needed: set[str]) -> Mapping[str, Any]:
    if not isinstance(values, Mapping):
        raise ValueError(f"{where} must be a JSON object, got {type(values).__name__}")
    if unknown := sorted(set(values) - known):
        raise ValueError(
            f"{where}: unknown field {unknown[0]!r}{did_you_mean(unknown[0], known)}; known: {', '.join(sorted(known))}"
        )
    if missing := sorted(needed - set(values)):
        raise ValueError(f"{where}: field {missing[0]!r} is missing")
    return values
