"""The page: its tabs, its line of waiting jobs, and what programs may call."""

from __future__ import annotations

import datetime

import gradio as gr

from dit_sparse.app.api import comparison
from dit_sparse.app.figures import environment_line
from dit_sparse.app.settings import plain
from dit_sparse.app.site import Site
from dit_sparse.app.tab_blind import blind_tab
from dit_sparse.app.tab_compare import compare_tab
from dit_sparse.app.tab_pattern import pattern_tab
from dit_sparse.app.tab_sweep import sweep_tab
from dit_sparse.pipelines.generate import default_dtype
from dit_sparse.search.environment import environment

TITLE = "dit-sparse: dense against sparse"
CLEAN_SECONDS = 3600
QUEUE_SECONDS = 4


def build(site: Site) -> gr.Blocks:
    """Lay out the whole page."""
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(CLEAN_SECONDS, CLEAN_SECONDS)) as page:
        gr.Markdown(
            "# Dense against sparse\n"
            f"The model {plain(site.studio.shown_model)}, with its own attention and with a sparse plan: "
            "the same prompt, the same seed, one clock."
        )
        waiting = gr.Markdown(site.queue_text(), elem_id="queue")
        with gr.Tabs():
            with gr.Tab("Compare", id="compare", elem_id="tab-compare"):
                shown = compare_tab(site)
            with gr.Tab("See the pattern", id="pattern", elem_id="tab-pattern") as tab:
                pattern_tab(site, shown, tab)
            with gr.Tab("Sweep", id="sweep", elem_id="tab-sweep"):
                sweep_tab(site)
            with gr.Tab("Blind test", id="blind", elem_id="tab-blind"):
                blind_tab(site, shown)
        gr.Markdown(plain(_environment(site)), elem_id="environment")
        gr.Timer(QUEUE_SECONDS).tick(
            site.queue_text, outputs=waiting, queue=False, show_progress="hidden", api_visibility="private"
        )
        page.unload(site.leave)
        gr.api(
            comparison(site), api_name="compare", concurrency_limit=site.studio.limits.waiting + 2,
        )  # fmt: skip
    return page


def _environment(site: Site) -> str:
    """Say where this server runs."""
    studio = site.studio
    request = {"device": studio.device, "dtype": studio.dtype or default_dtype(studio.device)}
    now = datetime.datetime.now(datetime.timezone.utc).isoformat()
    return "This server: " + environment_line({"environment": environment(), "request": request, "created": now})
