"""What ran sparse, what ran dense and why: the record of the last run."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from dit_sparse.monitor import Measured


# Tensors that a sum lets wait before it folds them into one: a few hundred bytes each.
MOST_WAITING = 256


class Sum:
    """Add up tensors on their device when somebody asks, or when many wait: not with a launch for each."""

    def __init__(self) -> None:
        self._parts: list[Tensor] = []

    def add(self, part: Tensor) -> None:
        """Count every element of a tensor [n], which must not change afterwards."""
        self._parts.append(part)
        if len(self._parts) > MOST_WAITING:
            self._parts = [torch.cat(self._parts).sum(0, keepdim=True)]

    def __float__(self) -> float:
        return float(torch.cat(self._parts).sum()) if self._parts else 0.0


@dataclass
class LayerRecord:
    """Count the attention calls of one layer. Pairs are query-key pairs among video tokens over batch and heads."""

    name: str
    patterns: Counter[str] = field(default_factory=Counter)
    dense_reasons: Counter[str] = field(default_factory=Counter)
    all_pairs: float = 0.0  # of the sparse calls
    dense_pairs: float = 0.0  # of the dense calls whose size is known
    kept_pairs: Sum = field(default_factory=Sum)
    visited_pairs: Sum = field(default_factory=Sum)
    sparse_calls: int = 0
    measured: list[Measured] = field(default_factory=list)  # under monitor=True, in the order of the calls

    @property
    def dense_calls(self) -> int:
        return self.dense_reasons.total()


@dataclass(frozen=True)
class Mean:
    """Sum up what was measured of sparse calls: means over (step, layer, head), and where recall was lowest."""

    recall: float
    lowest_recall: float
    lowest_at: tuple[str, int | None, int]  # layer, step, head
    error: float


@dataclass(frozen=True)
class Summary:
    """Report the last run: calls, densities and the reasons of what stayed dense. `str()` gives the table.

    density: kept / all pairs in sparse calls. computed_density: pairs in visited blocks. run_density: kept pairs over
    the whole run, dense calls included. None where nothing ran sparse (or nothing ran).
    """

    plan: str
    grid: str
    backend: str
    layers: tuple[LayerRecord, ...]
    unknown: tuple[str, ...] = ()  # attention modules left alone because their processor is not known

    @property
    def sparse_calls(self) -> int:
        return sum(layer.sparse_calls for layer in self.layers)

    @property
    def dense_calls(self) -> int:
        return sum(layer.dense_calls for layer in self.layers)

    @property
    def dense_reasons(self) -> dict[str, int]:
        return dict(sum((layer.dense_reasons for layer in self.layers), Counter[str]()))

    @property
    def density(self) -> float | None:
        return _share(self._sum("kept_pairs"), self._sum("all_pairs"))

    @property
    def computed_density(self) -> float | None:
        return _share(self._sum("visited_pairs"), self._sum("all_pairs"))

    @property
    def run_density(self) -> float | None:
        dense = self._sum("dense_pairs")
        return _share(self._sum("kept_pairs") + dense, self._sum("all_pairs") + dense)

    @property
    def measured(self) -> Mean | None:
        """Return what `monitor=True` measured over all sparse calls, or None without it. Waits for the device."""
        found = [(layer.name, one) for layer in self.layers for one in layer.measured]
        if not found:
            return None
        recalls, errors = torch.cat([one.recall for _, one in found]), torch.cat([one.error for _, one in found])
        places = [(name, one.step, head) for name, one in found for head in one.heads]
        worst = int(recalls.argmin())
        return Mean(float(recalls.mean()), float(recalls[worst]), places[worst], float(errors.mean()))

    def _sum(self, name: str) -> float:
        return float(sum(float(getattr(layer, name)) for layer in self.layers))

    def to_dict(self) -> dict[str, Any]:
        return {
            "plan": self.plan,
            "grid": self.grid,
            "backend": self.backend,
            "sparse_calls": self.sparse_calls,
            "dense_calls": self.dense_calls,
            "dense_reasons": self.dense_reasons,
            "density": self.density,
            "computed_density": self.computed_density,
            "run_density": self.run_density,
            "measured": None if self.measured is None else asdict(self.measured),
            "unknown": list(self.unknown),
            "layers": [
                {
                    "name": layer.name,
                    "sparse_calls": layer.sparse_calls,
                    "dense_calls": layer.dense_calls,
                    "patterns": dict(layer.patterns),
                    "dense_reasons": dict(layer.dense_reasons),
                    "density": _share(float(layer.kept_pairs), layer.all_pairs),
                    "measured": [
                        {
                            "step": one.step,
                            "heads": list(one.heads),
                            "recall": _rounded(one.recall),
                            "error": _rounded(one.error),
                        }
                        for one in layer.measured
                    ],
                }
                for layer in self.layers
            ],
        }

    def __str__(self) -> str:
        lines = [
            f"plan {self.plan}: grid {self.grid}, backend {self.backend}",
            f"  {self.sparse_calls} attention calls sparse, {self.dense_calls} dense",
        ]
        if self.density is not None and self.computed_density is not None and self.run_density is not None:
            lines.append(f"  in sparse calls {_kept(self.density)}, whole blocks {_kept(self.computed_density)}")
            lines.append(f"  over the run    {_kept(self.run_density)}")
        if (found := self.measured) is not None:
            name, step, head = found.lowest_at
            lines.append(
                f"  measured: recall {found.recall:.3f}, lowest {found.lowest_recall:.3f} ({name}, step {step}, head "
                f"{head}); output error {found.error:.3f} (a diagnostic of single calls, not of the clip)"
            )
        lines += [f"  dense: {reason}: {count} calls" for reason, count in self.dense_reasons.items()]
        lines += [f"  left alone: {name}" for name in self.unknown]
        return "\n".join(lines)


def _rounded(values: Tensor) -> list[float]:
    return [round(value, 4) for value in values.tolist()]


def _kept(density: float) -> str:
    return f"keep {density:.1%} (skip {1 - density:.1%})"


def _share(part: float, whole: float) -> float | None:
    return part / whole if whole else None
