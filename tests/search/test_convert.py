"""Settings of STA and Radial Attention become plans that do the same, or a clear refusal and no file."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

import dit_sparse as ds
from dit_sparse.cli import build_app
from dit_sparse.search.convert import STA_TILE, from_radial, from_sta

STEPS, LAYERS, HEADS = 3, 2, 2
GRID = ds.Grid(13, 16, 24)  # 3 x 2 x 3 tiles, the last frames a ragged one
TILES = (3, 2, 3)
WANTED = {"dense_layers": 1, "dense_timesteps": 12, "decay_factor": 0.2, "num_inference_steps": 50, "model_type": "wan"}


def dit_sparse(*words: str | Path) -> Result:
    return CliRunner().invoke(build_app(), [str(word) for word in words])


def strategy(seed: int, first_full: bool = True) -> dict[str, list[int]]:
    """Make a mask strategy of random windows, in STA's layout; step 0 is dense as in the published files."""
    draw = random.Random(seed)
    return {
        f"{t}_{la}_{h}": list(TILES) if t == 0 and first_full else [draw.randint(1, most) for most in TILES]
        for t in range(STEPS)
        for la in range(LAYERS)
        for h in range(HEADS)
    }


def published_keep(window: list[int]) -> torch.Tensor:
    """Return STA's rule on GRID by its definition, bool [N, N]: tiles at most k // 2 from the clamped centre."""
    place = torch.stack(torch.meshgrid(*(torch.arange(n) for n in GRID.shape), indexing="ij"), -1).reshape(-1, 3)
    kept = torch.ones(len(place), len(place), dtype=torch.bool)
    for axis, (size, tile, tiles) in enumerate(zip(window, STA_TILE, TILES, strict=True)):
        if size < tiles:
            of_token = place[:, axis] // tile
            centre = of_token.clamp(size // 2, max(size // 2, tiles - 1 - size // 2))
            kept &= (centre[:, None] - of_token[None]).abs() <= size // 2
    return kept


# the grid of the file is told, or read off its dense first step
@pytest.mark.parametrize("grid", [GRID, None])
def test_sta_windows_survive_for_every_step_layer_and_head(tmp_path: Path, grid: ds.Grid | None) -> None:
    index = torch.arange(GRID.tokens)
    for seed in random.sample(range(1000), 3):
        values = strategy(seed)
        folder = from_sta(values, "mask_strategy.json", grid).save(tmp_path / str(seed)).parent
        plan = ds.Plan.load(folder)
        for key, window in values.items():
            step, layer, head = map(int, key.split("_"))
            pattern = plan.patterns_at(step / STEPS, "transformer", layer, HEADS)[head]
            assert isinstance(pattern, ds.Dense) == (tuple(window) == TILES)
            pattern.check(GRID)
            kept = pattern.keep(index[:, None], index[None], GRID)  # type: ignore[attr-defined]
            assert torch.equal(kept, published_keep(window)), (seed, key, window)


def test_sta_rules_are_merged_and_say_where_they_come_from() -> None:
    same = {key: [1, 2, 1] if key[0] != "0" else list(TILES) for key in strategy(0)}
    plan = from_sta(same, "some/mask_strategy_s1.json", GRID, "WanTransformer3DModel")
    window = ds.Neighborhood((1 / 3, 1.0, 1 / 3), (6, 8, 8), clamp="tile", order="tile:2x8x8")
    assert plan.rules == (ds.Rule(ds.Dense(), (0.0, 1 / 3)), ds.Rule(window, (1 / 3, 1.0)))
    plan.check("WanTransformer3DModel", LAYERS, HEADS)
    with pytest.raises(ValueError, match="2 layers x 2 heads"):
        plan.check("WanTransformer3DModel", 40, 40)
    assert plan.provenance["grid"] == "13x16x24"
    assert plan.provenance["steps"] == STEPS
    assert "mask_strategy_s1.json" in plan.provenance["converted_from"]
    assert "assumed" not in plan.provenance
    assert "grid" not in from_sta(same, "x").provenance
    assert "step 0" in from_sta(same, "x").provenance["assumed"]
    odd = same | {"2_1_0": [1, 1, 1]}  # one head of one layer in one step
    where = {(rule.steps, rule.layers, rule.heads) for rule in from_sta(odd, "x").rules}
    assert ((2 / 3, 1.0), (1,), (0,)) in where
    assert len(where) == 5  # dense step; odd head, then and before; other head; other layer


def without(key: str) -> Callable[[dict[str, Any]], Any]:
    return lambda values: {k: v for k, v in values.items() if k != key}


@pytest.mark.parametrize(
    ("change", "words", "message"),
    [
        (lambda values: json.dumps(values)[:-9], [], "is no valid JSON"),  # truncated
        (lambda values: [], [], "step_layer_head"),  # another kind of file
        (lambda values: {}, [], "step_layer_head"),
        (lambda values: values | {"0_1": [1, 1, 1]}, [], "got '0_1'"),
        (lambda values: {"L2_loss": values}, [], "got 'L2_loss'"),  # the search's results, not its choice
        (without("1_1_0"), [], "'1_1_0' is missing: the file names 3 steps x 2 layers x 2 heads"),
        (without("2_1_1"), [], "'2_1_1' is missing"),  # the last head of the last layer
        (lambda values: values | {"1_0_0": [1, 2]}, [], "window of '1_0_0'"),
        (lambda values: values | {"1_0_0": [1, 2, 0]}, [], "window of '1_0_0'"),
        (lambda values: values | {"1_0_0": None}, [], "window of '1_0_0'"),
        (lambda values: values | {"1_0_0": [9, 1, 1]}, [], "larger than all tiles"),
        (lambda values: values | {"0_0_1": [1, 1, 1]}, [], "--grid 30x48x80"),  # nothing tells the full window
        (lambda values: values, ["--grid", "6x8x8"], "larger than all tiles"),
        (lambda values: values, ["--decay-factor", "0.2"], "options of --from radial"),
    ],
)
def test_bad_sta_files_write_nothing(
    tmp_path: Path, change: Callable[[dict[str, Any]], Any], words: list[str], message: str
) -> None:
    changed = change(strategy(7))
    file, out = tmp_path / "mask_strategy.json", tmp_path / "out"
    file.write_text(changed if isinstance(changed, str) else json.dumps(changed))
    result = dit_sparse("plans", "convert", file, "--from", "sta", "--out", out, *words)
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert not out.exists()


def test_convert_writes_a_plan_folder(tmp_path: Path) -> None:
    file, out = tmp_path / "mask_strategy.json", tmp_path / "out"
    file.write_text(json.dumps(strategy(3, first_full=False)))
    result = dit_sparse("plans", "convert", file, "--from", "sta", "--out", out, "--grid", "13x16x24")
    assert result.exit_code == 0, result.output
    assert result.stdout.split() == [str(out / "plan.json"), str(out / "README.md")]
    assert ds.Plan.load(out) == from_sta(strategy(3, first_full=False), str(file), GRID)
    assert "quality gate: unverified" in (out / "README.md").read_text()


# dense steps and layers of the released scripts: Wan2.1 50 steps, lightx2v 4 steps, Hunyuan without dense layers
@pytest.mark.parametrize(
    ("flags", "sink"),
    [
        ({}, True),
        ({"dense_timesteps": 1, "num_inference_steps": 4}, True),
        ({"dense_layers": 0, "decay_factor": 0.95, "model_type": "hunyuan"}, False),
        ({"dense_timesteps": 0}, True),
        ({"dense_timesteps": 60}, True),  # more than there are steps: all dense
    ],
)
def test_radial_flags(flags: dict[str, Any], sink: bool) -> None:
    told = WANTED | flags
    plan = from_radial(told, "options")
    sparse = ds.Radial("block", told["decay_factor"], sink)
    for step in range(told["num_inference_steps"]):
        for layer in range(3):
            dense = step < told["dense_timesteps"] or layer < told["dense_layers"]
            fraction = step / told["num_inference_steps"]
            assert plan.patterns_at(fraction, "transformer", layer, 1) == (ds.Dense() if dense else sparse,)


def test_radial_from_options_and_from_a_file(tmp_path: Path) -> None:
    options = ["--dense-layers", "1", "--dense-timesteps", "12", "--decay-factor", "0.2", "--steps", "50"]
    options += ["--model-type", "wan"]
    result = dit_sparse(
        "plans", "convert", "--from", "radial", "--out", tmp_path / "a", *options, "--model-type", "wan"
    )
    assert result.exit_code == 0, result.output
    file = tmp_path / "flags.json"
    file.write_text(json.dumps(WANTED | {"decay_factor": 0.9, "use_sage_attention": True}))
    words = ["plans", "convert", file, "--from", "radial", "--out", tmp_path / "b", "--decay-factor", "0.2"]
    assert dit_sparse(*words).exit_code == 0  # what the command line says counts more
    assert ds.Plan.load(tmp_path / "a") == ds.Plan.load(tmp_path / "b") == from_radial(WANTED, "x")
    assert "use_sage_attention=True" in ds.Plan.load(tmp_path / "b").provenance["not_carried"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"decay_facto": 0.2}, "did you mean 'decay_factor'?"),
        ({"decay_factor": 0}, "decay_factor: Radial decay"),
        ({"decay_factor": None}, "flag 'decay_factor' is missing"),
        ({"dense_layers": -1}, "dense_layers must be an integer >= 0"),
        ({"num_inference_steps": 0}, "num_inference_steps must be"),
        ({"model_type": "mochi"}, "wan, hunyuan"),
    ],
)
def test_bad_radial_flags_write_nothing(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    file, out = tmp_path / "flags.json", tmp_path / "out"
    file.write_text(json.dumps(WANTED | change))
    result = dit_sparse("plans", "convert", file, "--from", "radial", "--out", out)
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert not out.exists()


def test_other_sources_and_missing_files(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert "sta or radial" in dit_sparse("plans", "convert", "--from", "svg", "--out", out).stderr
    assert "needs the file" in dit_sparse("plans", "convert", "--from", "sta", "--out", out).stderr
    assert "does not exist" in dit_sparse("plans", "convert", tmp_path / "no", "--from", "sta", "--out", out).stderr
    assert "--from sta" in dit_sparse("plans", "convert", "--from", "radial", "--grid", "1x1x1", "--out", out).stderr
    assert not out.exists()
