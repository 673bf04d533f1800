"""Plans from visitors: text that names no file, and an uploaded file that is read with care."""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from dit_sparse.app.limits import Limits
from dit_sparse.nearest import did_you_mean
from dit_sparse.patterns import PATTERNS, pattern_from_text
from dit_sparse.plan import ModelBinding, Plan
from dit_sparse.spec import PRESETS

PLAN_SCHEMA = Path(__file__).parent.parent / "search" / "plan.schema.json"
MOST_SPEC_CHARACTERS = 200
MOST_RULES = 2000
MOST_TEXT_CHARACTERS = 1000  # of one string in a plan
MOST_INDEX_CHARACTERS = 400  # of layers or heads; a range is read number by number
MOST_INDEX_DIGITS = 4
MOST_DEPTH = 10  # of objects and lists within each other
WHAT = "the uploaded plan"
# No link is followed, and a named pipe does not hold the server. Windows has neither flag, and no such pipes.
FLAGS = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)


def visitor_spec(text: object) -> Plan:
    """Return the plan that a preset's name, or a pattern with options, means. No file and no hub is ever asked.

    Raises:
        ValueError: anything else.
    """
    if not isinstance(text, str) or len(text) > MOST_SPEC_CHARACTERS:
        raise ValueError(f"a plan is text of at most {MOST_SPEC_CHARACTERS} characters")
    spec = text.strip()
    if spec in PRESETS:
        return PRESETS[spec]
    name = spec.partition(":")[0]
    if name not in PATTERNS:
        raise ValueError(
            f"unknown plan {spec!r}{did_you_mean(name, [*PRESETS, *PATTERNS])}: take a preset ({', '.join(PRESETS)}) "
            f"or a pattern ({', '.join(PATTERNS)}); a plan of your own can be uploaded"
        )
    return Plan.of(pattern_from_text(spec), spec)


def read_upload(path: str | Path, uploads: Path, limits: Limits, models: Sequence[ModelBinding] = ()) -> Plan:
    """Read a plan that a visitor uploaded.

    path: where the server put it; must be a file of `uploads`, the folder of uploaded files. No link is followed.
    models: the transformers that it must fit; none: not asked.

    Raises:
        ValueError: too large, no strict JSON, not of search/plan.schema.json, for another model. No message tells a
            path.
    """
    values = _parse(_read(path, uploads, limits.upload_bytes))
    _check_extent(values)
    _check_schema(values)
    plan = Plan.from_dict(values, WHAT)
    for model in models:
        plan.check(model.transformer_class, model.layers, model.heads, model.config)
    return plan


def _read(path: str | Path, uploads: Path, most_bytes: int) -> bytes:
    """Read the file, which must lie in the folder by its real path, and be a file of no more bytes than these."""
    if "\0" in str(path) or not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(uploads)):
        raise ValueError("this is not a file that was uploaded here; upload a plan.json")
    try:
        handle = os.open(path, FLAGS)
    except OSError:
        raise ValueError(f"{WHAT} cannot be read; upload it again") from None
    try:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"{WHAT} is no file; upload a plan.json")
        if status.st_size > most_bytes:
            raise ValueError(f"{WHAT} has {status.st_size:,} bytes, at most {most_bytes:,} are taken here")
        with os.fdopen(handle, "rb", closefd=False) as file:
            return file.read(most_bytes)
    finally:
        os.close(handle)


def _parse(data: bytes) -> Any:
    """Read strict JSON: UTF-8, finite numbers, no field twice."""
    try:
        return json.loads(
            data.decode("utf-8"), parse_constant=_refuse, parse_float=_finite, object_pairs_hook=_no_field_twice
        )
    except RecursionError:
        raise ValueError(f"{WHAT} is nested too deeply") from None
    except UnicodeDecodeError:
        raise ValueError(f"{WHAT} is not UTF-8 text; upload a plan.json") from None
    except ValueError as error:
        raise ValueError(f"{WHAT} is no valid JSON: {_short(str(error))}") from None


def _refuse(word: str) -> NoReturn:
    raise ValueError(f"{word} is no number of JSON")


def _finite(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise ValueError(f"{text} is too large a number")
    return value


def _no_field_twice(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("an object has a field twice")
    return values


def _check_extent(values: Any) -> None:
    """Refuse what is small as a file and large once it is read: long strings, ranges of layers, deep nesting."""
    for depth, key, value in _walk(values, 1, ""):
        if depth > MOST_DEPTH:
            raise ValueError(f"{WHAT} is nested too deeply: at most {MOST_DEPTH} levels are taken here")
        if key == "rules" and isinstance(value, list) and len(value) > MOST_RULES:
            raise ValueError(f"{WHAT} has {len(value):,} rules, at most {MOST_RULES:,} are taken here")
        if key in ("layers", "heads"):
            text = str(value)
            long_numbers = re.search(r"\d{%d}" % (MOST_INDEX_DIGITS + 1), text)  # noqa: UP031  braces are the regex's
            if len(text) > MOST_INDEX_CHARACTERS or long_numbers:
                raise ValueError(
                    f"{WHAT}: {key} must be at most {MOST_INDEX_CHARACTERS} characters with numbers of at most "
                    f"{MOST_INDEX_DIGITS} digits, got {_short(text)!r}"
                )
        elif isinstance(value, str) and len(value) > MOST_TEXT_CHARACTERS:
            raise ValueError(f"{WHAT}: {key or 'a text'} has more than {MOST_TEXT_CHARACTERS:,} characters")


def _walk(value: Any, depth: int, key: str) -> Iterable[tuple[int, str, Any]]:
    """Yield (depth, name of the field, value) of everything, no deeper than one level too many."""
    yield depth, key, value
    if depth > MOST_DEPTH:
        return
    if isinstance(value, dict):
        for name, item in value.items():
            yield from _walk(item, depth + 1, name)
    elif isinstance(value, list):
        for item in value:
            yield from _walk(item, depth + 1, key)


def _check_schema(values: Any) -> None:
    import jsonschema

    schema = json.loads(PLAN_SCHEMA.read_text(encoding="utf-8"))
    errors = list(jsonschema.Draft202012Validator(schema).iter_errors(values))
    if errors:
        plain = [error for error in errors if error.validator != "oneOf"]  # an unknown name tells more than "none fits"
        error = jsonschema.exceptions.best_match(iter(plain or map(_of_its_name, errors)))
        place = "/".join(map(str, error.absolute_path)) or "the top"
        raise ValueError(f"{WHAT} does not follow the schema of plans at {_short(place)}: {_short(error.message)}")


def _of_its_name(error: Any) -> Any:
    """Return what is wrong with a pattern of this name, where no pattern fits."""
    of_name: dict[int, list[Any]] = {}
    for inner in error.context:
        of_name.setdefault(inner.schema_path[0], []).append(inner)
    named = [inners for inners in of_name.values() if not any("name" in inner.path for inner in inners)]
    if not named:
        return error
    first = min(named[0], key=lambda inner: len(inner.path))
    return _of_its_name(first) if first.context else first


def _short(text: str, most: int = 200) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"
