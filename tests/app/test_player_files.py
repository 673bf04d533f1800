"""What the player is given, and what the server hands out for it; no browser."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from pathlib import Path

import gradio_client
import pytest

from dit_sparse.app.player import player_value
from dit_sparse.search.report import load_report
from tests.app.stage import STORED, stage


def test_clips_are_served_and_nothing_else() -> None:
    report = load_report(STORED)
    value = player_value(report, STORED, "balanced")
    with stage() as address:
        with urllib.request.urlopen(address + value["sparse"], timeout=20) as answer:
            assert answer.read() == (STORED / "sparse-balanced.mp4").read_bytes()
        with pytest.raises(urllib.error.HTTPError, match=r"40[34]"):
            urllib.request.urlopen(f"{address}/gradio_api/file={STORED / 'report.json'}", timeout=20)
        client = gradio_client.Client(address, verbose=False)
        told, _ = client.predict("radial-kind-block", api_name="/choose")
        told = told if isinstance(told, dict) else json.loads(told)
        assert told["label"] == "sparse: radial-kind-block"


def test_values_that_cannot_be_shown(tmp_path: Path) -> None:
    report = load_report(STORED)
    for name in ("dense", "../../etc/passwd"):
        with pytest.raises(ValueError, match="balanced, radial-kind-block"):
            player_value(report, STORED, name)
    with pytest.raises(FileNotFoundError, match=r"dense\.mp4 is missing"):
        player_value(report, tmp_path, "balanced")
    report["request"]["frames"] = None
    with pytest.raises(ValueError, match="request/frames"):
        player_value(report, STORED, "balanced")
