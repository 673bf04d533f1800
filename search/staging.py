"""A results folder: refused before any work if it cannot be written, filled in one go at the end."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

STAGING = ".dit-sparse-"  # how the names of hidden folders begin


def check_writable(out: Path) -> None:
    """Refuse a results folder that could not be written, by trying, and leave nothing behind.

    Raises:
        ValueError: out, or the folder it would be made in, is a file or refuses new files.
    """
    place = out
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir():
        raise ValueError(f"cannot write to {out}: {place} is a file; choose a folder with --out")
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise ValueError(
            f"cannot write to {out}: {error.strerror or error} in {place}; choose another --out"
        ) from error


@contextmanager
def staged(out: Path) -> Iterator[Path]:
    """Give a hidden folder inside `out`; its files replace those of the same name in `out` when all are written.

    After an error the folder is gone and `out` holds what it held. Files of other names are never touched.
    """
    out.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=STAGING, dir=out))
    try:
        yield folder
        for file in sorted(folder.iterdir()):
            os.replace(file, out / file.name)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write one file in one step, making its folder if needed: it holds its old text or all of the new."""
    with staged(path.parent) as folder:
        (folder / path.name).write_text(text, encoding="utf-8")
