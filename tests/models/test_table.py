"""The model table is whole, and its page is true."""

from __future__ import annotations

import importlib
import inspect
import pkgutil

import diffusers
from diffusers import ModelMixin
from diffusers.models import transformers as transformer_files
from packaging.version import Version

from dit_sparse.pipelines.model_table import MODELS, REFUSED
from tests.models.cases import CASES, OUTSIDE, SINCE
from tests.models.document import PAGE, document

HERE = Version(Version(diffusers.__version__).base_version)


def transformer_classes() -> set[str]:
    """Return the names of all models in diffusers' folder of transformers."""
    found = set()
    for file in pkgutil.iter_modules(transformer_files.__path__):
        module = importlib.import_module(f"{transformer_files.__name__}.{file.name}")
        for name, member in inspect.getmembers(module, inspect.isclass):
            if issubclass(member, ModelMixin) and member.__module__ == module.__name__:
                found.add(name)
    return found


def test_every_transformer_of_diffusers_has_its_place() -> None:
    """A class is known, refused with a reason, or none of our business; a new diffusers shows up here."""
    assert not set(MODELS) & set(REFUSED)
    assert transformer_classes() - MODELS.keys() - REFUSED.keys() - OUTSIDE.keys() == set()


def test_every_model_of_the_table_has_a_case() -> None:
    assert {case.model for case in CASES} == set(MODELS)
    assert len({str(case) for case in CASES}) == len(CASES)


def test_classes_that_are_absent_are_newer_than_this_diffusers() -> None:
    """No case may pass by not running: a class that is missing must be known to be newer."""
    absent = {case.model for case in CASES if not case.exists}
    assert absent == {name for name, version in SINCE.items() if Version(version) > HERE}


def test_the_page_is_true() -> None:
    assert PAGE.read_text(encoding="utf-8") == document(), "docs/models.md is old: run `make docs`"
