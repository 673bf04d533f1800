"""The page without a browser: what the server sends and what it does not, and the API for programs."""

from __future__ import annotations

import json
import shutil
import urllib.error
from collections.abc import Iterator
from pathlib import Path

import gradio_client
import pytest

from dit_sparse.app.demo import STORED, Server, launch
from tests.app.serving import SMALL, fetch, served


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with served() as found:
        yield found


@pytest.fixture(scope="module")
def client(server: Server, tmp_path_factory: pytest.TempPathFactory) -> gradio_client.Client:
    return gradio_client.Client(server.address, verbose=False, download_files=tmp_path_factory.mktemp("files"))


def test_programs_compare(server: Server, client: gradio_client.Client) -> None:
    found = client.predict("a red circle", plan="topblocks:keep=0.5", seed=3, **SMALL, api_name="/compare")
    report = found["report"]
    assert report["request"]["prompt"] == "a red circle"
    assert report["request"]["seed"] == 3
    assert report["sparse"][0]["spec"] == "topblocks:keep=0.5"
    assert list(found["videos"]) == ["dense", "topblocks-keep-0.5"]
    for path in found["videos"].values():
        assert fetch(server.address.rstrip("/") + path)[4:8] == b"ftyp"


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"prompt": "x" * 5000}, "at most 300"),
        ({"prompt": "a red circle", "plan": "/etc/passwd"}, "unknown plan"),
        ({"prompt": "a red circle", "plan": "user/repo"}, "unknown plan"),
        ({"prompt": "a red circle", "steps": 10**6}, "steps must lie"),
    ],
)
def test_programs_are_told_what_is_wrong(client: gradio_client.Client, values: dict, said: str) -> None:
    with pytest.raises(Exception, match=said):
        client.predict(**values, api_name="/compare")


def test_programs_are_offered_one_function(client: gradio_client.Client) -> None:
    assert list(client.view_api(return_format="dict")["named_endpoints"]) == ["/compare"]


def test_other_files_are_not_served(server: Server) -> None:
    here = Path(__file__)
    for path in ("/etc/passwd", str(here), str(STORED / "report.json"), f"{STORED}/../../pyproject.toml"):
        with pytest.raises(urllib.error.HTTPError) as refused:
            fetch(f"{server.address}gradio_api/file={path}")
        assert refused.value.code in (403, 404)


def test_what_was_written_goes_when_it_ends() -> None:
    with served() as found:
        folders = [found.site.studio.results.folder, found.site.uploads]
        assert all(folder.is_dir() for folder in folders)
    assert not any(folder.exists() for folder in folders)


def test_folders_without_a_comparison(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="dit-sparse compare"):
        launch(tmp_path, block=False)
    copy = tmp_path / "copy"
    shutil.copytree(STORED, copy)
    (copy / "dense.mp4").unlink()
    with pytest.raises(FileNotFoundError, match=r"dense\.mp4"):
        launch(copy, block=False)
    report = json.loads((copy / "report.json").read_text())
    report["dense"]["video"] = "../../secret.mp4"
    (copy / "report.json").write_text(json.dumps(report))
    with pytest.raises(ValueError, match="dense/video"):
        launch(copy, block=False)
    (copy / "report.json").write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        launch(copy, block=False)
