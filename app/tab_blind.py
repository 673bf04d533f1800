"""The fourth tab: two clips, which is the dense one?"""

from __future__ import annotations

from typing import Any

import gradio as gr

from dit_sparse.app.blind import SIDES
from dit_sparse.app.player import videos_of
from dit_sparse.app.site import Shown, Site
from dit_sparse.app.stored import plan_of
from dit_sparse.search.plans import rule_lines


def blind_tab(site: Site, shown: gr.State) -> None:
    """Lay out the tab and wire it; it asks about the plan that the first tab shows."""
    key = gr.State("")
    gr.Markdown("Two clips of one prompt and seed. One is dense, the other sparse. Votes are counted in this server.")
    with gr.Row():
        left = gr.Video(label="Left", autoplay=True, loop=True, interactive=False, buttons=[], elem_id="blind-left")
        right = gr.Video(label="Right", autoplay=True, loop=True, interactive=False, buttons=[], elem_id="blind-right")
    with gr.Row():
        ask = gr.Button("Ask me", variant="primary", elem_id="blind-ask")
        votes = [
            gr.Button(f"The {side} one is dense", interactive=False, elem_id=f"blind-vote-{side}") for side in SIDES
        ]
    said = gr.Markdown(elem_id="blind-said")
    everything = [key, left, right, said, *votes]

    def question(which: Shown) -> tuple[Any, ...]:
        if not which.here:
            return "", None, None, "These clips have been removed: generate new ones.", *_buttons(False)
        videos = videos_of(which.report, which.folder)
        asked = site.blind.ask(videos["dense"], videos[which.name], _about(which))
        return asked.key, str(asked.left), str(asked.right), "Which one is dense?", *_buttons(True)

    def vote(key: str, side: str, which: Shown) -> tuple[Any, ...]:
        try:
            answer = site.blind.vote(key, side)
        except ValueError as error:
            return str(error), *_buttons(False)
        told = "Right" if answer.right else "Wrong"
        return f"{told}: the {answer.dense_side} one is dense. {site.blind.tally(_about(which)).sentence()}", *_buttons(
            False
        )

    ask.click(question, shown, everything, queue=False, api_visibility="private")
    for side, button in zip(SIDES, votes, strict=True):
        button.click(
            lambda key, which, side=side: vote(key, side, which), [key, shown],
            [said, *votes], queue=False, api_visibility="private",
        )  # fmt: skip


def _buttons(on: bool) -> list[Any]:
    return [gr.Button(interactive=on) for _ in SIDES]


def _about(which: Shown) -> str:
    """Return what votes count for: what the plan does, whatever its name."""
    return "; ".join(rule_lines(plan_of(which.report, which.name)))
