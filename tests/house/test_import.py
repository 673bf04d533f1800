"""What an import loads, and whose `kernels` is whose."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("diffusers", "transformers", "triton", "gradio", "numpy.testing", "skimage", "rich", "typer", "accelerate")


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_loads_torch_alone() -> None:
    # torch itself may load triton or numpy: what counts is what dit_sparse adds
    code = (
        "import sys, torch; before = set(sys.modules); import dit_sparse; "
        "print(*sorted({m.split('.')[0] for m in set(sys.modules) - before} - {'dit_sparse'}))"
    )
    added = set(run_python(code).split())
    assert not added & set(HEAVY), added
    assert added <= sys.stdlib_module_names, added


def test_public_names_resolve() -> None:
    out = run_python("import dit_sparse as ds; print(*[n for n in dir(ds) if not n.startswith('_')])")
    names = set(out.split())
    wanted = {"enable", "disable", "sparse", "processors", "attach", "summary", "sparse_attention", "Grid", "Plan"}
    assert wanted <= names, wanted - names
    assert not {"kernels", "pipelines", "search", "app", "assets"} & names, "reserved: they are folders"
    run_python(f"import dit_sparse as ds; [getattr(ds, n) for n in {sorted(wanted)!r}]")


def test_kernels_from_the_root_is_hugging_faces() -> None:
    spec = importlib.util.find_spec("kernels")
    if spec is None or spec.origin is None:
        pytest.skip("Hugging Face's kernels is not installed (it is in the dev extra)")
    origin = Path(run_python("import kernels; print(kernels.__file__)").strip())
    assert "site-packages" in origin.parts, origin
    assert ROOT not in origin.parents or ".venv" in str(origin)


def test_command_starts_without_heavy_imports() -> None:
    code = (
        "import sys; from typer.testing import CliRunner; from dit_sparse.cli import build_app; "
        "r = CliRunner().invoke(build_app(), ['--help']); assert r.exit_code == 0, r.output; "
        "print(*[m for m in ('diffusers', 'transformers', 'gradio', 'skimage') if m in sys.modules])"
    )
    assert run_python(code).split() == []
