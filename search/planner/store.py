"""A search's folder: settings, finished units, facts. Each file is written whole or not at all, checked when read."""

from __future__ import annotations

import json
import logging
import shutil
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dit_sparse.search.planner.scoring import MEASURED, Scores
from dit_sparse.search.staging import STAGING, check_writable, staged, write_text

logger = logging.getLogger("dit_sparse")
SETTINGS = "search.json"
UNITS = "units"


class Unit(NamedTuple):
    """Name what is captured, kept and resumed as one: a prompt, a step group and one layer of one transformer."""

    prompt: int
    group: int
    transformer: str
    layer: int

    @property
    def file(self) -> str:
        return f"prompt{self.prompt:02d}-group{self.group}-{self.transformer}-layer{self.layer:03d}.safetensors"


class Store:
    """Keep a search on disk. `settings` is all that decides its results; a folder holds one search."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        """Open or begin a search.

        Raises:
            ValueError: the folder cannot be written, or holds a search with other settings, or a damaged one.
        """
        self.folder = folder
        check_writable(folder)
        mine = json.loads(json.dumps(settings))
        path = folder / SETTINGS
        if path.exists():
            theirs = _read_json(path)
            if not isinstance(theirs, dict):
                raise ValueError(f"{path} is damaged: delete the folder {folder} to search anew, or choose another one")
            if theirs != mine:
                differing = sorted(key for key in {*mine, *theirs} if mine.get(key) != theirs.get(key))
                raise ValueError(
                    f"{folder} holds a search that differs in {', '.join(differing)}; repeat that command to resume "
                    "it, or choose another folder"
                )
        else:
            write_text(path, json.dumps(mine, indent=2, ensure_ascii=False) + "\n")
        (folder / UNITS).mkdir(exist_ok=True)
        for left in folder.rglob(f"{STAGING}*"):  # by a process that was killed while it wrote
            shutil.rmtree(left, ignore_errors=True)

    def has(self, unit: Unit) -> bool:
        return (self.folder / UNITS / unit.file).exists()

    def save(self, unit: Unit, scores: Scores) -> None:
        """Write the scores of a unit.

        Raises:
            OSError: the disk is full or gone; what was written before stays.
        """
        tensors = {name: getattr(scores, name).float().cpu().contiguous() for name in MEASURED}
        with staged(self.folder / UNITS) as folder:
            told = {"crc": str(_checksum(tensors, scores.calls)), "calls": str(scores.calls)}
            save_file(tensors, folder / unit.file, told)

    def load(self, unit: Unit) -> Scores | None:
        """Read the scores of a unit, or None where it is not finished.

        A damaged file is set aside under another name, told of, and counts as not finished.
        """
        path = self.folder / UNITS / unit.file
        if not path.exists():
            return None
        try:
            with safe_open(path, "pt") as file:
                tensors = {name: file.get_tensor(name).clone() for name in MEASURED}  # a view would follow the file
                told = file.metadata() or {}
            calls = int(told["calls"])
            why = None if told["crc"] == str(_checksum(tensors, calls)) else "its checksum is wrong"
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            why = str(error)
        if why is None:
            return Scores(**tensors, calls=calls)
        self.set_aside(path, why)
        return None

    def set_aside(self, path: Path, why: str) -> None:
        """Rename a damaged file, and tell of it: what it held is made again."""
        aside = path.with_name(path.name + ".damaged")
        path.replace(aside)
        logger.warning("%s is damaged (%s): set aside as %s, and made again", path, why, aside.name)

    def read(self, name: str) -> Any | None:
        """Read a fact, or None where it was not written; a damaged one is set aside, told of and counts as missing."""
        path = self.folder / f"{name}.json"
        if not path.exists():
            return None
        found = _read_json(path)
        if isinstance(found, dict) and found.get("crc") == _crc_of(found.get("value")):
            return found["value"]
        self.set_aside(path, "it is not what was written")
        return None

    def write(self, name: str, value: Any) -> None:
        """Write a fact as JSON, with a checksum."""
        text = json.dumps({"crc": _crc_of(value), "value": value}, indent=1, ensure_ascii=False)
        write_text(self.folder / f"{name}.json", text + "\n")


def _read_json(path: Path) -> Any | None:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _crc_of(value: Any) -> int:
    return zlib.crc32(json.dumps(value, sort_keys=True).encode())


def _checksum(tensors: Mapping[str, Tensor], calls: int) -> int:
    found = zlib.crc32(str(calls).encode())
    for name in sorted(tensors):
        head = f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}"
        found = zlib.crc32(tensors[name].numpy().tobytes(), zlib.crc32(head.encode(), found))
    return found
