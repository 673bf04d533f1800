"""Every model of the table, at a tiny size: where its tokens are, bit-exact when dense, right when sparse."""

from __future__ import annotations

import contextlib
import inspect
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from dit_sparse.grid import Grid
from dit_sparse.patterns import Dense, Neighborhood, StaticPattern, TopBlocks
from dit_sparse.pipelines.enable import disable, enable, sparse, summary
from dit_sparse.pipelines.model_table import MODELS
from dit_sparse.pipelines.targets import find_targets
from dit_sparse.plan import Plan
from dit_sparse.schedule import Schedule
from tests.models.case import TEXT, Case, tensors_of
from tests.models.cases import CASES

HERE = [case for case in CASES if case.exists]
PATTERN = Neighborhood(window=(1, 0.5, 0.4))


@pytest.fixture(params=HERE, ids=str)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


def run(model: nn.Module, case: Case, lengths: list[int] | None = None, batch: int = 2) -> list[Tensor]:
    """Return the outputs for fixed inputs."""
    with torch.no_grad():
        out = model(**case.arguments(case.draw(batch, seed=1), lengths), return_dict=False)
    return [case.used(tensor) for tensor in tensors_of(out)]


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def apart(a: list[Tensor], b: list[Tensor]) -> float:
    return max(float((x - y).abs().max()) for x, y in zip(a, b, strict=True))


def tolerance(model: nn.Module, case: Case, lengths: list[int] | None = None) -> float:
    """Return eight times how far two dense kernels are apart on this model."""
    usual = run(model, case, lengths)
    assert all(out.isfinite().all() for out in usual)
    with sdpa_kernel(SDPBackend.MATH):
        noise = apart(usual, run(model, case, lengths))
    scale = max(float(out.abs().max()) for out in usual)
    assert 0 < noise < 1e-4 * scale
    return 8 * noise


