"""The fourth tab: two clips, which is the dense one?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from dit_sparse.app.blind import SIDES
from dit_sparse.app.player import file_address, videos_of
from dit_sparse.app.site import STATE_SECONDS, Shown, Site
from dit_sparse.app.stored import plan_of
from dit_sparse.search.plans import rule_lines


def blind_tab(site: Site, shown: gr.State) -> None:
    """Lay out the tab and wire it; it asks about the plan that the first tab shows."""
    key = gr.State("", time_to_live=STATE_SECONDS)
    gr.Markdown("Two clips of one prompt and seed. One is dense, the other sparse. Votes are counted in this server.")
    with gr.Row():
        left = gr.HTML("", elem_id="blind-left")
        right = gr.HTML("", elem_id="blind-right")
    with gr.Row():
        ask = gr.Button("Ask me", variant="primary", elem_id="blind-ask")
        votes = [
            gr.Button(f"The {side} one is dense", interactive=False, elem_id=f"blind-vote-{side}") for side in SIDES
        ]
    said = gr.Markdown(elem_id="blind-said")
    everything = [key, left, right, said, *votes]

    def question(which: Shown, last: str) -> tuple[Any, ...]:
        site.blind.forget(last)
        if not which.here:
            return "", "", "", "These clips have been removed: generate new ones.", *_buttons(False)
        videos = videos_of(which.report, which.folder)
        asked = site.blind.ask(videos["dense"], videos[which.name], _about(which))
        return asked.key, _clip(asked.left, "left"), _clip(asked.right, "right"), "Which one is dense?", *_buttons(True)

    def vote(key: str, side: str) -> tuple[Any, ...]:
        try:
            answer = site.blind.vote(key, side)
        except ValueError as error:
            return str(error), *_buttons(False)
        told = "Right" if answer.right else "Wrong"
        return f"{told}: the {answer.dense_side} one is dense. {answer.tally.sentence()}", *_buttons(False)

    ask.click(question, [shown, key], everything, queue=False, api_visibility="private")
    for side, button in zip(SIDES, votes, strict=True):
        button.click(lambda key, side=side: vote(key, side), key, [said, *votes], queue=False, api_visibility="private")


def _clip(path: Path, side: str) -> str:
    """Show a clip from where it lies: a Video would copy it."""
    return (
        f'<video src="{file_address(path)}" autoplay loop muted playsinline controls aria-label="{side} clip" '
        'style="width:100%"></video>'
    )


def _buttons(on: bool) -> list[Any]:
    return [gr.Button(interactive=on) for _ in SIDES]


def _about(which: Shown) -> str:
    """Return what votes count for: what the plan does, whatever its name."""
    return "; ".join(rule_lines(plan_of(which.report, which.name)))
