"""Two clips played under one clock with a wipe slider between them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import gradio as gr

from dit_sparse.search.video import VIEW_PIXELS

HERE = Path(__file__).parent


def player(value: Mapping[str, Any] | None = None, elem_id: str = "player") -> gr.HTML:
    """Make the component; it takes what `player_value` returns, or None for no clip yet.

    The template holds nothing of the value: Gradio would run text of a template as JavaScript.
    """
    html, css, js = ((HERE / f"player.{kind}").read_text(encoding="utf-8") for kind in ("html", "css", "js"))
    return gr.HTML(value, html_template=html, css_template=css, js_on_load=js, apply_default_css=False, elem_id=elem_id)


def player_value(report: Mapping[str, Any], folder: Path, name: str) -> dict[str, Any]:
    """Say what to play for one plan; the files must be among the `allowed_paths` of `launch`.

    Raises:
        ValueError: the report has no such plan, or does not tell how many frames its clips have.
        FileNotFoundError: a clip is missing.
    """
    videos = videos_of(report, folder)
    if name not in videos or name == "dense":
        raise ValueError(f"no plan {name!r} in this comparison; it has {', '.join(n for n in videos if n != 'dense')}")
    request = report["request"]
    if request["frames"] is None:
        raise ValueError(f"report.json in {folder} has no request/frames; make it again: {report['command']}")
    return {
        "dense": file_address(videos["dense"]),
        "sparse": file_address(videos[name]),
        "label": f"sparse: {name}",
        "frames": request["frames"],
        # search.video.enlarge repeated the pixels of such clips; the browser should not blur what it enlarges further
        "pixels": request["height"] is not None and 2 * request["height"] <= VIEW_PIXELS,
    }


def videos_of(report: Mapping[str, Any], folder: Path) -> dict[str, Path]:
    """Return each run's clip by run name, dense first.

    Raises:
        FileNotFoundError: a clip is missing.
    """
    names = {"dense": report["dense"]["video"]} | {run["name"]: run["video"] for run in report["sparse"]}
    found = {run: (folder / name).resolve() for run, name in names.items()}
    for path in found.values():
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing; make the folder again: {report['command']}")
    return found


def file_address(path: Path) -> str:
    """Return where the server sends a file from that is among its `allowed_paths`."""
    return f"/gradio_api/file={quote(path.as_posix())}"
