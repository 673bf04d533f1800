"""Plans as things to share: schema, differences, plan folders, the hub, and the model that a plan is bound to."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub.errors
import jsonschema
import pytest
import torch
from typer.testing import CliRunner, Result

import dit_sparse as ds
import dit_sparse.hub as hub
from dit_sparse.cli import build_app
from dit_sparse.pipelines.config_hash import config_hash
from dit_sparse.pipelines.targets import find_targets
from dit_sparse.plan import ModelBinding
from dit_sparse.search.hub import pull_plan
from dit_sparse.search.plan_diff import diff_plans
from dit_sparse.search.plan_folder import write_plan_folder
from tests.core.examples import EXAMPLES

ROOT = Path(__file__).resolve().parents[2]
SCHEMA = json.loads((ROOT / "search" / "plan.schema.json").read_text())
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)
WAN = {"num_attention_heads": 2, "attention_head_dim": 32, "in_channels": 4, "out_channels": 4, "text_dim": 16,
       "freq_dim": 32, "ffn_dim": 64, "num_layers": 2, "rope_max_seq_len": 64}  # fmt: skip
PLAN = ds.Plan(
    (
        ds.Rule(ds.Dense(), steps=(0.0, 0.25)),
        ds.Rule(ds.Radial(), layers=(-1, 0), heads=(1,)),
        ds.Rule(ds.TopBlocks(keep=0.3), transformer="transformer_2"),
    ),
    "mine",
    ModelBinding("WanTransformer3DModel", 4, 2, "0123456789abcdef"),
    {"grid": "17x32x32", "steps": 50},
)


def dit_sparse(*words: str | Path) -> Result:
    return CliRunner().invoke(build_app(), [str(word) for word in words])


def wan(**changes: Any) -> torch.nn.Module:
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(**(WAN | changes))  # type: ignore[no-any-return]


# ---- schema


def test_schema_holds_for_every_preset_pattern_and_saved_plan(tmp_path: Path) -> None:
    VALIDATOR.check_schema(SCHEMA)
    patterns = [pattern for some in EXAMPLES.values() for pattern in some]
    plans = [PLAN, ds.Plan.dense(), *ds.PRESETS.values(), *map(ds.Plan.of, patterns)]
    for number, plan in enumerate(plans):
        values = json.loads(plan.save(tmp_path / str(number)).read_text())
        VALIDATOR.validate(values)
        assert ds.Plan.from_dict(values) == plan
    VALIDATOR.validate({"schema": 1, "rules": [{"pattern": {"name": "dense"}, "layers": 3, "heads": "0, -2, 4 - 7"}]})


def test_schema_names_the_patterns_and_fields_of_the_table() -> None:
    assert SCHEMA["$defs"]["pattern"]["properties"]["name"]["enum"] == list(ds.PATTERNS)
    for name, pattern in ds.PATTERNS.items():
        assert set(SCHEMA["$defs"][name]["properties"]) == {"name", *(item.name for item in fields(pattern))}, name
        assert set(EXAMPLES[name][0].to_dict()) <= set(SCHEMA["$defs"][name]["properties"])


def test_schema_and_loader_refuse_the_same_typos() -> None:
    """One wrong letter in any key, or a pattern's name: both refuse, the loader with the name that was meant."""
    patterns = [pattern for some in EXAMPLES.values() for pattern in some]
    draw = random.Random()
    for pattern in patterns:
        good = replace(PLAN, rules=(ds.Rule(pattern, (0.1, 0.9), layers=(1,)),)).to_dict()
        places = [good, good["model"], good["rules"][0], good["rules"][0]["pattern"]]
        for place in places:
            key = draw.choice(sorted(place))
            place[key + "x"] = place.pop(key)
            assert not VALIDATOR.is_valid(good), (key, good)
            with pytest.raises(ValueError, match=r"is missing|did you mean|must be an object|has no fields"):
                ds.Plan.from_dict(good)
            place[key] = place.pop(key + "x")
        VALIDATOR.validate(good)


