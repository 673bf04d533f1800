"""The second tab: which blocks a head reads, which tokens one token reads, and the plan as a map."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import gradio as gr
import imageio.v3 as iio
import numpy as np
from numpy.typing import NDArray

from dit_sparse.app.capture import captured_choice
from dit_sparse.app.choice import Choice, Token, served, static_choice
from dit_sparse.app.events import Done, Failed
from dit_sparse.app.neighbourhood import neighbourhood_image, neighbourhood_text, token_at
from dit_sparse.app.progress import Progress
from dit_sparse.app.recall import recall_chart
from dit_sparse.app.seeing import mask_image, mask_text, plan_map
from dit_sparse.app.site import Shown, Site
from dit_sparse.app.stored import grid_of, job_of, options_of, plan_of

TAB = "pattern"
SHEET_PIXELS = 720
STATIC_TOKENS = 20_000  # above this looking at every pair of tokens takes too long here


def pattern_tab(site: Site, shown: gr.State, tab: gr.Tab) -> None:
    """Lay out the tab and wire it; it is about the plan that the first tab shows when this one is opened."""
    choice, dense = gr.State(None), gr.State(None)  # what a head reads; the dense clip, uint8 [T, h, w, 3]
    gr.Markdown("What the plan of the shown comparison does, layer by layer and head by head.")
    at = gr.Slider(0, 99, 50, step=1, label="Share of the schedule, percent", elem_id="map-at")
    heads_map = gr.HTML(_map(site.first, 50), elem_id="plan-map")
    recall = gr.HTML(recall_chart(site.first.report, site.first.name), elem_id="recall")
    with gr.Row():
        layer = gr.Number(1, label="Layer", precision=0, minimum=0, elem_id="layer", min_width=90)
        head = gr.Number(0, label="Head", precision=0, minimum=0, elem_id="head", min_width=90)
        step = gr.Number(4, label="Step, from 0", precision=0, minimum=0, elem_id="step", min_width=90)
        look = gr.Button("Look", variant="primary", elem_id="look", min_width=90)
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
        found: Choice | str | None = None
        for event in _look(site, site.begin(request, TAB), which, *(int(value or 0) for value in place)):
            if progress.hear(event):
                yield {status: progress.html()}
            found = event.value if isinstance(event, Done) else found
        if isinstance(found, str):
            progress.hear(Failed(f"this head runs dense there: {found}"))
            yield {status: progress.html()}
        elif found is not None:
            count, height, width = found.grid.shape
            middle = (count // 2, height // 2, width // 2)
            clip = iio.imread(which.folder / which.report["dense"]["video"]) if which.here else None
            yield {
                choice: found, dense: clip, mask: mask_image(found), mask_said: mask_text(found),
                **_token(found, clip, middle),
            }  # fmt: skip

    def _token(found: Choice, clip: NDArray[np.uint8] | None, token: Token) -> dict[Any, Any]:
        image = neighbourhood_image(found, token, SHEET_PIXELS, clip)
        return {
            sheet: image, sheet_said: neighbourhood_text(found, token),
            frame: token[0], row: token[1], column: token[2],
        }  # fmt: skip

    def click(found: Choice | None, clip: NDArray[np.uint8] | None, event: gr.SelectData) -> dict[Any, Any]:
        if found is None:
            return {}
        x, y = event.index
        token = token_at(int(x), int(y), found.grid, SHEET_PIXELS)
        return {} if token is None else _token(found, clip, token)

    def typed(found: Choice | None, clip: NDArray[np.uint8] | None, *place: float | None) -> dict[Any, Any]:
        if found is None:
            return {sheet_said: "Look at a head first."}
        at_frame, at_row, at_column = (int(value or 0) for value in place)
        try:
            return _token(found, clip, (at_frame, at_row, at_column))
        except ValueError as error:
            return {sheet_said: str(error)}

    drawn, quiet = [sheet, sheet_said, frame, row, column], {"queue": False, "api_visibility": "private"}
    gr.on(
        [at.release, tab.select], draw_map, [shown, at],
        [heads_map, recall], **quiet,
    )  # fmt: skip
    look.click(
        see, [shown, layer, head, step], [status, choice, dense, mask, mask_said, *drawn],
        concurrency_limit=site.studio.limits.waiting + 2, show_progress="hidden", api_visibility="private",
    )  # fmt: skip
    sheet.select(click, [choice, dense], drawn, **quiet)
    ask.click(typed, [choice, dense, frame, row, column], drawn, **quiet)


def _map(shown: Shown, percent: float) -> str:
    """Draw every transformer's heads."""
    try:
        plan, grid = plan_of(shown.report, shown.name), grid_of(shown.report)
        return "".join(
            plan_map(plan, grid, layers, heads, percent / 100, component)
            for component, (layers, heads) in shown.transformers().items()
        )
    except ValueError as error:
        return f"<p>{error}</p>"


def _look(site: Site, stop: threading.Event, shown: Shown, layer: int, head: int, step: int) -> Iterator[Any]:
    """Yield the events of finding a head's choice; the last one is Done or Failed."""
    try:
        plan, grid, job = plan_of(shown.report, shown.name), grid_of(shown.report), job_of(shown.report)
        component, (layers, heads) = next(iter(shown.transformers().items()))
        steps = job.steps or 1
        if not 0 <= step < steps:
            raise ValueError(f"step {step} does not exist: the run has {steps} steps, 0 to {steps - 1}")
        found = served(plan, layers, heads, step / steps, layer, head, component)
        static = static_choice(found, grid) if grid.tokens <= STATIC_TOKENS else None
    except ValueError as error:
        yield Failed(str(error))
        return
    if static is not None:
        yield Done(static)
        return
    if shown.report["request"]["model"] != site.studio.shown_model:
        yield Failed("what this head reads follows from the content, and its model is not the one that runs here")
        return
    options = options_of(shown.report)
    yield from site.studio.borrow(
        lambda pipe, tell: captured_choice(
            pipe, job, plan, step, layer, head, options=options,
            on_step=lambda done, total: tell.progress("a run up to the step", done, step + 1),
        ),
        stop,
    )  # fmt: skip
