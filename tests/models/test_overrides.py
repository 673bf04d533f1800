"""What a user says of a grid counts at once, must fit, and goes when the plan goes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dit_sparse.attention import Layer, dense_attention
from dit_sparse.grid import Grid
from dit_sparse.options import Options
from dit_sparse.order import Layout
from dit_sparse.patterns import Dense, Neighborhood, base
from dit_sparse.pipelines import grids_image
from dit_sparse.pipelines.enable import disable, enable, processors, sparse, summary
from dit_sparse.pipelines.hooks import find_hook
from dit_sparse.plan import Plan
from dit_sparse.schedule import Schedule, StrictError
from tests.models.case import TEXT, Case
from tests.models.cases import CASES

PATTERN = Neighborhood(window=(1, 0.5, 0.4))


def case_of(model: str) -> Case:
    return next(case for case in CASES if case.model == model and not case.form)


def grid_after(model: Any, arguments: dict[str, Any]) -> str:
    with torch.no_grad():
        model(**arguments, return_dict=False)
    return summary(model).grid


def test_a_given_rule_counts_for_ids_that_were_read_before() -> None:
    """Flux' grid is read from `img_ids` once; the same ids must not bring the old answer to another rule."""
    case = case_of("FluxTransformer2DModel")
    model, arguments = case.build(), case.arguments(case.draw(1, seed=1))
    enable(model, PATTERN, min_tokens=0)
    assert grid_after(model, arguments) == f"1x16x18 + {TEXT} text"
    with sparse(model, PATTERN, min_tokens=0, grid=lambda config, given: Grid(1, 18, 16)):
        assert grid_after(model, arguments) == f"1x18x16 + {TEXT} text"
    assert grid_after(model, arguments) == f"1x16x18 + {TEXT} text"
    disable(model)
    enable(model, PATTERN, min_tokens=0)
    assert grid_after(model, arguments) == f"1x16x18 + {TEXT} text"


def test_ids_are_read_once_for_the_same_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU each reading waits for the device: one for a run, and again where the tensor was written to."""
    read: list[int] = []
    grid_of_ids = grids_image.grid_of_ids

    def record(ids: torch.Tensor) -> Grid:
        read.append(len(ids))
        return grid_of_ids(ids)

    monkeypatch.setattr(grids_image, "grid_of_ids", record)
    case = case_of("FluxTransformer2DModel")
    model, arguments = case.build(), case.arguments(case.draw(1, seed=1))
    enable(model, PATTERN, min_tokens=0)
    for _ in range(3):
        assert grid_after(model, arguments) == f"1x16x18 + {TEXT} text"
    assert read == [288]
    rows, columns = torch.meshgrid(torch.arange(18.0), torch.arange(16.0), indexing="ij")
    arguments["img_ids"][:, 1], arguments["img_ids"][:, 2] = rows.flatten(), columns.flatten()
    assert grid_after(model, arguments) == f"1x18x16 + {TEXT} text"


# smaller: the rest of the image is no text; larger: nothing is the grid's
@pytest.mark.parametrize("grid", [Grid(1, 8, 9), Grid(1, 8, 9, prefix=TEXT), Grid(1, 32, 32, prefix=TEXT)])
def test_a_given_grid_must_fit(grid: Grid) -> None:
    case = case_of("FluxTransformer2DModel")
    model, arguments = case.build(), case.arguments(case.draw(1, seed=1))
    with torch.no_grad():
        stock = model(**arguments, return_dict=False)[0]
        enable(model, PATTERN, min_tokens=0, grid=grid)
        assert torch.equal(model(**arguments, return_dict=False)[0], stock)
        assert "do not match the grid" in " ".join(summary(model).dense_reasons)
        disable(model)
        enable(model, PATTERN, min_tokens=0, grid=grid, strict=True)
        with pytest.raises(StrictError, match="do not match the grid"):
            model(**arguments, return_dict=False)


def test_making_processors_does_not_blind_an_enabled_plan() -> None:
    case = case_of("WanTransformer3DModel")
    model = case.build()
    enable(model, PATTERN, min_tokens=0)
    made = processors(model, PATTERN, min_tokens=0, layers=r"blocks\.0\.attn1")
    assert sum("Sparse" in type(processor).__name__ for processor in made.values()) == 2
    hook = find_hook(model)
    assert hook is not None
    assert set(hook.layers) == {"blocks.0.attn1", "blocks.1.attn1"}
    for frames in (3, 2):
        latents = torch.randn(1, 4, frames, 16, 24)
        assert grid_after(model, case.arguments(latents)) == f"{frames}x8x12"
        assert summary(model).sparse_calls == 2


def test_many_text_lengths_share_no_work_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models that drop padding have a grid for each prompt: each one's masks are built once."""
    built: list[Grid] = []
    select = base.rule_selection

    def record(rule: Any, layout: Layout, *rest: Any) -> Any:
        built.append(layout.grid)
        return select(rule, layout, *rest)

    monkeypatch.setattr(base, "rule_selection", record)
    schedule = Schedule(Plan.of(PATTERN), options=Options(min_tokens=0, strict=True))
    layer = Layer("layer", 0, schedule, dense_attention)
    for _ in range(3):
        schedule.start_forward(Grid(2, 8, 9), text="suffix")
        for text_tokens in range(3, 15):
            q = torch.randn(1, 144 + text_tokens, 1, 16)
            schedule.attend(layer, q, q, q)
    assert len(built) == len(set(built)) == 12


def test_numbers_that_decide_a_mask_count_as_much_as_its_tensors() -> None:
    """JoyImage's mask is made of a tensor and of the list of sizes: the same tensor may mean another mask."""
    case = next(case for case in CASES if case.form == "references of two sizes")
    model, arguments = case.build(), case.arguments(case.draw(2, seed=1))
    other = {**arguments, "shape_list": [*arguments["shape_list"][1:], *arguments["shape_list"][:1]]}
    with torch.no_grad():
        stock = [model(**given, return_dict=False)[0] for given in (arguments, other)]
        enable(model, Dense(), min_tokens=0, strict=True)
        for given, expected in zip((arguments, other), stock, strict=True):
            torch.testing.assert_close(model(**given, return_dict=False)[0], expected, atol=1e-4, rtol=1e-4)