# ---- the model a plan is bound to


def test_config_hash_tells_networks_apart_and_nothing_else(tmp_path: Path) -> None:
    model = wan()
    told = config_hash(model)
    assert told is not None
    assert len(told) == 16
    assert config_hash(wan()) == told
    assert config_hash(wan(patch_size=[1, 2, 2])) == told  # as a folder's JSON has it, and the default
    model.save_pretrained(tmp_path / "copy")  # type: ignore[operator]
    loaded = type(model).from_pretrained(tmp_path / "copy")  # type: ignore[attr-defined]
    assert dict(loaded.config) != dict(model.config)  # it knows the folder
    assert config_hash(loaded) == told
    model.register_to_config(quantization_config={"bits": 4})  # type: ignore[operator]
    assert config_hash(model) == told
    others = [wan(rope_max_seq_len=128), wan(ffn_dim=128), wan(cross_attn_norm=False)]
    assert len({told, *map(config_hash, others)}) == 4
    assert config_hash(torch.nn.Linear(2, 2)) is None


def test_a_plan_with_a_hash_refuses_another_config(tmp_path: Path) -> None:
    model, other = wan(), wan(rope_max_seq_len=128)
    (target,) = find_targets(model)
    assert target.binding() == ModelBinding("WanTransformer3DModel", 2, 2, config_hash(model))
    bound = ds.Plan.of(ds.TopBlocks(keep=0.3), "bound")
    path = replace(bound, model=target.binding()).save(tmp_path)
    VALIDATOR.validate(json.loads(path.read_text()))
    ds.enable(model, path)
    with pytest.raises(ValueError, match=f"'bound' was made for .* config {config_hash(model)}; this model is config"):
        ds.enable(other, path)
    assert not find_targets(other)[0].enabled
    without = replace(target.binding(), config=None)
    ds.enable(other, replace(bound, model=without))  # a plan without the hash goes by class and size
    with pytest.raises(ValueError, match="2 layers x 2 heads"):
        ds.enable(wan(num_layers=3), path)


# ---- diff


def random_rule(draw: random.Random) -> ds.Rule:
    def some(count: int) -> tuple[int, ...] | None:
        chosen = tuple(sorted(draw.sample(range(-count, count), draw.randint(1, count))))
        return None if draw.random() < 0.3 else chosen

    start, end = sorted(draw.sample([0.0, 0.2, 0.5, 0.7, 1.0], 2))
    pattern = draw.choice([ds.Dense(), ds.Radial(), ds.TopBlocks(keep=0.2), ds.Frames()])
    heads = some(2)
    if heads is not None:
        heads = tuple(sorted({head % 2 for head in heads}))
    return ds.Rule(pattern, (start, end), draw.choice([None, "transformer", "transformer_2"]), some(3), heads)


def test_diff_finds_exactly_the_calls_that_differ() -> None:
    draw = random.Random()
    for _ in range(30):
        a, b = (ds.Plan(tuple(random_rule(draw) for _ in range(draw.randint(0, 4)))) for _ in range(2))
        found = diff_plans(a, b, layers=3, heads=2)
        a_deep, b_deep = a.for_depth(3), b.for_depth(3)
        named = {rule.transformer for rule in (*a.rules, *b.rules)} - {None}
        for fraction in [0.0, 0.1, 0.2, 0.3, 0.5, 0.6, 0.7, 0.99]:
            for component in ("transformer", "transformer_2", "another"):
                for layer in range(3):
                    pairs = [p.patterns_at(fraction, component, layer, 2) for p in (a_deep, b_deep)]
                    for head in range(2):
                        label = None if not named else component if component in named else "others"
                        told = [
                            (change.a, change.b)
                            for change in found.changes or ()
                            if change.steps[0] <= fraction < change.steps[1]
                            and (change.transformer, layer in change.layers, head in change.heads)
                            == (label, True, True)
                        ]
                        real = (pairs[0][head], pairs[1][head])
                        assert told == ([real] if real[0] != real[1] else [])


