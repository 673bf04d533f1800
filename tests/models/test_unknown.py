"""A transformer that the table lacks: refused with a hint, and sparse once its user gives the grid."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from dit_sparse.grid import Grid
from dit_sparse.moment import CROSS
from dit_sparse.patterns import Neighborhood, TopBlocks
from dit_sparse.pipelines.enable import disable, enable, processors, sparse, summary
from dit_sparse.pipelines.hooks import find_hook
from dit_sparse.pipelines.model_table import MODELS, REFUSED
from dit_sparse.pipelines.processors import SparseProcessor
from dit_sparse.schedule import StrictError
from tests.models import own_dit
from tests.models.cases import CASES

GRID = own_dit.GRID
PATTERN = Neighborhood(window=(1, 0.5, 0.4))
WAN = "WanTransformer3DModel"
LAYERS = 2  # self-attentions of either model, and as many cross-attentions


@dataclasses.dataclass(frozen=True)
class Unknown:
    """Hold a transformer that nobody knows, the arguments of a forward, and the path of one self-attention."""

    model: Any
    arguments: dict[str, Any]
    one: str

    def run(self) -> Tensor:
        with torch.no_grad():
            out = self.model(**self.arguments)
        return out if isinstance(out, Tensor) else out.sample

    def processors(self) -> dict[str, Any]:
        return {name: one.processor for name, one in self.model.named_modules() if hasattr(one, "processor")}

    def ours(self) -> list[str]:
        return [name for name, processor in self.processors().items() if isinstance(processor, SparseProcessor)]

    def tolerance(self) -> float:
        """Return eight times how far two dense kernels are apart."""
        usual = self.run()
        with sdpa_kernel(SDPBackend.MATH):
            noise = apart(self.run(), usual)
        assert 0 < noise < 1e-4 * float(usual.abs().max())
        return 8 * noise


def own() -> Unknown:
    return Unknown(own_dit.build(), own_dit.arguments(), "blocks.0.self_attention")


def stock() -> Unknown:
    case = next(case for case in CASES if case.model == WAN)
    assert case.grid == GRID
    return Unknown(case.build(), case.arguments(case.draw(2, seed=1)), "blocks.0.attn1")


# a class of the user's own; one of diffusers' that came after the table was written
@pytest.fixture(params=[own, stock], ids=["own class", "stock class"])
def unknown(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Unknown:
    monkeypatch.delitem(MODELS, WAN)
    made: Unknown = request.param()
    return made


def apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


@contextlib.contextmanager
def masked(monkeypatch: pytest.MonkeyPatch, grid: Grid = GRID, calls: Callable[[int], bool] = bool) -> Iterator[None]:
    """Give stock calls over the grid's tokens PATTERN's mask: those that `calls` picks, counted from 1."""
    sdpa, count, mask = F.scaled_dot_product_attention, [0], PATTERN.token_mask(grid)

    def oracle(query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, *args: Any, **kwargs: Any) -> Tensor:
        if query.shape[2] == key.shape[2] == grid.tokens:
            count[0] += 1
            attn_mask = mask if calls(count[0]) else None
        return sdpa(query, key, value, attn_mask, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(F, "scaled_dot_product_attention", oracle)
        yield
    assert count[0] == LAYERS


def test_without_a_grid_the_error_says_what_to_do(unknown: Unknown) -> None:
    before = unknown.processors()
    for switch_on in (enable, processors):
        with pytest.raises(ValueError, match=r"docs/models\.md.*grid=Grid\(frames, height, width") as error:
            switch_on(unknown.model, PATTERN)
        assert type(unknown.model).__name__ in str(error.value)
    assert unknown.processors() == before
    assert find_hook(unknown.model) is None


def test_the_grids_calls_are_stock_with_a_mask(unknown: Unknown, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cross-attention is the stock call, and no reason to complain even under strict."""
    expected, allowed, before = unknown.run(), unknown.tolerance(), unknown.processors()
    with masked(monkeypatch):
        oracle = unknown.run()
    enable(unknown.model, PATTERN, grid=GRID, min_tokens=0, strict=True)
    out = unknown.run()
    assert apart(out, oracle) <= allowed
    assert apart(out, expected) > 30 * allowed
    found = summary(unknown.model)
    assert (found.grid, found.sparse_calls, found.unknown) == (str(GRID), LAYERS, ())
    # modules that say what they are, as diffusers' own do, are not even touched
    marked = any(getattr(one, "is_cross_attention", False) for one in unknown.model.modules())
    assert found.dense_reasons == ({} if marked else {CROSS: LAYERS})
    assert str(GRID) in str(found)
    assert torch.equal(dataclasses.replace(unknown, model=copy.deepcopy(unknown.model)).run(), out)
    disable(unknown.model)
    after = unknown.processors()
    assert all(after[name] is before[name] for name in before)
    assert find_hook(unknown.model) is None
    assert torch.equal(unknown.run(), expected)
    with pytest.raises(ValueError, match="grid="):
        enable(unknown.model, PATTERN)  # what was told once is forgotten


