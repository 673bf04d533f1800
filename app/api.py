"""The page for programs: one function that `gradio_client` calls."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import gradio as gr

from dit_sparse.app.events import Failed, Finished
from dit_sparse.app.limits import Ask
from dit_sparse.app.player import file_address
from dit_sparse.app.site import Site


def comparison(site: Site) -> Callable[..., dict[str, Any]]:
    """Return the function behind `/compare`."""

    def compare(
        prompt: str,
        plan: str = "balanced",
        seed: int = 0,
        steps: int | None = None,
        frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
    ) -> dict[str, Any]:
        """Compare a plan with dense; return {"report": report.json, "videos": {run: address on this server}}."""
        ask = Ask(prompt, plan, seed, steps, frames, height, width)
        for event in site.studio.run(ask, threading.Event()):
            if isinstance(event, Failed):
                raise gr.Error(event.message, print_exception=False)
            if isinstance(event, Finished):
                report = event.report
                names = {"dense": report["dense"]["video"]} | {run["name"]: run["video"] for run in report["sparse"]}
                videos = {name: file_address(event.folder / file) for name, file in names.items()}
                return {"report": report, "videos": videos}
        raise gr.Error("the job was stopped", print_exception=False)

    return compare