def test_the_order_of_writing_is_no_difference(tmp_path: Path) -> None:
    rules = [ds.Rule(ds.Radial(), layers=(layer,)) for layer in range(4)]
    a = ds.Plan(tuple(rules), "a", ModelBinding("X", 4, 2))
    b = replace(a, rules=tuple(random.sample(rules, 4)), name="b", provenance={"made": "later"})
    one = replace(a, rules=(ds.Rule(ds.Radial()),))  # one rule for all that the four say
    for name, plan in (("a", a), ("b", b), ("one", one)):
        plan.save(tmp_path / name)
        assert "the same plan" in dit_sparse("plans", "diff", tmp_path / "a", tmp_path / name).stdout
    assert json.loads(dit_sparse("plans", "diff", tmp_path / "a", tmp_path / "one", "--json").stdout)["same"] is True
    overlapping = (ds.Rule(ds.Dense(), layers=(1,)), ds.Rule(ds.Radial()))
    found = diff_plans(replace(a, rules=overlapping), replace(a, rules=overlapping[::-1]))
    assert found.same is False
    assert [(change.layers, change.heads) for change in found.changes or ()] == [((1,), (0, 1))]


def test_diff_on_the_command_line() -> None:
    shown = dit_sparse("plans", "diff", "balanced", "fast", "--layers", "6", "--heads", "2").stdout
    assert "only in A: steps 0%-100%, layers -2, -1, 0: dense" in shown
    assert "steps     layers  heads  A -> B" in shown
    assert f"12%-100%  0, 4-5  0-1    dense -> {ds.PRESETS['fast'].rules[1].pattern}" in shown
    assert "transformer" not in shown
    unknown = dit_sparse("plans", "diff", "balanced", "fast")
    assert unknown.exit_code == 0
    assert "give --layers and --heads" in unknown.stdout
    assert json.loads(dit_sparse("plans", "diff", "balanced", "fast", "--json").stdout)["same"] is None
    assert "the same plan" in dit_sparse("plans", "diff", "balanced", "balanced").stdout
    assert dit_sparse("plans", "diff", "balanced", "fast", "--layers", "0", "--heads", "2").exit_code == 2
    short = dit_sparse("plans", "diff", "balanced", "fast", "--layers", "1", "--heads", "2")
    assert "does not exist; the model compared on has 1 layers" in short.stderr
    assert "did you mean 'balanced'?" in dit_sparse("plans", "diff", "balancd", "fast").stderr


def test_diff_of_plans_for_other_models() -> None:
    a, b = (ds.Plan.of(ds.Radial()), replace(ds.Plan.of(ds.Radial()), model=ModelBinding("X", 3, 2)))
    assert diff_plans(a, b).same is False
    with pytest.raises(ValueError, match="give --layers"):
        diff_plans(b, replace(b, model=ModelBinding("X", 4, 2)))


# ---- plan folder


def test_plan_folder(tmp_path: Path) -> None:
    measured = {
        "base_model": "me/wan: 1",
        "gpu": "H200",
        "prompts": ["a | b", "two\nlines"],
        "seeds": [0, 1],
        "gate": "passed",
        "rows": [{"run": "dense", "seconds": 50.1}, {"run": "a|b", "psnr_db": 30.9}],
    }
    files = write_plan_folder(tmp_path / "new" / "plan", PLAN, measured)
    assert files == (tmp_path / "new" / "plan" / "plan.json", tmp_path / "new" / "plan" / "README.md")
    assert sorted(file.name for file in files[0].parent.iterdir()) == ["README.md", "plan.json"]
    assert ds.Plan.load(files[0]) == PLAN
    import yaml

    text = files[1].read_text()
    front = yaml.safe_load(text.split("---\n")[1])
    assert front["library_name"] == "diffusers"
    assert front["license"] == "apache-2.0"
    assert front["base_model"] == "me/wan: 1"
    assert {"dit-sparse", "radial", "topblocks"} <= set(front["tags"])
    table = [line for line in text.splitlines() if line.startswith("| ")]
    assert table == [
        "| run | seconds | psnr_db |",
        "| --- | --- | --- |",
        "| dense | 50.1 | – |",
        r"| a\|b | – | 30.9 |",
    ]
    for wanted in ("quality gate: passed", "gpu: H200", "seeds: 0; 1", "two lines", "grid: 17x32x32", "config 0123"):
        assert wanted in text, wanted
    block = text.split("```python\n")[1].split("```")[0]
    assert len(block.strip().splitlines()) == 4
    compile(block, "README.md", "exec")


