"""Plans from visitors: no path and no hub is ever asked, and an upload is read with care."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest

from dit_sparse.app.limits import Limits
from dit_sparse.app.visitor_plans import MOST_RULES, read_upload, visitor_spec
from dit_sparse.patterns import PATTERNS, Cached, Dense, Neighborhood, TopBlocks
from dit_sparse.plan import ModelBinding, Plan, Rule
from dit_sparse.spec import PRESETS

LIMITS = Limits()
BOUND = ModelBinding("WanTransformer3DModel", 6, 6)


def test_texts_that_visitors_may_write() -> None:
    for name, plan in PRESETS.items():
        assert visitor_spec(f" {name} ") is plan
    assert visitor_spec("topblocks:keep=0.3").rules == (Rule(TopBlocks(keep=0.3)),)
    assert visitor_spec("neighborhood:window=5x0.5x0.5").rules == (Rule(Neighborhood(window=(5, 0.5, 0.5))),)
    assert visitor_spec("dense").rules == (Rule(Dense()),)


@pytest.mark.parametrize(
    "text",
    ["../x", "/etc/passwd", "user/repo", "./balanced", "balanced/", "plan.json", "balanced.json", "", "~", "C:\\x",
     "file:///etc/passwd", "https://example.org/plan.json", "bal\0anced", "x" * 201, None, 3, Path("balanced"),
     "topblocks:keep=2", "topblocks:nothing=1", "topblocks:keep", "cached:pattern=../x", "radial/../x"],
)  # fmt: skip
def test_texts_that_are_refused(text: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of all these names exist here, and whoever opens one or asks a network is caught."""
    monkeypatch.chdir(tmp_path)
    Plan.of(TopBlocks(keep=0.5)).save(tmp_path / "balanced")
    Plan.of(TopBlocks(keep=0.5)).save(tmp_path / "user" / "repo")

    def caught(*args: object, **options: object) -> None:
        raise AssertionError(f"somebody asked for {args}")

    monkeypatch.setattr(Plan, "load", caught)
    monkeypatch.setattr("dit_sparse.hub.client", caught)
    monkeypatch.setattr(socket.socket, "connect", caught)
    monkeypatch.setattr("builtins.open", caught)
    with pytest.raises(ValueError, match=r"plan|keep|nothing|name=value|pattern"):
        visitor_spec(text)


def upload(folder: Path, values: object) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / "plan.json"
    path.write_bytes(values if isinstance(values, bytes) else json.dumps(values).encode())
    return path


def refused(path: str | Path, uploads: Path, **options: Any) -> str:
    """Return the message of a refusal, which must not tell where the file is."""
    with pytest.raises(ValueError) as error:  # noqa: PT011  every test looks at the message
        read_upload(path, uploads, options.pop("limits", LIMITS), **options)
    assert str(uploads) not in str(error.value)
    assert str(Path(path).parent) not in str(error.value) or str(Path(path).parent) in (".", "..", "/")
    return str(error.value)


@pytest.mark.parametrize("pattern", [cls for name, cls in PATTERNS.items() if name != "cached"], ids=str)
def test_good_plans(pattern: Any, tmp_path: Path) -> None:
    inner = pattern(keep=0.3) if pattern is TopBlocks else pattern(window=0.3) if pattern is Neighborhood else pattern()
    plan = Plan((Rule(Dense(), (0.0, 0.2), layers=(-1, 0, 1)), Rule(inner, heads=(0, 5))), "mine", BOUND, {"by": "me"})
    found = read_upload(upload(tmp_path, plan.to_dict()), tmp_path, LIMITS, [BOUND])
    assert found == plan
    assert found.provenance == plan.provenance


def test_cached_plans(tmp_path: Path) -> None:
    plan = Plan.of(Cached(TopBlocks(keep=0.2), 3))
    assert read_upload(upload(tmp_path, plan.to_dict()), tmp_path, LIMITS) == plan