def test_keep_everything_agrees_with_stock(unknown: Unknown) -> None:
    expected, allowed = unknown.run(), unknown.tolerance()
    for pattern in (TopBlocks(keep=1.0), Neighborhood(window=1.0)):
        with sparse(unknown.model, pattern, grid=GRID, min_tokens=0, strict=True):
            assert apart(unknown.run(), expected) <= allowed
            assert summary(unknown.model).sparse_calls == LAYERS


def test_layers_narrow(unknown: Unknown, monkeypatch: pytest.MonkeyPatch) -> None:
    allowed, before = unknown.tolerance(), unknown.processors()
    with masked(monkeypatch, calls=lambda number: number == 1):
        oracle = unknown.run()
    enable(unknown.model, PATTERN, grid=GRID, layers=unknown.one.replace(".", r"\."), min_tokens=0, strict=True)
    assert unknown.ours() == [unknown.one]
    assert all(one is before[name] for name, one in unknown.processors().items() if name != unknown.one)
    assert apart(unknown.run(), oracle) <= allowed
    assert (summary(unknown.model).sparse_calls, summary(unknown.model).dense_calls) == (1, 0)


# a typo; a part of a path, where the whole must match; a module without a processor
@pytest.mark.parametrize("layers", ["bloks.*", "attn", r"blocks\.0"])
def test_layers_that_fit_nothing(unknown: Unknown, layers: str) -> None:
    before = unknown.processors()
    with pytest.raises(ValueError, match="layers must match module paths") as error:
        enable(unknown.model, PATTERN, grid=GRID, layers=layers)
    assert repr(layers) in str(error.value)
    assert unknown.processors() == before


def test_layers_without_a_grid(unknown: Unknown) -> None:
    with pytest.raises(ValueError, match=r"docs/models\.md.*grid="):
        enable(unknown.model, PATTERN, layers=unknown.one)


def test_enabling_again_with_fewer_layers(unknown: Unknown) -> None:
    """The layers that are left out are the stock model's again."""
    expected, before = unknown.run(), unknown.processors()
    enable(unknown.model, PATTERN, grid=GRID, min_tokens=0, strict=True)
    with pytest.warns(UserWarning, match="replaces"):
        enable(unknown.model, PATTERN, layers=unknown.one, min_tokens=0, strict=True)
    unknown.run()
    assert unknown.ours() == [unknown.one]
    disable(unknown.model)
    assert all(one is before[name] for name, one in unknown.processors().items())
    assert torch.equal(unknown.run(), expected)


