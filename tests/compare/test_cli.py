"""The command line: what users mistype is refused with one clear line, and nothing is written."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from dit_sparse.cli import COMMANDS, build_app
from dit_sparse.patterns import Neighborhood, TopBlocks
from dit_sparse.plan import ModelBinding, Plan, Rule
from tests.compare.tiny import save_model_without_known_layers

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["--steps", "2", "--frames", "9", "--height", "64", "--width", "96", "--min-tokens", "0", "--device", "cpu"]


def dit_sparse(*words: str | Path) -> Result:
    return CliRunner().invoke(build_app(), [str(word) for word in words])


def refused(result: Result, code: int = 2) -> str:
    """Return the one line on stderr of a refused command."""
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    lines = result.stderr.strip().splitlines()
    return lines[-1]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "results"


def compare(model: Path, out: Path, *words: str | Path, prompt: str = "a red ball") -> Result:
    return dit_sparse("compare", "--model", model, "--prompt", prompt, "--out", out, *SMALL, *words)


# what is wrong with a plan -> what the message must name
@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("topblox", "unknown plan 'topblox'"),  # a typo; the message lists what is known
        ("topblocks:kep=0.2", "has no field 'kep'"),
        ("topblocks:keep=7", "keep"),
        ("neighborhood:window=99", "at most 5"),  # larger than the axis: the grid has 5 frames
        ("missing/plan.json", "no plan at missing/plan.json"),
    ],
)
def test_bad_specs(tiny_wan: Path, out: Path, spec: str, message: str) -> None:
    assert message in refused(compare(tiny_wan, out, "--plan", "radial", "--plan", spec))
    assert not out.exists()


def valid_plan() -> dict[str, object]:
    return Plan((Rule(TopBlocks(keep=0.3)),)).to_dict()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (json.dumps(valid_plan())[:-20], "no valid JSON"),  # truncated, as by a full disk
        ("\x89PNG\n", "no valid JSON"),  # another kind of file
        ("[]", "JSON object"),  # JSON, but no plan
        (json.dumps({**valid_plan(), "rulez": []}), "unknown field 'rulez'"),  # edited by hand
        (json.dumps({**valid_plan(), "schema": 99}), "schema must be"),  # of a later version
        (json.dumps({**valid_plan(), "rules": [{"pattern": {"name": "circles"}}]}), "unknown pattern 'circles'"),
        (json.dumps({**valid_plan(), "rules": [{"pattern": {"name": "topblocks"}, "heads": "0, 9"}]}), "has 2 heads"),
    ],
)
def test_bad_plan_files(tiny_wan: Path, tmp_path: Path, out: Path, text: str, message: str) -> None:
    path = tmp_path / "plan.json"
    path.write_text(text)
    assert message in refused(compare(tiny_wan, out, "--plan", path))
    assert not out.exists()
    assert path.read_text() == text


def test_plan_of_another_model(tiny_wan: Path, tmp_path: Path, out: Path) -> None:
    plan = Plan((Rule(Neighborhood()),), "wan-1.3b", ModelBinding("WanTransformer3DModel", 30, 12))
    plan.save(tmp_path / "plan")
    message = refused(compare(tiny_wan, out, "--plan", tmp_path / "plan"))
    assert "30 layers x 12 heads" in message
    assert "2 x 2" in message
    assert not out.exists()


def test_model_without_known_layers(tmp_path: Path, out: Path) -> None:
    model = save_model_without_known_layers(tmp_path / "unet")
    # DDPM takes no prompt either: the size options are left out so that the layers are what is refused
    result = dit_sparse("compare", "--model", model, "--prompt", "x", "--out", out, "--device", "cpu")
    message = refused(result)
    assert "UNet2DModel" in message
    assert "without known layers" in message
    assert not out.exists()


def test_prompts(tiny_wan: Path, tmp_path: Path, out: Path) -> None:
    words = ["compare", "--model", tiny_wan, "--out", out, *SMALL]
    assert "does not exist" in refused(dit_sparse(*words, "--prompt-file", tmp_path / "no.txt"))
    (tmp_path / "empty.txt").write_text(" \n")
    assert "prompt is empty" in refused(dit_sparse(*words, "--prompt-file", tmp_path / "empty.txt"))
    assert dit_sparse(*words).exit_code == 2
    assert dit_sparse(*words, "--prompt", "x", "--prompt-file", tmp_path / "empty.txt").exit_code == 2
    assert not out.exists()


def test_out_that_cannot_be_written(tiny_wan: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    assert "is a file" in refused(compare(tiny_wan, tmp_path / "file"))
    assert "is a file" in refused(compare(tiny_wan, tmp_path / "file" / "below"))
    assert (tmp_path / "file").read_text() == "mine"
    if Path("/proc/self").exists():  # refuses new files, to root as well
        assert "cannot write to /proc/self/fdinfo" in refused(compare(tiny_wan, Path("/proc/self/fdinfo/x")))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--steps", "0"], "steps must be at least 1"),
        (["--device", "tpu9"], "device must be"),
        (["--device", "cuda:7"], "CUDA devices"),
        (["--dtype", "float8"], "dtype must be one of"),
        (["--backend", "cutlass"], "backend must be one of"),
        (["--dense-steps", "many"], "--dense-steps must be"),
        (["--dense-layers", "a-b"], "dense_layers"),
        (["--height", "4", "--width", "4"], "smaller than one patch"),
    ],
)
def test_bad_options(tiny_wan: Path, out: Path, words: list[str], message: str) -> None:
    assert message in refused(compare(tiny_wan, out, *words))
    assert not out.exists()


def test_model_that_is_not_there(tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "folder").mkdir()
    assert "model_index.json" in refused(compare(tmp_path / "folder", out))
    done = subprocess.run(
        [sys.executable, "-c", "from dit_sparse.cli import main; main()", "compare", "--model", "no/such-model",
         "--prompt", "x", "--out", str(out)],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
        env={"PATH": "", "HF_HUB_OFFLINE": "1", "HOME": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert "no/such-model" in done.stderr
    assert not out.exists()


def test_compare_speaks_on_the_right_streams(tiny_wan: Path, out: Path) -> None:
    result = compare(tiny_wan, out, "--plan", "topblocks:keep=0.3", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["sparse"][0]["name"] == "topblocks-keep-0.3"
    assert "timing attention" in result.stderr
    result = compare(tiny_wan, out, "--plan", "topblocks:keep=0.3", "--quiet")
    assert str(out / "side_by_side.mp4") in result.stdout
    assert "timing attention" not in result.stderr
    assert "\x1b[" not in result.stdout


def test_bench_model(tiny_wan: Path, tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    result = dit_sparse("bench", "model", "--model", tiny_wan, "--plan", "radial", *SMALL[:8], "--out", path)
    assert result.exit_code == 0, result.output
    assert json.loads(path.read_text())["sparse"][0]["name"] == "radial"
    assert [file.name for file in tmp_path.iterdir()] == ["bench.json"]


def test_env_and_doctor() -> None:
    found = json.loads(dit_sparse("env", "--json").stdout)
    assert found["packages"]["torch"]
    assert found["backends"]["cpu"] == "runs on cpu"
    assert "- backends:" in dit_sparse("env").stdout
    result = dit_sparse("doctor", "--json")
    verdicts = {finding["backend"]: finding["verdict"] for finding in json.loads(result.stdout)}
    assert verdicts["cpu"] == verdicts["reference"] == "ok"
    assert result.exit_code == 0


def test_doctor_notices_a_wrong_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    import dit_sparse.search.doctor as doctor
    from dit_sparse.kernels.backends import block_attention

    def off_by_a_bit(*args: object, backend: str, **options: object) -> object:
        out, lse = block_attention(*args, backend=backend, **options)
        return (out, lse) if backend == "reference" else (out * 1.01, lse)

    monkeypatch.setattr(doctor, "block_attention", off_by_a_bit)
    result = dit_sparse("doctor")
    assert result.exit_code == 1
    assert "WRONG" in result.stdout


def test_inspect(tiny_wan: Path) -> None:
    words = ["inspect", "--model", tiny_wan, "--frames", "9", "--height", "64", "--width", "96"]
    assert "480 tokens" in dit_sparse(*words).stdout
    assert json.loads(dit_sparse(*words, "--json").stdout)["grid"]["frames"] == 5


def test_plans(tmp_path: Path) -> None:
    assert "topblocks: keep=" in dit_sparse("plans", "list").stdout
    shown = dit_sparse("plans", "show", "neighborhood:window=0.3", "--grid", "4x8x8", "--png", tmp_path / "mask.png")
    assert "keep" in shown.stdout
    assert [file.name for file in tmp_path.iterdir()] == ["mask.png"]
    assert (tmp_path / "mask.png").read_bytes().startswith(b"\x89PNG")
    assert "5x5" in refused(dit_sparse("plans", "show", "radial", "--grid", "5x5"))
    assert "or with text" in refused(dit_sparse("plans", "show", "radial", "--grid", "5x5x5+"))


def test_every_command_has_help() -> None:
    for name, command in COMMANDS.items():
        assert command.__doc__, name
        result = dit_sparse(*name.split(), "--help")
        assert result.exit_code == 0
    assert dit_sparse("no-such-command").exit_code == 2
