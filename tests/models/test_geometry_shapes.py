"""Heads and head_dim that `inspect` and the benchmarks read from attention modules, for every model of the table."""

from __future__ import annotations

import pytest
import torch

from dit_sparse.patterns import Dense
from dit_sparse.pipelines.enable import sparse
from dit_sparse.pipelines.geometry import _shape
from dit_sparse.pipelines.targets import find_targets
from dit_sparse.schedule import Schedule
from tests.models.case import Case
from tests.models.cases import CASES

# one form of each class: forms differ in inputs, not in attention modules
FIRST_FORMS = list({case.model: case for case in reversed(CASES) if case.exists}.values())


@pytest.mark.parametrize("case", FIRST_FORMS, ids=lambda case: case.model)
def test_heads_and_head_dim_are_those_of_the_queries(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = case.build(), []
    attend = Schedule.attend

    def record(self: Schedule, layer: object, q: torch.Tensor, *args: object) -> torch.Tensor:
        seen.append(q.shape[2:])
        return attend(self, layer, q, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(Schedule, "attend", record)
    with sparse(model, Dense(), min_tokens=0), torch.no_grad():
        model(**case.arguments(case.draw(1, seed=1)), return_dict=False)
    shape = _shape("transformer", model)
    (target,) = find_targets(model)
    assert shape.layers == len(target.layers) > 0
    assert set(seen) == {(shape.heads, shape.head_dim)}
    assert shape.parameters > 0
