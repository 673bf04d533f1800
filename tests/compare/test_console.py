"""The console: results on stdout are nobody else's."""

from __future__ import annotations

import os

import pytest

from dit_sparse.search.console import library_prints_on_stderr


def test_what_compiled_libraries_print_goes_to_stderr(capfd: pytest.CaptureFixture[str]) -> None:
    with library_prints_on_stderr():
        os.write(1, b"from a library\n")
    os.write(1, b"a result\n")
    found = capfd.readouterr()
    assert found.out == "a result\n"
    assert found.err == "from a library\n"
