"""Imports point down only, and the folders stay what packaging needs them to be."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LAYERS = {"kernels": 0, "core": 1, "pipelines": 2, "search": 3, "app": 4}
FOLDERS = ("kernels", "pipelines", "search", "app", "assets")
MAY_REACH_UP = {
    Path("dit_sparse/__init__.py"),
    Path("dit_sparse/cli.py"),
    Path("dit_sparse/cli_bench.py"),
    Path("dit_sparse/cli_options.py"),
    Path("dit_sparse/cli_plans.py"),
    Path("dit_sparse/cli_search.py"),
}
BACKENDS = {"reference", "cpu", "triton_forward", "hopper", "flex", "fa4"}
# beyond the standard library: what each layer may name at all
THIRD_PARTY = {"kernels": {"torch", "triton"}, "core": {"torch", "einops"}}
MAY_ASK_THE_HUB = Path("dit_sparse/hub.py")  # inside a function: importing dit_sparse loads torch alone
ONLY_PIPELINES = {"diffusers", "transformers", "accelerate"}
SHADOWING = {"triton.py", "profile.py", "select.py", "types.py"}
VAGUE = {"utils.py", "common.py", "misc.py", "helpers.py"}


def sources() -> list[Path]:
    """List every Python file of the package by its real place, relative to the repository root."""
    folders = ("dit_sparse", *FOLDERS)
    found = [p for folder in folders for p in (ROOT / folder).rglob("*.py")]
    real = {p.resolve().relative_to(ROOT) for p in found}
    return sorted(p for p in real if "__pycache__" not in p.parts)


def layer_of(file: Path) -> str:
    return "core" if file.parts[0] == "dit_sparse" else file.parts[0]


def module_of(file: Path) -> str:
    parts = file.with_suffix("").parts
    parts = parts if parts[0] == "dit_sparse" else ("dit_sparse", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(file: Path) -> Iterator[tuple[int, str]]:
    """Yield (line, absolute module name) of every import, also those inside functions."""
    package = module_of(file).split(".")
    if file.name != "__init__.py":
        package = package[:-1]
    for node in ast.walk(ast.parse((ROOT / file).read_text(), filename=str(file))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield node.lineno, module
            for alias in node.names:
                yield node.lineno, f"{module}.{alias.name}"


def target_layer(module: str) -> str | None:
    """Name the layer that an absolute module belongs to; None for other people's modules."""
    parts = module.split(".")
    if parts[0] != "dit_sparse":
        return None
    return parts[1] if len(parts) > 1 and parts[1] in FOLDERS else "core"


@pytest.mark.parametrize("file", sources(), ids=str)
def test_imports_point_down(file: Path) -> None:
    layer = layer_of(file)
    wrong = []
    for line, module in imports(file):
        target = target_layer(module)
        if target is None or file in MAY_REACH_UP:
            continue
        if layer == "assets":
            bad = LAYERS.get(target, 0) > LAYERS["pipelines"]
        elif target == "assets":
            bad = True
        else:
            bad = LAYERS[target] > LAYERS[layer]
        # `from dit_sparse import enable` is the public front: only scripts above the core may use it
        if bad:
            wrong.append(f"{file}:{line} imports {module} ({layer} -> {target})")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("file", sources(), ids=str)
def test_folders_are_reached_through_the_package(file: Path) -> None:
    """`import kernels` would be Hugging Face's package, and `import search` nobody's."""
    wrong = [f"{file}:{line} {module}" for line, module in imports(file) if module.split(".")[0] in FOLDERS]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("file", sources(), ids=str)
def test_third_parties(file: Path) -> None:
    layer = layer_of(file)
    names = {(line, module.split(".")[0]) for line, module in imports(file)}
    foreign = {(n, m) for n, m in names if m != "dit_sparse" and m not in sys.stdlib_module_names}
    if layer in THIRD_PARTY and file not in MAY_REACH_UP:
        hub = {"huggingface_hub"} if file == MAY_ASK_THE_HUB else set()
        wrong = {(n, m) for n, m in foreign if m not in THIRD_PARTY[layer] | hub}
        assert not wrong, f"{file} ({layer}) may import {THIRD_PARTY[layer]} only: {wrong}"
    if layer not in ("pipelines", "assets"):
        wrong = {(n, m) for n, m in foreign if m in ONLY_PIPELINES}
        assert not wrong, f"{file} ({layer}): only pipelines/ knows diffusers classes: {wrong}"


def test_no_sideways_imports() -> None:
    wrong = []
    for file in sources():
        siblings = set()
        if file.parts[:2] == ("dit_sparse", "patterns") and file.name not in ("__init__.py", "base.py"):
            siblings = {p.stem for p in (ROOT / "dit_sparse/patterns").glob("*.py")} - {"__init__", "base", file.stem}
            prefix = "dit_sparse.patterns."
        elif file.parts[0] == "kernels" and file.stem in BACKENDS:
            siblings = BACKENDS - {file.stem}
            prefix = "dit_sparse.kernels."
        wrong += [
            f"{file}:{n} imports {m}"
            for n, m in imports(file)
            for s in siblings
            if (m + ".").startswith(f"{prefix}{s}.")
        ]
    assert not wrong, "\n".join(wrong)


def test_layer_walk_sees_a_wrong_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The walk above is only worth its green if it reads relative, nested and aliased imports."""
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    (tmp_path / "kernels").mkdir()
    file = Path("kernels/bad.py")
    (tmp_path / file).write_text(
        "def f():\n    from ..pipelines import enable\n    import dit_sparse.search.report as r\n"
    )
    seen = {target_layer(module) for _, module in imports(file)}
    assert {"pipelines", "search"} <= seen


@pytest.mark.parametrize("folder", FOLDERS)
def test_folders_are_real_and_linked(folder: str) -> None:
    link = ROOT / "dit_sparse" / folder
    assert (ROOT / folder).is_dir()
    assert not (ROOT / folder).is_symlink()
    assert link.is_symlink()
    assert str(link.readlink()) == f"../{folder}"
    assert not (ROOT / folder / "__init__.py").exists(), f"{folder}/__init__.py would shadow an installed {folder}"


@pytest.mark.parametrize("file", sources(), ids=str)
def test_file_names_and_lengths(file: Path) -> None:
    assert file.name not in SHADOWING, f"{file} shadows a module of that name"
    assert file.name not in VAGUE, f"{file}: name what it holds"
    limit = 400 if file.parts[0] == "kernels" else 300
    lines = len((ROOT / file).read_text().splitlines())
    assert lines < limit, f"{file} has {lines} lines, the limit is {limit}"
