"""The wheel, the sdist, the wheel of the sdist and an editable install all give a working package."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LEAVE_OUT = (".git", ".venv*", "out", "build", "dist", "*.egg-info", "__pycache__", ".*_cache", ".hypothesis", "docs")
CHECK = "import dit_sparse, dit_sparse.kernels.indices, dit_sparse.search.report as r; print(dit_sparse.__file__)"


def run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run([str(c) for c in command], cwd=cwd, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def build(source: Path, kind: str, out: Path) -> Path:
    run(sys.executable, "-m", "build", "--no-isolation", f"--{kind}", "--outdir", out, source, cwd=source)
    return next(out.glob("*.whl" if kind == "wheel" else "*.tar.gz"))


def empty_venv(folder: Path) -> Path:
    """Make an environment that borrows the dependencies of the running one, but not dit_sparse."""
    venv.create(folder, with_pip=False, symlinks=True)
    site = next(folder.glob("lib/python*/site-packages"))
    theirs = [p for p in sys.path if p.endswith("site-packages")]
    # appended after the environment's own folder: what is installed here comes first
    (site / "borrowed.pth").write_text("\n".join(theirs))
    return folder / "bin" / "python"


def names(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


@pytest.mark.skipif(importlib.util.find_spec("build") is None, reason="needs the dev extra (build)")
@pytest.mark.skipif(os.name == "nt", reason="the folders are links")
def test_every_way_to_install(tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(ROOT, source, symlinks=True, ignore=shutil.ignore_patterns(*LEAVE_OUT))
    wheel = build(source, "wheel", tmp_path / "wheel")
    sdist = build(source, "sdist", tmp_path / "sdist")
    with tarfile.open(sdist) as archive:
        # the first patch releases of 3.10 and 3.11 know no filters
        archive.extractall(tmp_path / "unpacked", **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    again = build(next((tmp_path / "unpacked").iterdir()), "wheel", tmp_path / "again")

    inside = names(wheel)
    top = {name.split("/")[0] for name in inside}
    assert top == {"dit_sparse", "dit_sparse-0.1.0.dist-info"}, top
    assert sorted(inside) == sorted(names(again)), "the sdist loses files"
    expected = {
        f"dit_sparse/{p.relative_to(ROOT)}"
        for f in ("kernels", "pipelines", "search", "app")
        for p in (ROOT / f).rglob("*.py")
    }
    expected |= {f"dit_sparse/{p.relative_to(ROOT)}" for p in (ROOT / "assets").rglob("*.safetensors")}
    expected |= {f"dit_sparse/{p.relative_to(ROOT)}" for p in (ROOT / "assets" / "plans").rglob("*.*")}
    expected |= {f"dit_sparse/app/{p.name}" for p in (ROOT / "app").iterdir() if p.suffix in (".html", ".css", ".js")}
    expected |= {
        "dit_sparse/py.typed",
        "dit_sparse/search/plan.schema.json",
        "dit_sparse/search/report.schema.json",
        "dit_sparse/app/sweep.html",
        "dit_sparse/search/planner/report.html",
        "dit_sparse/search/planner/report.schema.json",
        "dit_sparse/search/planner/shipped_prices.json",
        "dit_sparse-0.1.0.dist-info/licenses/LICENSE",
    }
    assert expected <= set(inside), expected - set(inside)

    ways = {"wheel": [str(wheel)], "sdist": [str(sdist)], "folder": [str(source)], "editable": ["-e", str(source)]}
    for way, what in ways.items():
        home = tmp_path / f"env-{way}"
        python = empty_venv(home)
        flags = "-q --no-deps --no-index --no-build-isolation --force-reinstall"
        run(sys.executable, "-m", "pip", "--python", python, "install", *flags.split(), *what, cwd=tmp_path)
        origin = Path(run(python, "-c", CHECK, cwd=tmp_path).strip())
        assert origin.is_relative_to(source if way == "editable" else home), (way, origin)
        assert "Usage" in run(home / "bin" / "dit-sparse", "--help", cwd=tmp_path)
