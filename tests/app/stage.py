"""A page with the player and the figures alone, over a stored comparison."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gradio as gr

from dit_sparse.app.figures import figures_html, figures_view
from dit_sparse.app.player import player, player_value, videos_of
from dit_sparse.search.report import load_report

STORED = Path(__file__).resolve().parents[2] / "assets" / "demo"


@contextmanager
def stage(folder: Path = STORED, **changes: Any) -> Iterator[str]:
    """Serve the page on 127.0.0.1 and give its address; `changes` replace fields of the report's request."""
    report = load_report(folder)
    report["request"] |= changes
    names = [run["name"] for run in report["sparse"]]

    def choose(name: str) -> tuple[Any, str]:
        if name == "nothing":
            return None, ""
        return player_value(report, folder, name), figures_html(report, name)

    with gr.Blocks(title="stage", analytics_enabled=False) as page:
        choice = gr.Radio([*names, "nothing"], value=names[0], label="Plan", elem_id="plan")
        clips = player(player_value(report, folder, names[0]))
        told = figures_view(figures_html(report, names[0]))
        choice.change(choose, choice, [clips, told], api_name="choose", queue=False)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    page.launch(
        server_name="127.0.0.1",
        server_port=port,
        prevent_thread_lock=True,
        ssr_mode=False,
        quiet=True,
        theme=gr.themes.Soft(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
        allowed_paths=[str(path) for path in videos_of(report, folder).values()],
        footer_links=[],
    )
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        page.close()