GOOD: dict[str, Any] = {"schema": 1, "rules": [{"pattern": {"name": "topblocks", "keep": 0.2}}]}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "no valid JSON"),
        (b'{"schema": 1, "rules": [', "no valid JSON"),
        (b"\xff\xfe{", "not UTF-8"),
        (b"PK\x03\x04", "no valid JSON"),
        (b'{"schema": 1, "schema": 1, "rules": []}', "a field twice"),
        (b'{"schema": 1, "rules": [], "provenance": {"x": NaN}}', "NaN is no number"),
        (b'{"schema": 1, "rules": [], "provenance": {"x": 1e999}}', "too large a number"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"schema": 1, "rules": [], "provenance": ' + b'{"x":' * 30 + b"1" + b"}" * 31, "nested too deeply"),
        (b'{"schema": 1, "rules": [], "provenance": {"x": ' + b"9" * 5000 + b"}}", "no valid JSON"),
        (b"[]", "does not follow the schema of plans at the top"),
        (b'{"schema": 2, "rules": []}', "at schema: 1 was expected"),
        (b'{"schema": 1, "rules": [{"pattern": {"name": "x"}}]}', "at rules/0/pattern/name"),
        (b'{"schema": 1, "rules": [{"pattern": {"name": "topblocks", "kep": 0.2}}]}', "'kep' was unexpected"),
        (b'{"schema": 1, "rules": [{"pattern": {"name": "radial", "kind": 3}}]}', "at rules/0/pattern/kind"),
        (
            b'{"schema": 1, "rules": [{"pattern": {"name": "cached", "pattern": {"name": "radial", "kind": 3}}}]}',
            "at rules/0/pattern/pattern/kind",
        ),
        (b'{"schema": 1, "rules": [], "model": {"class": "X"}}', "at model: "),
        (b'{"schema": 1, "rules": [], "extra": 1}', "extra"),
    ],
)
def test_files_that_are_refused(data: bytes, message: str, tmp_path: Path) -> None:
    found = refused(upload(tmp_path, data), tmp_path)
    assert message in found
    assert len(found) < 400


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": "0-999999999"}, "numbers of at most 4 digits"),
        ({"heads": 99999}, "numbers of at most 4 digits"),
        ({"layers": ", ".join(["0-9999"] * 80)}, "at most 400 characters"),
        ({"layers": "all, 1"}, "layers"),
        ({"steps": [0.5, 0.2]}, "steps must be"),
        ({"transformer": "x" * 1001}, "more than 1,000 characters"),
        ({"pattern": {"name": "topblocks", "keep": 7}}, "keep"),
        ({"pattern": {"name": "topblocks", "keep": 0.2, "order": "../x"}}, "order"),
    ],
)
def test_rules_that_are_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    assert message in refused(upload(tmp_path, {**GOOD, "rules": [{**GOOD["rules"][0], **change}]}), tmp_path)


def test_too_much(tmp_path: Path) -> None:
    path = upload(tmp_path, GOOD)
    exact = Limits(upload_bytes=path.stat().st_size)
    assert read_upload(path, tmp_path, exact).rules
    assert "at most" in refused(path, tmp_path, limits=Limits(upload_bytes=path.stat().st_size - 1))
    many = upload(tmp_path, {**GOOD, "rules": GOOD["rules"] * (MOST_RULES + 1)})
    assert "2,001 rules, at most 2,000" in refused(many, tmp_path)


def test_too_large_is_refused_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def caught(*args: object) -> None:
        raise AssertionError("it was read")

    path = upload(tmp_path, b"x" * (LIMITS.upload_bytes + 1))
    monkeypatch.setattr("dit_sparse.app.visitor_plans._parse", caught)
    assert "262,145 bytes, at most 262,144" in refused(path, tmp_path)


def test_another_model(tmp_path: Path) -> None:
    path = upload(tmp_path, Plan.of(TopBlocks(keep=0.2)).to_dict() | {"model": {"class": "X", "layers": 6, "heads": 6}})
    assert "was made for X" in refused(path, tmp_path, models=[BOUND])
    assert read_upload(path, tmp_path, LIMITS).model is not None
    deep = upload(tmp_path, {**GOOD, "rules": [{**GOOD["rules"][0], "layers": "0, 6"}]})
    assert "layer 6 does not exist" in refused(deep, tmp_path, models=[BOUND])


def test_other_files_than_the_uploaded_one(tmp_path: Path) -> None:
    """Links out of the folder, into it, a link to the folder above, folders, pipes, devices, and what is not there."""
    uploads, outside = tmp_path / "uploads", tmp_path / "secret"
    good, secret = upload(uploads, GOOD), upload(outside, GOOD)
    assert read_upload(good, uploads, LIMITS).rules
    (uploads / "out.json").symlink_to(secret)
    (uploads / "in.json").symlink_to(good)
    (uploads / "up").symlink_to(tmp_path)
    (uploads / "folder").mkdir()
    os.mkfifo(uploads / "pipe.json")
    above = [uploads / ".." / "secret" / "plan.json", uploads / "up" / "secret" / "plan.json", uploads / "out.json"]
    not_uploaded = [*above, secret, tmp_path, "/etc/passwd", "/dev/zero", "plan.json", "\0", f"{good}\0.json"]
    for path in not_uploaded:
        assert "not a file that was uploaded" in refused(path, uploads), path
    for name in ("in.json", "missing.json", "folder", "pipe.json"):
        assert any(word in refused(uploads / name, uploads) for word in ("cannot be read", "is no file")), name
    (tmp_path / "linked").symlink_to(uploads)  # the folder itself may be reached by a link, as /tmp on a Mac
    assert read_upload(tmp_path / "linked" / "plan.json", tmp_path / "linked", LIMITS).rules
