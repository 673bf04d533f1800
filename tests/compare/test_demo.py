"""The page of a finished comparison, served on 127.0.0.1 and read back over HTTP."""

from __future__ import annotations

import json
import shutil
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from dit_sparse.search.compare import compare
from dit_sparse.search.report import load_report
from dit_sparse.search.request import Request
from tests.compare.test_compare import JOB, Options

gradio_client = pytest.importorskip("gradio_client")


@pytest.fixture(scope="module")
def results(tiny_wan: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("results")
    plans = ("topblocks:keep=0.3", "radial")
    compare(Request(JOB, plans, out, str(tiny_wan), "cpu", options=Options(min_tokens=0)))
    return out


@pytest.fixture(scope="module")
def address(results: Path) -> Iterator[str]:
    from dit_sparse.app.demo import launch

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    page = launch(results, port, block=False)
    yield f"http://127.0.0.1:{port}"
    page.close()


def fetch(address: str) -> str:
    with urllib.request.urlopen(address, timeout=20) as answer:
        return answer.read().decode("utf-8", "replace")


def test_page_shows_the_comparison(address: str, results: Path) -> None:
    assert "dense against sparse" in fetch(address)
    config = fetch(f"{address}/config")
    report = load_report(results)
    assert report["request"]["prompt"] in config
    assert report["environment"]["packages"]["torch"] in config
    for run in report["sparse"]:
        assert run["name"] in config
    components = {part["props"].get("elem_id"): part["props"] for part in json.loads(config)["components"]}
    assert components["dense"]["value"]
    assert components["sparse"]["value"]
    assert components["plan"]["choices"] == [["topblocks-keep-0.3"] * 2, ["radial"] * 2]


def test_choosing_another_plan(address: str, results: Path, tmp_path: Path) -> None:
    client = gradio_client.Client(address, verbose=False, download_files=tmp_path)
    video, headline = client.predict("radial", api_name="/choose")
    path = Path(video["video"] if isinstance(video, dict) else video)
    assert path.read_bytes() == (results / "sparse-radial.mp4").read_bytes()
    assert "radial" in headline
    with pytest.raises(Exception, match="radial"):  # gradio names the choices
        client.predict("../../etc/passwd", api_name="/choose")


def test_other_files_are_not_served(address: str, results: Path) -> None:
    for path in ("/etc/passwd", str(results / "report.json")):
        with pytest.raises(urllib.error.HTTPError) as refused:
            fetch(f"{address}/gradio_api/file={path}")
        assert refused.value.code in (403, 404)


def test_folders_without_a_comparison(results: Path, tmp_path: Path) -> None:
    from dit_sparse.app.demo import build

    with pytest.raises(FileNotFoundError, match="dit-sparse compare"):
        build(tmp_path)
    copy = tmp_path / "copy"
    shutil.copytree(results, copy)
    (copy / "sparse-radial.mp4").unlink()
    with pytest.raises(FileNotFoundError, match=r"sparse-radial\.mp4"):
        build(copy)
    report = json.loads((copy / "report.json").read_text())
    report["dense"]["video"] = "../../secret.mp4"
    (copy / "report.json").write_text(json.dumps(report))
    with pytest.raises(ValueError, match="dense/video"):
        build(copy)
    (copy / "report.json").write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        build(copy)
