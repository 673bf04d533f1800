"""Every model of the table on a real GPU: the Triton kernel in place of the stock attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dit_sparse.patterns import Neighborhood, TopBlocks
from dit_sparse.pipelines.enable import enable, summary
from tests.models.case import TEXT, Case, tensors_of
from tests.models.cases import CASES

pytestmark = pytest.mark.gpu


def on_gpu(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.cuda()
    if isinstance(value, dict):
        return {name: on_gpu(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(on_gpu(one) for one in value)
    if type(value).__module__.startswith("diffusers"):  # a cache of keys and values
        vars(value).update(on_gpu(vars(value)))
    return value


def run(model: nn.Module, case: Case) -> list[Tensor]:
    lengths = [TEXT - 7, TEXT - 2] if case.padded else None
    with torch.no_grad():
        out = model(**on_gpu(case.arguments(case.draw(2, seed=1), lengths)), return_dict=False)
    return [case.used(tensor) for tensor in tensors_of(out)]


def apart(a: list[Tensor], b: list[Tensor]) -> float:
    return max(float((x - y).norm() / y.norm()) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("case", [case for case in CASES if case.exists], ids=str)
def test_keep_everything_agrees_with_stock(case: Case) -> None:
    model = case.build().cuda()
    stock = run(model, case)
    enable(model, TopBlocks(keep=1.0), min_tokens=0, strict=True, backend="triton")
    out = run(model, case)
    assert summary(model).sparse_calls > 0
    assert summary(model).to_dict()["backend"] == "triton"
    rounding = apart(out, stock)
    assert rounding < 5e-3  # fp32, of which tensor cores keep ten bits
    with pytest.warns(UserWarning, match="replaces"):
        enable(model, Neighborhood(window=(1, 0.5, 0.4)), min_tokens=0, strict=True, backend="triton")
    assert apart(run(model, case), stock) > 3 * rounding
