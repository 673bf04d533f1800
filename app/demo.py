"""A page that shows a finished comparison: both clips, the figures, what stayed dense. It needs no GPU."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gradio as gr

from dit_sparse.app.player import videos_of
from dit_sparse.search.report import load_report, to_markdown

STORED = Path(__file__).parent.parent / "assets" / "demo"


def launch(results: Path | None, port: int, *, block: bool = True) -> gr.Blocks:
    """Serve the page on this machine only; with `block` until Ctrl-C.

    Raises:
        FileNotFoundError: there is no report.json in the folder, or a video that it names is missing.
        ValueError: the report does not follow its schema.
        OSError: the port is taken.
    """
    folder = results if results is not None else STORED
    page = build(folder)
    page.launch(
        server_name="127.0.0.1",
        server_port=port,
        prevent_thread_lock=not block,
        ssr_mode=False,
        quiet=not block,
        theme=gr.themes.Soft(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
        allowed_paths=[str(path) for path in videos_of(load_report(folder), folder).values()],
        footer_links=[],
    )
    return page


def build(folder: Path) -> gr.Blocks:
    """Lay out the page for one results folder; raises as `launch`."""
    report = load_report(folder)
    videos = {name: str(path) for name, path in videos_of(report, folder).items()}
    runs = {run["name"]: run for run in report["sparse"]}
    first = next(iter(runs))

    def choose(name: str) -> tuple[str, str]:
        """Return the clip and the headline of one plan."""
        return videos[name], headline(report, runs[name])

    with gr.Blocks(title="dit-sparse: dense against sparse", analytics_enabled=False) as page:
        gr.Markdown("# Dense against sparse")
        gr.Textbox(report["request"]["prompt"], label="Prompt", interactive=False, elem_id="prompt")
        choice = gr.Radio(list(runs), value=first, label="Plan", elem_id="plan", visible=len(runs) > 1)
        top = gr.Markdown(headline(report, runs[first]), elem_id="headline")
        with gr.Row():
            _video(videos["dense"], f"Dense, {report['dense']['seconds']:.1f} s", "dense")
            shown = _video(videos[first], "Sparse", "sparse")
        gr.Markdown(to_markdown(report), elem_id="report")
        choice.change(choose, choice, [shown, top], api_name="choose", queue=False)
    return page


def headline(report: Mapping[str, Any], run: Mapping[str, Any]) -> str:
    """Say in one line what a plan cost and bought."""
    metrics = run["metrics"]
    parts = [f"**{run['name']}**: {report['dense']['seconds']:.1f} s → {run['seconds']:.1f} s ({run['speedup']:.2f}×)"]
    if run["attention_speedup"] is not None:
        parts.append(f"attention {run['attention_speedup']:.2f}×")
    if run["computed_density"] is not None:
        kept = run["computed_density"]
        parts.append(f"keeps {kept['kept']:.0%} of the blocks (skips {kept['skipped']:.0%})")
    parts.append("identical to dense" if metrics["identical"] else f"PSNR {metrics['psnr_db']:.1f} dB")
    return " · ".join(parts)


def _video(path: str, label: str, elem_id: str) -> gr.Video:
    return gr.Video(path, label=label, elem_id=elem_id, autoplay=True, loop=True, interactive=False, buttons=[])
