"""Presets by model: a plan that ships for a model is what its preset means there, and nowhere else."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

import dit_sparse as ds
from dit_sparse.pipelines import presets
from dit_sparse.pipelines.enable import summary
from dit_sparse.pipelines.generate import load_pipeline
from dit_sparse.pipelines.targets import find_schedules, find_targets
from dit_sparse.plan import Plan, Rule
from tests.pipelines.tiny import cogvideox, wan


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Plan:
    """Ship a plan as the preset `balanced` of a tiny model with two layers, and another one for other machines."""
    (target,) = find_targets(wan(layers=2))
    plan = Plan((Rule(ds.TopBlocks(0.3), heads=(0,)),), "balanced for tiny", target.binding())
    other = next(name for name in presets.MACHINES if name != presets.machine())
    plan.save(tmp_path / presets.machine() / "tiny" / "balanced")
    elsewhere = Plan((Rule(ds.Radial("block")),), "balanced elsewhere", target.binding())
    elsewhere.save(tmp_path / other / "tiny" / "balanced")
    monkeypatch.setattr(presets, "FOLDER", tmp_path)
    return plan


def plan_in_place(pipe: Any) -> Plan:
    ((_, schedule),) = find_schedules(pipe)
    return schedule.plan


def test_a_preset_means_the_plan_that_ships_for_the_model(shipped: Plan) -> None:
    pipe = wan(layers=2)
    for spec in ("balanced", ds.PRESETS["balanced"], copy.deepcopy(ds.PRESETS["balanced"])):
        with ds.sparse(pipe, spec):
            assert plan_in_place(pipe) == shipped
            assert summary(pipe).plan == "balanced for tiny"
    with ds.sparse(pipe, "fast"):
        assert plan_in_place(pipe).rules == ds.PRESETS["fast"].for_depth(2).rules
    by_hand = Plan(ds.PRESETS["balanced"].rules, "by hand")
    with ds.sparse(pipe, by_hand):
        assert plan_in_place(pipe).rules == by_hand.for_depth(2).rules


def test_another_model_gets_the_preset_for_any(shipped: Plan) -> None:
    for other in (wan(layers=3), cogvideox(layers=2)):
        with ds.sparse(other, "balanced"):
            assert plan_in_place(other).name == "balanced"
            assert plan_in_place(other) != shipped


def test_what_ships_is_bound_to_a_config_and_named_after_a_preset(tmp_path: Path) -> None:
    assert presets.shipped_plans(tmp_path / "nothing") == {}
    for folder, plan in (("tiny/balanced", Plan.dense()), ("tiny/middling", Plan.dense())):
        root = tmp_path / folder.partition("/")[2]
        plan.save(root / folder)
        with pytest.raises(ValueError, match="named after a preset"):
            presets.shipped_plans(root)


def test_the_plans_of_the_package_are_sound() -> None:
    for machine, priced_on in (("cuda", "NVIDIA"), ("cpu", "cpu")):
        found = presets.shipped_plans(presets.FOLDER / machine)
        assert {preset for preset, _ in found} == set(ds.PRESETS)
        for (preset, model), plan in found.items():
            plan.check(model.transformer_class, model.layers, model.heads, model.config)
            assert plan.rules
            assert plan.name == f"{preset} (searched)"
            assert {"gate", "verdict", "command"} <= set(plan.provenance)
            assert plan.provenance["verdict"] == "met"
            assert plan.provenance["prices"].startswith(priced_on)


@pytest.mark.parametrize("preset", ds.PRESETS)
def test_the_bundled_model_runs_what_was_searched_for_it(preset: str) -> None:
    pipe = load_pipeline("bundled", "cpu", "float32")
    with ds.sparse(pipe, preset):
        assert plan_in_place(pipe) == Plan.load(presets.FOLDER / presets.machine() / "bundled" / preset)