@contextlib.contextmanager
def masked(model: nn.Module, pattern: StaticPattern, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Give the stock calls of the target modules, where they attend over the grid, the pattern's mask."""
    sdpa, inside = F.scaled_dot_product_attention, [False]
    (target,) = find_targets(model)
    grids: list[Grid] = []

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        bound = inspect.signature(type(model).forward).bind(model, *args, **kwargs).arguments
        grids.append(target.model.grid(model.config, bound))

    def oracle(query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, *args: Any, **kwargs: Any) -> Tensor:
        grid = grids[-1]
        queries, keys = query.shape[2], key.shape[2]
        if keys == grid.video_tokens:  # blocks of the video alone
            grid = Grid(*grid.shape)
        rest = keys - grid.tokens
        if inside[0] and rest >= 0 and queries in (keys, grid.video_tokens):
            prefix = grid.prefix + (rest if target.model.text == "prefix" else 0)
            suffix = grid.suffix + (rest if target.model.text == "suffix" else 0)
            mask = pattern.token_mask(Grid(*grid.shape, prefix, suffix))
            if queries != keys:
                mask = mask[prefix : prefix + queries]
            if attn_mask is None:
                attn_mask = mask
            elif attn_mask.dtype == torch.bool:
                attn_mask = attn_mask & mask
            else:
                attn_mask = attn_mask.masked_fill(~mask, -torch.inf)
        return sdpa(query, key, value, attn_mask, *args, **kwargs)

    handles = [model.register_forward_pre_hook(before, with_kwargs=True)]
    for name in target.layers:
        module = model.get_submodule(name)
        handles.append(module.register_forward_pre_hook(lambda *_: inside.__setitem__(0, True)))
        handles.append(module.register_forward_hook(lambda *_: inside.__setitem__(0, False)))
    with monkeypatch.context() as patched:
        patched.setattr(F, "scaled_dot_product_attention", oracle)
        yield
    for handle in handles:
        handle.remove()


def test_tokens_are_where_the_grid_says(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Change one patch of latents: in the first layer the query of its token changes, and no other one."""
    model, seen = case.build(), []
    attend = Schedule.attend

    def record(self: Schedule, layer: Any, q: Tensor, k: Tensor, *args: Any) -> Tensor:
        seen.append((layer.index, q, self._moment.grid_of(q.shape[1], k.shape[1])))
        return attend(self, layer, q, k, *args)

    monkeypatch.setattr(Schedule, "attend", record)
    latents = case.draw(1, seed=2)

    def first_call(latents: Tensor) -> tuple[Tensor, Grid]:
        seen.clear()
        with torch.no_grad():
            model(**case.arguments(latents), return_dict=False)
        return next((q, grid) for index, q, grid in seen if index == 0 and isinstance(grid, Grid))

    enable(model, TopBlocks(keep=1.0), min_tokens=0)
    before, grid = first_call(latents)
    assert grid == case.grid
    corners = itertools.product(*({0, size - 1} for size in grid.shape))
    for place in [*corners, tuple(size // 2 for size in grid.shape)]:
        changed = latents.clone()
        rows = (slice(at * size, (at + 1) * size) for at, size in zip(place, case.patch, strict=True))
        changed[(slice(None), slice(None), *rows)] += 1.0
        after, _ = first_call(changed)
        difference = (after - before).abs().amax((0, 2, 3))
        frame, row, column = place
        offset = 0 if len(difference) == grid.video_tokens else grid.prefix
        expected = offset + (frame * grid.height + row) * grid.width + column
        assert int(difference.argmax()) == expected, place
        if case.alone:
            assert difference.nonzero().flatten().tolist() == [expected], place


def test_dense_is_bit_identical(case: Case) -> None:
    """A dense plan, calls kept dense by an option, and a disabled model are the stock model."""
    model = case.build()
    stock = run(model, case)
    assert equal(run(model, case), stock)
    enable(model, Plan.dense(), min_tokens=0)
    assert equal(run(model, case), stock)
    with pytest.warns(UserWarning, match="replaces"):
        enable(model, TopBlocks(keep=0.5))  # tiny grids are below the default of min_tokens
    assert equal(run(model, case), stock)
    assert summary(model).sparse_calls == 0
    assert summary(model).dense_calls > 0
    assert all("min_tokens" in reason for reason in summary(model).dense_reasons)
    disable(model)
    assert equal(run(model, case), stock)


def test_keep_everything_runs_the_sparse_kernel(case: Case) -> None:
    model = case.build()
    stock, allowed = run(model, case), tolerance(model, case)
    for pattern in (TopBlocks(keep=1.0), Neighborhood(window=1.0)):
        with sparse(model, pattern, min_tokens=0, strict=True):
            out = run(model, case)
            assert summary(model).sparse_calls > 0
        assert apart(out, stock) <= allowed


def test_sparse_is_stock_with_a_masked_self_attention(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing but the self-attention changes, and that as the definition of the pattern says."""
    model = case.build()
    stock, allowed = run(model, case), tolerance(model, case)
    with masked(model, PATTERN, monkeypatch):
        oracle = run(model, case)
    with sparse(model, PATTERN, min_tokens=0, strict=True):
        out = run(model, case)
    assert apart(out, oracle) <= allowed
    assert apart(out, stock) > 30 * allowed
    assert equal(run(model, case), stock)


@pytest.mark.parametrize("case", [case for case in HERE if case.padded], ids=str)
def test_padded_text_is_honoured(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two prompts of different lengths in one batch: no padding token is read, by sparse or by trimmed dense calls."""
    model, lengths = case.build(), [TEXT - 7, TEXT - 2]
    stock, allowed = run(model, case, lengths), tolerance(model, case, lengths)
    assert apart(stock, run(model, case)) > 30 * allowed  # the mask counts in this model
    with sparse(model, Dense(), min_tokens=0, strict=True):
        assert apart(run(model, case, lengths), stock) <= allowed
        assert "plan: dense" in " ".join(summary(model).dense_reasons)
    with masked(model, PATTERN, monkeypatch):
        oracle = run(model, case, lengths)
    with sparse(model, PATTERN, min_tokens=0, strict=True):
        assert apart(run(model, case, lengths), oracle) <= allowed
    for one in range(2):
        with sparse(model, TopBlocks(keep=1.0), min_tokens=0, strict=True):
            assert apart(run(model, case, [lengths[one]] * 2), run_dense(model, case, [lengths[one]] * 2)) <= allowed


def run_dense(model: nn.Module, case: Case, lengths: list[int]) -> list[Tensor]:
    with sparse(model, Plan.dense(), min_tokens=0):
        return run(model, case, lengths)


def test_the_usual_grid_is_true(case: Case) -> None:
    """The grid that the model table states comes from its own rule, for latents of the usual size."""
    import diffusers

    cls = getattr(diffusers, case.model)
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(cls.__init__).parameters.items()
        if parameter.default is not inspect.Parameter.empty
    }
    config = diffusers.configuration_utils.FrozenDict({**defaults, **case.usual_config})
    latents = torch.empty(1, *case.usual, device="meta")
    model = MODELS[case.model]
    grid = model.grid(config, case.arguments(latents))
    assert grid.shape == model.usual[1].shape
