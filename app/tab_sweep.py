"""The third tab: one prompt over several plans, as a plot and a table."""

from __future__ import annotations

import html
from collections.abc import Iterator
from typing import Any

import gradio as gr

from dit_sparse.app.events import LAST, Event, Finished
from dit_sparse.app.line import failure
from dit_sparse.app.progress import Progress
from dit_sparse.app.settings import ask_of, job_controls
from dit_sparse.app.site import STATE_SECONDS, Shown, Site
from dit_sparse.app.sweep import ACROSS, HEADINGS, headline, pareto, sweep_rows, write_sweep
from dit_sparse.spec import PRESETS

TAB = "sweep"
REPORT = "sweep.html"
SUGGESTED = "topblocks:keep=0.25\nradial:kind=block"


def sweep_tab(site: Site) -> None:
    """Lay out the tab and wire it; it begins with the comparison that is shown first."""
    shown = gr.State(site.first, time_to_live=STATE_SECONDS)
    most = site.studio.limits.plans
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            job = job_controls(site, TAB)
            presets = gr.CheckboxGroup(list(PRESETS), value=["balanced"], label="Presets", elem_id="sweep-presets")
            specs = gr.Textbox(
                SUGGESTED, label="Patterns, one a line", lines=3, elem_id="sweep-specs",
                info=f"At most {most} plans in all.",
            )  # fmt: skip
            with gr.Row():
                go = gr.Button("Sweep", variant="primary", elem_id="sweep", min_width=90)
                stop = gr.Button("Stop", interactive=False, elem_id="sweep-stop", min_width=90)
            status = gr.HTML("", elem_id="sweep-status")
        with gr.Column(scale=3, min_width=300):
            by = gr.Radio(
                [(what, key) for key, (_, what, _) in ACROSS.items()], value="whole", label="Across", elem_id="sweep-by"
            )
            plot = gr.HTML(pareto(site.first.report, "whole"), elem_id="pareto")
            rows = gr.HTML(_table(site.first, "whole"), elem_id="sweep-table")
            report = gr.DownloadButton("Download the report", visible=False, elem_id="sweep-report")

    def sweep(request: gr.Request, *values: Any) -> Iterator[dict[Any, Any]]:
        *of_job, chosen, text, across = values
        plans = [*chosen, *filter(None, (line.strip() for line in text.splitlines()))]
        progress = Progress()
        yield {status: progress.html(), go: gr.Button(interactive=False), stop: gr.Button(interactive=True)}
        with site.job(request, TAB) as ending:
            for event in site.studio.sweep(ask_of(tuple(of_job), "balanced"), plans, ending):
                if progress.hear(event):
                    yield {
                        status: progress.html(),
                        **(ended(event, across, progress) if isinstance(event, LAST) else {}),
                    }

    def ended(event: Event, across: str, progress: Progress) -> dict[Any, Any]:
        """Return what changes when a sweep has ended."""
        changed: dict[Any, Any] = {go: gr.Button(interactive=True), stop: gr.Button(interactive=False)}
        if not isinstance(event, Finished):
            return changed
        try:
            found = Shown.first_of(event.folder, event.report)
            write_sweep(found.report, found.folder, found.folder / REPORT)
        except Exception as error:  # a full disk, results that were removed meanwhile
            progress.hear(failure(error))
            return {**changed, status: progress.html()}
        return {
            **changed, shown: found, plot: pareto(found.report, across), rows: _table(found, across),
            report: gr.DownloadButton(value=str(found.folder / REPORT), visible=True),
        }  # fmt: skip

    def stop_job(request: gr.Request) -> gr.Button:
        site.stop(request, TAB)
        return gr.Button(interactive=False)

    go.click(
        sweep, [*job.components(), presets, specs, by], [status, shown, plot, rows, report, go, stop],
        concurrency_limit=site.studio.limits.waiting + 2, show_progress="hidden", api_visibility="private",
    )  # fmt: skip
    stop.click(stop_job, outputs=stop, queue=False, api_visibility="private")
    by.input(
        lambda which, across: (pareto(which.report, across), _table(which, across)), [shown, by], [plot, rows],
        queue=False, api_visibility="private",
    )  # fmt: skip


def _table(shown: Shown, by: str) -> str:
    """Write the sweep's rows as a table under a line that sums it up."""
    heads = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in HEADINGS)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>"
        for row in sweep_rows(shown.report, by)
    )
    line = html.escape(headline(shown.report))
    return f'<p>{line}</p><div class="wide"><table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>'