def test_plan_folder_without_measurements_says_so(tmp_path: Path) -> None:
    text = write_plan_folder(tmp_path, ds.PRESETS["balanced"])[1].read_text()
    assert "quality gate: unverified" in text
    assert "nothing was measured" in text
    assert "base_model" not in text


def test_plan_folder_is_whole_or_untouched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_plan_folder(tmp_path, PLAN)
    before = {file.name: file.read_text() for file in tmp_path.iterdir()}
    with pytest.raises(ValueError, match="did you mean 'prompts'"):
        write_plan_folder(tmp_path, ds.PRESETS["fast"], {"prompt": 1})
    with pytest.raises(ValueError, match="rows of measured"):
        write_plan_folder(tmp_path, ds.PRESETS["fast"], {"rows": [3]})

    def full(*args: object, **options: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="disk full"):
        write_plan_folder(tmp_path, ds.PRESETS["fast"])
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == before


# ---- the hub


class FakeHub:
    """Stand in for huggingface_hub: repositories are folders below `root`."""

    errors = huggingface_hub.errors

    def __init__(self, root: Path) -> None:
        self.root, self.asked, self.visible = root, [], {}  # type: ignore[var-annotated]

    def HfApi(self) -> FakeHub:  # noqa: N802  the library's own name
        return self

    def snapshot_download(self, repo_id: str, allow_patterns: list[str]) -> str:
        self.asked.append((repo_id, allow_patterns))
        if not (self.root / repo_id).is_dir():
            raise huggingface_hub.errors.EntryNotFoundError(f"404: {repo_id}")
        return str(self.root / repo_id)

    def create_repo(self, repo_id: str, private: bool, exist_ok: bool, repo_type: str) -> str:
        assert (exist_ok, repo_type) == (True, "model")
        self.visible.setdefault(repo_id, private)
        return f"https://huggingface.co/{repo_id}"

    def repo_info(self, repo_id: str) -> SimpleNamespace:
        return SimpleNamespace(private=self.visible[repo_id])

    def upload_folder(self, repo_id: str, folder_path: Path, allow_patterns: list[str], commit_message: str) -> None:
        for name in allow_patterns:
            (self.root / repo_id).mkdir(parents=True, exist_ok=True)
            (self.root / repo_id / name).write_bytes((folder_path / name).read_bytes())


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    fake = FakeHub(tmp_path / "hub")
    monkeypatch.setattr(hub, "client", lambda: fake)
    monkeypatch.chdir(tmp_path)
    return fake


def test_push_and_pull(fake: FakeHub, tmp_path: Path) -> None:
    write_plan_folder(tmp_path / "plan", PLAN)
    (tmp_path / "plan" / "weights.pt").write_bytes(b"pickle")
    (tmp_path / "plan" / "report.md").write_text("# report")
    result = dit_sparse("plans", "push", tmp_path / "plan", "me/wan-plan", "--private")
    assert result.exit_code == 0, result.output
    assert "https://huggingface.co/me/wan-plan: plan.json, README.md, report.md" in result.stdout
    assert sorted(file.name for file in (fake.root / "me/wan-plan").iterdir()) == [
        "README.md",
        "plan.json",
        "report.md",
    ]
    assert fake.visible == {"me/wan-plan": True}

    result = dit_sparse("plans", "pull", "me/wan-plan")
    assert result.exit_code == 0, result.output
    assert fake.asked[-1] == ("me/wan-plan", ["plan.json", "README.md"])
    assert sorted(file.name for file in (tmp_path / "wan-plan").iterdir()) == ["README.md", "plan.json"]
    assert ds.Plan.load(tmp_path / "wan-plan") == PLAN
    assert ds.parse_spec("me/wan-plan") == PLAN
    assert dit_sparse("plans", "diff", "me/wan-plan", tmp_path / "plan").stdout.strip() == "the same plan"