def test_a_function_may_tell_the_grid(unknown: Unknown) -> None:
    """It sees the arguments of forward by name, and is asked anew for another size."""

    def grid(config: Any, arguments: Mapping[str, Any]) -> Grid:
        latents = arguments.get("hidden_states", arguments.get("latents"))
        patch = getattr(config, "patch_size", (1, 1, 1))
        return Grid(*(size // step for size, step in zip(latents.shape[2:], patch, strict=True)))

    enable(unknown.model, PATTERN, grid=grid, min_tokens=0, strict=True)
    unknown.run()
    assert summary(unknown.model).grid == str(GRID)
    name = next(name for name, value in unknown.arguments.items() if value.dim() == 5)
    unknown.arguments[name] = unknown.arguments[name][:, :, :2]
    unknown.run()
    assert summary(unknown.model).grid == str(Grid(2, *GRID.shape[1:]))
    assert summary(unknown.model).sparse_calls == LAYERS


def failing(config: Any, arguments: Mapping[str, Any]) -> Grid:
    return Grid(*arguments["frames_that_nobody_gives"])


# too large; fits but for text that it counts; a rule that does not understand the arguments
@pytest.mark.parametrize(
    ("grid", "reason"),
    [
        (Grid(3, 8, 13), "288 queries and 288 keys do not match the grid 3x8x13"),
        (Grid(3, 8, 11, prefix=20), "do not match the grid 3x8x11"),
        (failing, "no grid from the arguments of forward: KeyError"),
    ],
)
def test_a_grid_that_does_not_fit_runs_dense(unknown: Unknown, grid: Any, reason: str) -> None:
    expected = unknown.run()
    with sparse(unknown.model, PATTERN, grid=grid, min_tokens=0):
        assert torch.equal(unknown.run(), expected)
        found = summary(unknown.model)
        assert found.sparse_calls == 0
        assert sum(count for text, count in found.dense_reasons.items() if reason in text) >= LAYERS
    with sparse(unknown.model, PATTERN, grid=grid, min_tokens=0, strict=True), pytest.raises(StrictError, match="grid"):
        unknown.run()
    assert torch.equal(unknown.run(), expected)


# fewer keys than the grid has, more, and as many where the module says that it is cross-attention
@pytest.mark.parametrize(("text_tokens", "marked"), [(20, False), (300, False), (GRID.tokens, True)])
def test_cross_attention_is_stock(text_tokens: int, marked: bool) -> None:
    unknown = own()
    unknown.arguments["text"] = torch.randn(own_dit.BATCH, text_tokens, own_dit.WIDTH)
    for block in unknown.model.blocks:
        block.cross_attention.is_cross_attention = marked
    enable(unknown.model, PATTERN, grid=GRID, min_tokens=0, strict=True)
    unknown.run()
    assert summary(unknown.model).sparse_calls == LAYERS
    assert summary(unknown.model).dense_reasons == ({} if marked else {CROSS: LAYERS})


def test_a_mask_of_unknown_meaning_runs_dense() -> None:
    unknown = own()
    unknown.arguments["attention_mask"] = torch.ones(own_dit.BATCH, 1, 1, GRID.tokens, dtype=torch.bool)
    expected = unknown.run()
    enable(unknown.model, PATTERN, grid=GRID, min_tokens=0)
    assert torch.equal(unknown.run(), expected)
    assert summary(unknown.model).dense_reasons == {CROSS: LAYERS, "attention mask": LAYERS}


def test_by_set_attn_processor(unknown: Unknown) -> None:
    with sparse(unknown.model, PATTERN, grid=GRID, min_tokens=0):
        expected = unknown.run()
    dense, before = unknown.run(), dict(unknown.model.attn_processors)
    made = processors(unknown.model, PATTERN, grid=GRID, min_tokens=0, strict=True)
    assert set(made) == set(before)
    assert torch.equal(unknown.run(), dense)
    unknown.model.set_attn_processor(made)
    assert torch.equal(unknown.run(), expected)
    assert summary(unknown.model).sparse_calls == LAYERS
    unknown.model.set_attn_processor(before)
    assert torch.equal(unknown.run(), dense)


def test_a_block_inside_another_plan_puts_its_grid_back(unknown: Unknown) -> None:
    enable(unknown.model, PATTERN, grid=GRID, min_tokens=0, strict=True)
    expected, before = unknown.run(), unknown.processors()
    with sparse(unknown.model, PATTERN, grid=Grid(1, 24, 12), layers=unknown.one, min_tokens=0, strict=True):
        assert not torch.equal(unknown.run(), expected)
        assert summary(unknown.model).grid == "1x24x12"
    assert all(one is before[name] for name, one in unknown.processors().items())
    assert torch.equal(unknown.run(), expected)
    assert summary(unknown.model).sparse_calls == LAYERS


def test_a_given_grid_counts_more_than_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    known, other = stock(), Grid(1, 24, 12)
    allowed = known.tolerance()
    with masked(monkeypatch, other):
        oracle = known.run()
    for layers in (None, r"blocks\.\d+\.attn1"):
        with sparse(known.model, PATTERN, grid=other, layers=layers, min_tokens=0, strict=True):
            assert apart(known.run(), oracle) <= allowed
            assert len(known.ours()) == LAYERS  # the table's layers, where none are given
    with sparse(known.model, PATTERN, layers=r"blocks\.1\.attn1", min_tokens=0, strict=True):
        known.run()
        assert (known.ours(), summary(known.model).grid) == (["blocks.1.attn1"], str(GRID))
    with masked(monkeypatch):
        oracle = known.run()
    with sparse(known.model, PATTERN, min_tokens=0, strict=True):
        assert apart(known.run(), oracle) <= allowed


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_refused_classes_say_why(name: str) -> None:
    model = type(name, (nn.Module,), {})()
    for switch_on in (enable, processors):
        with pytest.raises(ValueError, match="nothing to make sparse") as error:
            switch_on(model, PATTERN)
        assert f"{name}: {REFUSED[name]}" in str(error.value)
