"""The second tab: which blocks a head reads, which tokens one token reads, and the plan as a map."""

from __future__ import annotations

import functools
import html
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
import imageio.v3 as iio
import numpy as np
from numpy.typing import NDArray

from dit_sparse.app.capture import captured_choice
from dit_sparse.app.choice import Choice, Token, served, static_choice
from dit_sparse.app.events import Done, Failed
from dit_sparse.app.line import Tell
from dit_sparse.app.neighbourhood import neighbourhood_image, neighbourhood_text, token_at
from dit_sparse.app.progress import Progress
from dit_sparse.app.recall import recall_chart
from dit_sparse.app.seeing import mask_image, mask_text, plan_map
from dit_sparse.app.site import STATE_SECONDS, Shown, Site
from dit_sparse.app.stored import grid_of, job_of, options_of, plan_of

TAB = "pattern"
CLIPS_KEPT, CLIP_PIXELS = 8, 128  # behind the tokens; their longer side
SHEET_PIXELS = 720
UP_TO = "a run up to the step"
STATIC_TOKENS = 20_000  # above this looking at every pair of tokens takes too long here


def pattern_tab(site: Site, shown: gr.State, tab: gr.Tab) -> None:
    """Lay out the tab and wire it; it is about the plan that the first tab shows when this one is opened."""
    choice = gr.State(None, time_to_live=STATE_SECONDS)  # what a head reads
    gr.Markdown("What the plan of the shown comparison does, layer by layer and head by head.")
    at = gr.Slider(0, 99, 50, step=1, label="Share of the schedule, percent", elem_id="map-at")
    heads_map = gr.HTML(_map(site.first, 50), elem_id="plan-map")
    recall = gr.HTML(recall_chart(site.first.report, site.first.name), elem_id="recall")
    with gr.Row():
        layer = gr.Number(1, label="Layer", precision=0, minimum=0, elem_id="layer", min_width=90)
        head = gr.Number(0, label="Head", precision=0, minimum=0, elem_id="head", min_width=90)
        step = gr.Number(4, label="Step, from 0", precision=0, minimum=0, elem_id="step", min_width=90)
        look = gr.Button("Look", variant="primary", elem_id="look", min_width=90)
        end = gr.Button("Stop", elem_id="look-stop", min_width=90)
    status = gr.HTML("", elem_id="look-status")
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            gr.Markdown("### Blocks of this head")
            mask = gr.Image(
                label="Blocks of this head", show_label=False, format="png", interactive=False, buttons=[],
                elem_id="mask", alt_text="blocks of this head",
            )  # fmt: skip
            mask_said = gr.Markdown(elem_id="mask-said")
        with gr.Column(scale=3, min_width=300):
            gr.Markdown("### What a token reads: click one")
            sheet = gr.Image(
                label="What a token reads", show_label=False, format="png", interactive=False, buttons=[],
                elem_id="sheet", alt_text="tokens that the chosen one reads, frame by frame",
            )  # fmt: skip
            with gr.Row():
                frame = gr.Number(0, label="Frame", precision=0, elem_id="frame", min_width=80)
                row = gr.Number(0, label="Row", precision=0, elem_id="row", min_width=80)
                column = gr.Number(0, label="Column", precision=0, elem_id="column", min_width=80)
                ask = gr.Button("Show token", elem_id="show-token", min_width=80)
            sheet_said = gr.Markdown(elem_id="sheet-said")

    def draw_map(which: Shown, percent: float) -> tuple[str, str]:
        return _map(which, percent), recall_chart(which.report, which.name)

    def see(request: gr.Request, which: Shown, *place: float) -> Iterator[dict[Any, Any]]:
        """Find what the head reads: at once where its pattern tells it, else in a run up to the step."""
        progress = Progress()
        yield {status: progress.html()}
        found: Choice | str | None = None
        with site.job(request, TAB) as ending:
            for event in _look(site, ending, which, *(int(value or 0) for value in place)):
                if progress.hear(event):
                    yield {status: progress.html()}
                found = event.value if isinstance(event, Done) else found
        if isinstance(found, str):
            progress.hear(Failed(f"this head runs dense there: {found}"))
            yield {status: progress.html()}
        elif found is not None:
            frames, height, width = found.grid.shape
            middle = (frames // 2, height // 2, width // 2)
            yield {
                choice: found, mask: mask_image(found), mask_said: mask_text(found), **_token(found, which, middle),
            }  # fmt: skip

    def stop_look(request: gr.Request) -> None:
        site.stop(request, TAB)

    def _token(found: Choice, which: Shown, token: Token) -> dict[Any, Any]:
        clip = _frames(which.folder / which.report["dense"]["video"], found.grid.frames) if which.here else None
        image = neighbourhood_image(found, token, SHEET_PIXELS, clip)
        return {
            sheet: image, sheet_said: neighbourhood_text(found, token),
            frame: token[0], row: token[1], column: token[2],
        }  # fmt: skip

    def click(found: Choice | None, which: Shown, event: gr.SelectData) -> dict[Any, Any]:
        if found is None:
            return {}
        x, y = event.index
        token = token_at(int(x), int(y), found.grid, SHEET_PIXELS)
        return {} if token is None else _token(found, which, token)

    def typed(found: Choice | None, which: Shown, *place: float | None) -> dict[Any, Any]:
        if found is None:
            return {sheet_said: "Look at a head first."}
        at_frame, at_row, at_column = (int(value or 0) for value in place)
        try:
            return _token(found, which, (at_frame, at_row, at_column))
        except ValueError as error:
            return {sheet_said: str(error)}

    drawn, quiet = [sheet, sheet_said, frame, row, column], {"queue": False, "api_visibility": "private"}
    gr.on(
        [at.release, tab.select], draw_map, [shown, at],
        [heads_map, recall], **quiet,
    )  # fmt: skip
    look.click(
        see, [shown, layer, head, step], [status, choice, mask, mask_said, *drawn],
        concurrency_limit=site.studio.limits.waiting + 2, show_progress="hidden", api_visibility="private",
    )  # fmt: skip
    end.click(stop_look, queue=False, api_visibility="private")
    sheet.select(click, [choice, shown], drawn, **quiet)
    ask.click(typed, [choice, shown, frame, row, column], drawn, **quiet)


@functools.lru_cache(maxsize=CLIPS_KEPT)
def _frames(path: Path, count: int) -> NDArray[np.uint8]:
    """Read so many frames of a clip, evenly apart and small, [count, h, w, 3]."""
    clip = iio.imread(path)
    chosen = clip[np.linspace(0, len(clip) - 1, count).round().astype(int)]
    side = max(1, max(chosen.shape[1:3]) // CLIP_PIXELS)
    return np.ascontiguousarray(chosen[:, ::side, ::side])


def _map(shown: Shown, percent: float) -> str:
    """Draw every transformer's heads."""
    try:
        plan, grid = plan_of(shown.report, shown.name), grid_of(shown.report)
        return "".join(
            plan_map(plan, grid, layers, heads, percent / 100, component)
            for component, (layers, heads) in shown.transformers().items()
        )
    except ValueError as error:
        return f"<p>{html.escape(str(error))}</p>"


def _look(site: Site, stop: threading.Event, shown: Shown, layer: int, head: int, step: int) -> Iterator[Any]:
    """Yield the events of finding a head's choice; the last one is Done or Failed."""
    try:
        plan, grid, job = plan_of(shown.report, shown.name), grid_of(shown.report), job_of(shown.report)
        component, (layers, heads) = next(iter(shown.transformers().items()))
        steps = job.steps or 1
        if not 0 <= step < steps:
            raise ValueError(f"step {step} does not exist: the run has {steps} steps, 0 to {steps - 1}")
        found = served(plan, layers, heads, step / steps, layer, head, component)
        options, device = options_of(shown.report), shown.report["request"]["device"].partition(":")[0]
        reason = options.dense_reason(layer, layers, grid.tokens, device, step, steps)
        static = static_choice(found, grid) if grid.tokens <= STATIC_TOKENS else None
    except ValueError as error:
        yield Failed(str(error))
        return
    if reason is not None or static is not None:
        yield Done(reason or static)
        return
    if shown.report["request"]["model"] != site.studio.shown_model:
        yield Failed("what this head reads follows from the content, and its model is not the one that runs here")
        return

    def record(pipe: Any, tell: Tell) -> Choice | str | None:
        tell.progress(UP_TO, 0, step + 1)
        return captured_choice(
            pipe, job, plan, step, layer, head, options=options, transformer=component,
            on_step=lambda done, total: tell.progress(UP_TO, done, step + 1),
        )  # fmt: skip

    yield from site.studio.borrow(record, stop)
