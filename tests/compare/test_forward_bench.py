"""The benchmark of whole forwards: its check of rows can fail, its patterns are fitted, its inputs are true to size."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner, Result

from dit_sparse import runner
from dit_sparse.cli import build_app
from dit_sparse.grid import Grid
from dit_sparse.kernels.backends import block_attention
from dit_sparse.patterns import Neighborhood, Pattern, PatternState, Radial, StaticPattern, TopBlocks
from dit_sparse.patterns.base import static_selection
from dit_sparse.pipelines.architectures import ARCHITECTURES
from dit_sparse.pipelines.model_table import MODELS
from dit_sparse.search.forward_bench import _shape, fitted
from dit_sparse.search.row_check import check_rows

CPU, META = torch.device("cpu"), torch.device("meta")
# one by tiles and windows, one by frames' distance, one by content
PATTERNS = [Neighborhood(window=0.4), Radial(kind="block"), TopBlocks(keep=0.4)]
# no text; text in front of an odd grid; text behind
GRIDS = [Grid(4, 8, 12), Grid(3, 9, 13, prefix=20), Grid(4, 8, 12, suffix=33)]


@pytest.fixture(autouse=True)
def _fixed_draws() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda pattern: pattern.name)
def test_right_rows_pass(pattern: Pattern, grid: Grid, dtype: torch.dtype) -> None:
    error, allowed = check_rows(pattern, grid, 2, 32, CPU, dtype)
    assert 0 < error <= allowed


def scaled(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """Be a kernel that is five percent off."""
    out, lse = block_attention(*args, **kwargs)
    return out * 1.05, lse


def misaligned(q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """Be a kernel that is one off in the rows of its values."""
    return block_attention(q, k, v.roll(1, 1), *args, **kwargs)


@pytest.mark.parametrize("wrong", [scaled, misaligned])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda pattern: pattern.name)
def test_a_wrong_kernel_is_found(
    pattern: Pattern, dtype: torch.dtype, wrong: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "block_attention", wrong)
    for grid in GRIDS:
        error, allowed = check_rows(pattern, grid, 2, 32, CPU, dtype)
        assert error > allowed


def computed_density(pattern: Pattern, grid: Grid) -> float:
    layout = pattern.token_order().layout(grid, CPU)
    if isinstance(pattern, StaticPattern):
        selection = static_selection(pattern, grid, layout)
    else:
        q, k = (torch.randn(1, grid.tokens, 1, 16) for _ in range(2))
        selection = pattern.select(q, k, grid, PatternState(layout, 0.25))
    return float(selection.visited_pairs) / grid.video_tokens**2


# a fourth of the pairs, as the benchmark asks, which Radial cannot reach on so few tokens; what all three can
@pytest.mark.parametrize("density", [0.25, 0.8])
def test_patterns_are_fitted_to_the_density(density: float) -> None:
    grid = Grid(6, 20, 32)
    found = fitted(grid, density, CPU)
    assert [pattern.name for pattern in found] == ["radial", "neighborhood", "topblocks"]
    least = computed_density(Radial(kind="block", decay=1e-4), grid)
    for pattern in found:
        nearest = max(density, least) if isinstance(pattern, Radial) else density
        assert computed_density(pattern, grid) == pytest.approx(nearest, abs=0.05), pattern


def bench(*words: str) -> Result:
    return CliRunner().invoke(build_app(), ["bench", "forward", *words])


def test_without_a_gpu_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = bench("--out", str(tmp_path / "rows.json"))
    assert result.exit_code == 1, result.output
    assert "GPU" in result.stderr.strip().splitlines()[-1]
    assert "Traceback" not in result.output
    assert result.stdout == ""
    assert not list(tmp_path.iterdir())


def test_an_unknown_architecture_is_a_usage_error(tmp_path: Path) -> None:
    result = bench("-a", "wan2.1-1.3b-480p", "-a", "wan9", "--out", str(tmp_path / "rows.json"))
    assert result.exit_code == 2, result.output
    line = result.stderr.strip().splitlines()[-1]
    assert "'wan9'" in line
    assert "hunyuanvideo-720p" in line
    assert not list(tmp_path.iterdir())


# what the VAE and the patches divide pixels by, along (frames, height, width)
STEPS = {
    "WanTransformer3DModel": (4, 16, 16),
    "HunyuanVideoTransformer3DModel": (4, 16, 16),
    "CogVideoXTransformer3DModel": (4, 16, 16),
    "FluxTransformer2DModel": (1, 16, 16),
}


def grid_of_size(model: str, size: str) -> tuple[int, int, int]:
    """Return the grid of "81 frames of 720x1280" or "2048x2048"."""
    frames = int(found[1]) if (found := re.search(r"(\d+) frames", size)) else 1
    height, width = map(int, re.search(r"(\d+)x(\d+)", size).groups())  # type: ignore[union-attr]
    steps = STEPS[model]
    return (frames - 1) // steps[0] + 1, height // steps[1], width // steps[2]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures_are_what_they_say(name: str) -> None:
    """The published config builds, and the inputs have the tokens of the size that the table names."""
    architecture = ARCHITECTURES[name]
    model: Any = architecture.build(META)
    # position ids are read, so they must have values
    inputs = architecture.inputs(CPU if MODELS[architecture.model].values else META)
    inspect.signature(type(model).forward).bind(model, **inputs)
    grid, heads, head_dim = _shape(model, inputs)
    assert grid.shape == grid_of_size(architecture.model, architecture.size)
    assert heads == model.config.num_attention_heads
    assert head_dim == model.config.attention_head_dim
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    samples = 2 if "two samples" in architecture.size else 1
    assert len(inputs["hidden_states"]) == samples
    with torch.no_grad():
        there = {key: value.to(META) if isinstance(value, Tensor) else value for key, value in inputs.items()}
        out = model(**there, return_dict=False)[0]
    assert out.shape == there["hidden_states"].shape


def test_the_parameters_are_those_of_the_names() -> None:
    """1.3b, 14b, 5b: the names count parameters."""
    for name, architecture in ARCHITECTURES.items():
        if found := re.search(r"-([\d.]+)b", name):
            count = sum(parameter.numel() for parameter in architecture.build(META).parameters())
            assert count / 1e9 == pytest.approx(float(found[1]), rel=0.15), name
