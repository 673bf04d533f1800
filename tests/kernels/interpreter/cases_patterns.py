"""Every pattern through the Triton kernel in Triton's interpreter; test_other_processes starts this file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import dit_sparse as ds
from dit_sparse.kernels import block_scores, choice, pool, triton_block_scores, triton_choice, triton_pool
from dit_sparse.patterns import PatternState
from tests.core.everything import EVERYTHING
from tests.core.examples import EXAMPLES

GRID = ds.Grid(3, 7, 11, prefix=4, suffix=9)


@pytest.mark.parametrize("pattern", [one for many in EVERYTHING.values() for one in many], ids=str)
def test_everything_is_dense(pattern: ds.Pattern) -> None:
    q, k, v = (torch.randn(1, GRID.tokens, heads, 16) for heads in (2, 1, 1))
    out = ds.sparse_attention(q, k, v, pattern, GRID, backend="triton")
    by_head = [x.double().transpose(1, 2) for x in (q, k, v)]
    expected = torch.nn.functional.scaled_dot_product_attention(*by_head, enable_gqa=True).transpose(1, 2)
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("pattern", [one for many in EXAMPLES.values() for one in many], ids=str)
def test_kernels_agree_on_what_a_pattern_keeps(pattern: ds.Pattern) -> None:
    q, k, v = (torch.randn(1, GRID.tokens, 2, 16) for _ in range(3))
    triton, reference = (ds.sparse_attention(q, k, v, pattern, GRID, backend=name) for name in ("triton", "reference"))
    torch.testing.assert_close(triton, reference, atol=1e-5, rtol=1e-5)


class Operations(TorchDispatchMode):
    """Count the tensor operations that a GPU would have to be told about: all but views and empty tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        view = any(argument.alias_info is not None for argument in func._schema.arguments)
        if not view and "empty" not in str(func):
            self.found[func._schema.name.removeprefix("aten::")] += 1
        return result


class Kernel:
    """Count launches of a kernel that does nothing."""

    def __init__(self, name: str, found: Counter[str]) -> None:
        self.name, self.found = name, found

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return self._launch

    def _launch(self, *args: Any, **kwargs: Any) -> None:
        self.found[self.name] += 1


@pytest.mark.parametrize("rule", [{"keep": 0.3}, {"mass": 0.5}, {"threshold": 0.5, "at_least": 0.1}], ids=str)
@pytest.mark.parametrize("hides", [False, True], ids=["all keys", "hidden keys"])
def test_choosing_blocks_takes_four_launches(
    rule: dict[str, float], hides: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched: Counter[str] = Counter()
    for module, name in ((triton_pool, "_pool_both"), (triton_block_scores, "_scores"), (triton_choice, "_choose")):
        monkeypatch.setattr(module, name, Kernel(name, launched))
    for module in (pool, block_scores, choice):
        monkeypatch.setattr(module, "runs_triton", lambda _: True)
    pattern = ds.TopBlocks(order="tile:2x4x4", sinks="text+diagonal", **rule)
    q, k = torch.randn(2, GRID.tokens, 4, 16), torch.randn(2, GRID.tokens, 2, 16)
    lengths = torch.tensor([GRID.tokens, GRID.tokens - 9], dtype=torch.int32) if hides else None
    state = PatternState(pattern.token_order().layout(GRID), 0.25, kv_lengths=lengths)
    pattern.select(q, k, GRID, state)  # makes what depends on the shapes alone
    launched.clear()
    with Operations() as operations:
        pattern.select(q, k, GRID, state)
    assert launched == {"_pool_both": 1, "_scores": 1, "_choose": 1}
    assert operations.found == {"zeros": 1}
