"""The first tab: one prompt dense and with a plan, both clips under one clock, and what it cost and bought."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import gradio as gr

from dit_sparse.app.events import LAST, Event, Failed, Finished, Preview
from dit_sparse.app.figures import figures_view
from dit_sparse.app.line import failure
from dit_sparse.app.player import player
from dit_sparse.app.progress import Progress
from dit_sparse.app.settings import ask_of, chosen_plan, job_controls, plan_controls
from dit_sparse.app.site import STATE_SECONDS, Shown, Site

TAB = "compare"


def compare_tab(site: Site) -> gr.State:
    """Lay out the tab and wire it; return the state of what the visitor looks at, a `Shown`."""
    first, names = site.first, site.first.names
    value, figures, code = first.view()
    shown = gr.State(first, time_to_live=STATE_SECONDS)
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            job = job_controls(site, TAB)
            plan, _ = plan_controls(site)
            with gr.Accordion("More", open=False):
                yardstick = gr.Checkbox(False, label="Also render another seed, as a yardstick", elem_id="yardstick")
                monitor = gr.Checkbox(False, label="Also measure recall of each step", elem_id="monitor")
            with gr.Row():
                go = gr.Button("Generate", variant="primary", elem_id="generate", min_width=90)
                stop = gr.Button("Stop", interactive=False, elem_id="stop", min_width=90)
            status = gr.HTML("", elem_id="status")
            preview = gr.Image(
                label="On the way", visible=False, interactive=False, format="png", buttons=[], elem_id="preview",
                height=200,
            )  # fmt: skip
        with gr.Column(scale=3, min_width=300):
            name = gr.Radio(names, value=first.name, label="Shown plan", visible=len(names) > 1, elem_id="shown-plan")
            clips = player(value)
            told = figures_view(figures)
            with gr.Accordion("Copy the Python for this setting", open=False):
                python = gr.Code(code, language="python", label="Python", interactive=False, elem_id="code")

    def generate(request: gr.Request, *values: Any) -> Iterator[dict[Any, Any]]:
        """Run a comparison; yield what changes on the page."""
        *of_job, kind, spec, uploaded, with_seed, with_recall = values
        progress = Progress()
        try:
            ask = ask_of(tuple(of_job), chosen_plan(kind, spec, uploaded), with_seed, with_recall)
        except ValueError as error:
            progress.hear(Failed(str(error)))
            yield {status: progress.html()}
            return
        yield {status: progress.html(), go: gr.Button(interactive=False), stop: gr.Button(interactive=True)}
        with site.job(request, TAB) as ending:
            for event in site.studio.run(ask, ending):
                if isinstance(event, Preview):
                    yield {preview: gr.Image(event.frame, visible=True, label=f"On the way: {event.run}")}
                elif progress.hear(event):
                    yield {status: progress.html(), **(ended(event, progress) if isinstance(event, LAST) else {})}

    def ended(event: Event, progress: Progress) -> dict[Any, Any]:
        """Return what changes when a job has ended."""
        changed: dict[Any, Any] = {
            go: gr.Button(interactive=True), stop: gr.Button(interactive=False), preview: gr.Image(visible=False),
        }  # fmt: skip
        if not isinstance(event, Finished):
            return changed
        try:
            found = Shown.first_of(event.folder, event.report)
            clip, figure, text = found.view()
        except Exception as error:  # a full disk, results that were removed meanwhile
            progress.hear(failure(error))
            return {**changed, status: progress.html()}
        radio = gr.Radio(found.names, value=found.name, visible=len(found.names) > 1)
        return {**changed, shown: found, name: radio, clips: clip, told: figure, python: text}

    def stop_job(request: gr.Request) -> gr.Button:
        site.stop(request, TAB)
        return gr.Button(interactive=False)

    def choose(which: Shown, chosen: str) -> tuple[Any, ...]:
        other = replace(which, name=chosen)
        return other, *(other.view() if other.here else (None, "<p>These results have been removed.</p>", ""))

    go.click(
        generate,
        [*job.components(), *plan, yardstick, monitor],
        [status, preview, shown, name, clips, told, python, go, stop],
        concurrency_limit=site.studio.limits.waiting + 2,  # the studio has a line of its own, which tells the place
        show_progress="hidden",
        api_visibility="private",
    )
    stop.click(stop_job, outputs=stop, queue=False, api_visibility="private")
    name.input(choose, [shown, name], [shown, clips, told, python], queue=False, api_visibility="private")
    return shown
