"""Plans: rules, JSON, files, specs and the errors of each."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

import dit_sparse as ds
from dit_sparse.patterns import Dense
from dit_sparse.plan import ModelBinding, format_indices, parse_indices
from dit_sparse.schedule import Schedule

PLAN = ds.Plan(
    (
        ds.Rule(ds.Dense(), steps=(0.0, 0.2)),
        ds.Rule(ds.Radial(), layers=(0, 2), heads=(1,)),
        ds.Rule(ds.Cached(ds.TopBlocks(keep=0.1), 2), transformer="transformer_2"),
        ds.Rule(ds.Neighborhood(window=(3, 0.5, 0.5)), layers=(1, 2, 3)),
    ),
    "mixed",
    ModelBinding("WanTransformer3DModel", 4, 2),
    {"made": "by hand"},
)


def test_first_covering_rule_wins_and_the_rest_is_dense() -> None:
    assert PLAN.patterns_at(0.1, "transformer", 0, 2) == (Dense(), Dense())
    assert PLAN.patterns_at(0.2, "transformer", 0, 2) == (Dense(), ds.Radial())
    assert PLAN.patterns_at(0.2, "transformer", 2, 2) == (ds.Neighborhood((3, 0.5, 0.5)), ds.Radial())
    assert PLAN.patterns_at(0.9, "transformer_2", 1, 1) == (ds.Cached(ds.TopBlocks(keep=0.1), 2),)
    assert PLAN.patterns_at(None, "transformer", 1, 1) == (ds.Neighborhood((3, 0.5, 0.5)),)


def test_json_and_file_round_trip(tmp_path: Path) -> None:
    assert ds.Plan.from_dict(json.loads(json.dumps(PLAN.to_dict()))) == PLAN
    path = PLAN.save(tmp_path / "new" / "folder")
    assert ds.Plan.load(path) == PLAN
    assert ds.Plan.load(path.parent).provenance == {"made": "by hand"}
    assert [item.name for item in path.parent.iterdir()] == ["plan.json"]


@pytest.mark.parametrize(
    ("text", "indices"),
    [("all", None), ("0", (0,)), ("0, 1, 47-49", (0, 1, 47, 48, 49)), ("5-7,6", (5, 6, 7)), ("0, -2, -1", (-2, -1, 0))],
)
def test_index_lists(text: str, indices: tuple[int, ...] | None) -> None:
    assert parse_indices(text) == indices
    assert parse_indices(format_indices(indices)) == indices


@pytest.mark.parametrize("text", ["", "a", "3-1", "1,,2", "-", "--1", "1--2"])
def test_bad_index_lists(text: str) -> None:
    with pytest.raises(ValueError, match="0, 1, 47-49"):
        parse_indices(text)


def broken(**changes: object) -> str:
    return json.dumps(PLAN.to_dict() | changes)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (broken()[:-40], "no valid JSON"),
        ("not json", "no valid JSON"),
        ("", "no valid JSON"),
        ("[]", "JSON object"),
        (broken(schema=2), "schema must be 1"),
        (broken(rule=[]), "unknown field 'rule'"),
        ('{"schema": 1}', "'rules' is missing"),
        (broken(rules=[{"pattern": {"name": "spiral"}}]), "rule 0, pattern: unknown pattern 'spiral'"),
        (broken(rules=[{"pattern": {"name": "topblocks", "kept": 1}}]), "no field 'kept'"),
        (broken(rules=[{"pattern": {"name": "radial"}, "layers": "x"}]), "rule 0, layers"),
        (broken(rules=[{"pattern": {"name": "radial"}, "steps": [0.5, 0.5]}]), "steps"),
        (broken(rules=[{"pattern": {"name": "radial"}, "steps": 3}]), "steps"),
        (broken(model={"class": "X"}), "model: field 'heads' is missing"),
        (broken(model={"class": "X", "layers": "3", "heads": 2}), "layers must be an integer"),
        (broken(model={"class": "X", "layers": 3, "heads": 2, "config": "XYZ"}), "16 hex digits"),
        (broken(rulez=[]), "'rulez'; did you mean 'rules'"),
        (broken(rules=[{"pattern": {"name": "radail"}}]), "rule 0, pattern: .*did you mean 'radial'"),
        (broken(rules=[{"patern": {"name": "radial"}}]), "rule 0: .*did you mean 'pattern'"),
        (broken(rules=[{"pattern": {"name": "topblocks", "scor": "mean"}}]), "rule 0.*did you mean 'score'"),
        (broken(name=3), "name must be a string"),
        (broken(rules=[{"pattern": {"name": "radial"}, "transformer": 2}]), "component name"),
    ],
)
def test_broken_files_name_the_place(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        ds.Plan.load(path)
    assert str(path) in str(error.value)


def test_check_refuses_other_models() -> None:
    PLAN.check("WanTransformer3DModel", 4, 2)
    with pytest.raises(ValueError, match="4 layers x 2 heads; this model is WanTransformer3DModel with 30 x 12"):
        PLAN.check("WanTransformer3DModel", 30, 12)
    unbound = ds.Plan(PLAN.rules)
    with pytest.raises(ValueError, match=r"rule 1: head 1 does not exist; X has 1 heads"):
        unbound.check("X", 4, 1)
    with pytest.raises(ValueError, match=r"rule 3: layer 3 does not exist"):
        unbound.check("X", 3, 2)
    outer = ds.Plan((ds.Rule(ds.Dense(), layers=(-3, 0)),))
    with pytest.raises(ValueError, match=r"rule 0: layer -3 does not exist"):
        outer.check("X", 2, 2)
    assert outer.for_depth(30).rules == (ds.Rule(ds.Dense(), layers=(0, 27)),)


def test_a_config_hash_is_optional(tmp_path: Path) -> None:
    bound = replace(PLAN, model=ModelBinding("WanTransformer3DModel", 4, 2, "0123456789abcdef"))
    assert ds.Plan.load(bound.save(tmp_path)) == bound != PLAN
    assert "config" not in PLAN.to_dict()["model"]
    bound.check("WanTransformer3DModel", 4, 2, "0123456789abcdef")
    bound.check("WanTransformer3DModel", 4, 2)  # a model whose config is not known
    PLAN.check("WanTransformer3DModel", 4, 2, "fedcba9876543210")
    with pytest.raises(ValueError, match="config 0123456789abcdef; this model is config fedcba9876543210"):
        bound.check("WanTransformer3DModel", 4, 2, "fedcba9876543210")


# told once where the grids differ; text tokens do not count
@pytest.mark.parametrize(
    ("made_on", "warnings"), [("2x4x8", 0), ("2x4x8+77", 0), ("17x32x32", 1), (None, 0), ([2, 4, 8], 0)]
)
def test_another_grid_is_told_once(caplog: pytest.LogCaptureFixture, made_on: object, warnings: int) -> None:
    plan = replace(ds.Plan.of(ds.TopBlocks(keep=0.5)), provenance={} if made_on is None else {"grid": made_on})
    schedule = Schedule(plan)
    with caplog.at_level("WARNING", logger="dit_sparse"):
        for _ in range(3):
            schedule.start_forward(ds.Grid(2, 4, 8, suffix=5), text="suffix", run=object())
        schedule.reset()
        schedule.start_forward(ds.Grid(2, 4, 8, suffix=5), text="suffix")
    told = [record.getMessage() for record in caplog.records if record.name == "dit_sparse"]
    assert len(told) == warnings
    assert all("made on the grid 17x32x32 and runs on 2x4x8" in message for message in told)


def test_specs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ds.parse_spec(PLAN) is PLAN
    assert ds.parse_spec(ds.Radial()).rules == (ds.Rule(ds.Radial()),)
    assert ds.parse_spec("topblocks:keep=0.2").rules == (ds.Rule(ds.TopBlocks(keep=0.2)),)
    for name, plan in ds.PRESETS.items():
        assert ds.parse_spec(name) is plan
        assert ds.Plan.from_dict(plan.to_dict()) == plan
    monkeypatch.chdir(tmp_path)
    PLAN.save("balanced")
    assert ds.parse_spec("balanced") == ds.PRESETS["balanced"]
    assert ds.parse_spec("./balanced") == PLAN
    assert ds.parse_spec(Path("balanced")) == PLAN
    with pytest.raises(FileNotFoundError, match="no plan at"):
        ds.parse_spec("missing/plan.json")
    with pytest.raises(ValueError, match="not a preset"):
        ds.parse_spec("ballanced")
    with pytest.raises(ValueError, match="got int"):
        ds.parse_spec(3)  # type: ignore[arg-type]