def test_push_refuses_what_is_no_plan(fake: FakeHub, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "holds no plan.json" in dit_sparse("plans", "push", tmp_path / "empty", "me/x").stderr
    PLAN.save(tmp_path / "broken").write_text("{}")
    assert dit_sparse("plans", "push", tmp_path / "broken", "me/x").exit_code == 2
    PLAN.save(tmp_path / "report")
    (tmp_path / "report" / "report.json").write_text("{}")
    assert dit_sparse("plans", "push", tmp_path / "report", "me/x").exit_code == 2
    PLAN.save(tmp_path / "good")
    assert "user/repo" in dit_sparse("plans", "push", tmp_path / "good", "nobody").stderr
    fake.visible["me/public"] = False
    assert (
        "is public, nothing was sent" in dit_sparse("plans", "push", tmp_path / "good", "me/public", "--private").stderr
    )
    assert not fake.root.exists()


def test_pull_checks_before_it_puts_anything_in_place(fake: FakeHub, tmp_path: Path) -> None:
    out = tmp_path / "out"
    PLAN.save(fake.root / "me" / "broken").write_text('{"schema": 1, "rules": [{"pattern": {"name": "radail"}}]}')
    with pytest.raises(ValueError, match="did you mean 'radial'"):
        pull_plan("me/broken", out)
    (fake.root / "me" / "weights").mkdir()
    with pytest.raises(FileNotFoundError, match=r"holds no plan\.json"):
        pull_plan("me/weights", out)
    with pytest.raises(FileNotFoundError, match="404: me/missing"):
        pull_plan("me/missing", out)
    with pytest.raises(ValueError, match="user/repo"):
        pull_plan("me/../secret", out)
    assert not out.exists()
    PLAN.save(fake.root / "me" / "good")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="is a file"):
        pull_plan("me/good", tmp_path / "file")
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    pull_plan("me/good", out)
    assert sorted(file.name for file in out.iterdir()) == ["notes.txt", "plan.json"]


def test_only_what_cannot_be_a_path_is_asked_of_the_hub(fake: FakeHub, tmp_path: Path) -> None:
    for path in ("missing/plan.json", "./missing", "../missing", "/missing/plan", "a/b/c", "a/", "~/plan"):
        with pytest.raises(FileNotFoundError, match="no plan at"):
            ds.parse_spec(path)
    with pytest.raises(FileNotFoundError, match="no plan at"):
        ds.Plan.load(Path("me/plan"))
    assert not fake.asked
    with pytest.raises(FileNotFoundError, match="no file or folder me/plan here, and no plan at me/plan on the"):
        ds.parse_spec("me/plan")
    assert [repo for repo, _ in fake.asked] == ["me/plan"]
    PLAN.save(tmp_path / "me" / "plan")  # files over the hub
    assert ds.parse_spec("me/plan") == PLAN
    assert len(fake.asked) == 1


def test_offline_nobody_is_asked(tmp_path: Path) -> None:
    PLAN.save(tmp_path / "plan")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT)}
    for words, code in ((["pull", "no/such-plan"], 2), (["push", str(tmp_path / "plan"), "no/such-plan"], 1)):
        done = subprocess.run(
            [sys.executable, "-c", "from dit_sparse.cli import main; main()", "plans", *words],
            cwd=tmp_path, capture_output=True, text=True, timeout=120, env=environment,
        )  # fmt: skip
        assert done.returncode == code, done.stderr
        assert "Traceback" not in done.stderr
        assert "HF_HUB_OFFLINE" in done.stderr
    assert not (tmp_path / "such-plan").exists()
