"""The controls by which a visitor says what to generate: prompt, seed, size, and the plan."""

from __future__ import annotations

import logging
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

import gradio as gr

from dit_sparse.app.limits import Ask
from dit_sparse.app.site import STATE_SECONDS, Site
from dit_sparse.patterns import PATTERNS
from dit_sparse.plan import Plan
from dit_sparse.spec import PRESETS

logger = logging.getLogger("dit_sparse")
PATTERN, UPLOADED = "a pattern", "my plan file"
FIRST_PATTERN = "topblocks"
BY_HAND = ("dense", "skip", "cached")  # patterns without controls: typed as text


@dataclass(frozen=True)
class Job:
    """Hold the components that say what to generate."""

    prompt: gr.Textbox
    seed: gr.Number
    steps: gr.Number
    frames: gr.Number
    height: gr.Number
    width: gr.Number

    def components(self) -> list[Any]:
        return [self.prompt, self.seed, self.steps, self.frames, self.height, self.width]


def job_controls(site: Site, where: str) -> Job:
    """Lay out prompt, seed and size; they begin as the comparison that is shown first, where the model is its own.

    where: the tab's name, which begins the ids of the components.
    """
    request, limits = site.first.report["request"], site.studio.limits
    same = request["model"] == site.studio.shown_model
    usual = {name: request[name] if same else None for name in ("steps", "frames", "height", "width")}
    prompt = gr.Textbox(
        request["prompt"] if same else "", label="Prompt", lines=2, elem_id=f"{where}-prompt",
        info=f"At most {limits.prompt_characters} characters.",
    )  # fmt: skip
    with gr.Row():
        seed = _number("Seed", request["seed"] if same else 0, f"{where}-seed")
        steps = _number("Steps", usual["steps"], f"{where}-steps", limits.steps)
    with gr.Row():
        frames = _number("Frames", usual["frames"], f"{where}-frames", limits.frames)
        height = _number("Height, pixels", usual["height"], f"{where}-height", limits.side_pixels)
        width = _number("Width, pixels", usual["width"], f"{where}-width", limits.side_pixels)
    return Job(prompt, seed, steps, frames, height, width)


def plan_controls(site: Site) -> tuple[list[Any], gr.State]:
    """Lay out the choice of a plan; return the components that `ask_of` reads, the uploaded plan's state last."""
    kind = gr.Radio([*PRESETS, PATTERN, UPLOADED], value="balanced", label="Plan", elem_id="plan-kind")
    uploaded = gr.State(None, time_to_live=STATE_SECONDS)
    with gr.Group(visible=False) as of_pattern:
        name = gr.Dropdown(list(PATTERNS), value=FIRST_PATTERN, label="Pattern", elem_id="pattern-name")
        spec = gr.Textbox(f"{FIRST_PATTERN}:keep=0.25", label="As text", elem_id="pattern-text",
                          info="The controls below write it; it can be changed by hand.")  # fmt: skip

        @gr.render(inputs=name)
        def options(chosen: str) -> None:
            """Lay out the fields of a pattern."""
            found = [] if chosen in BY_HAND else fields(PATTERNS[chosen])
            controls = [_control(chosen, field.name, field.default) for field in found if field.default is not MISSING]
            for control in controls:
                control.change(
                    lambda *values: compose(chosen, values), controls, spec, queue=False, api_visibility="private"
                )

        name.change(lambda chosen: chosen, name, spec, queue=False, api_visibility="private")
    with gr.Group(visible=False) as of_file:
        file = gr.File(label="plan.json", file_types=[".json"], elem_id="plan-file", type="filepath")
        said = gr.Markdown(elem_id="plan-said")

    def choose(chosen: str) -> tuple[Any, Any]:
        return gr.Group(visible=chosen == PATTERN), gr.Group(visible=chosen == UPLOADED)

    def read(path: str | None) -> tuple[Plan | None, str]:
        if path is None:
            return None, ""
        try:
            plan = site.studio.read_plan(path, site.uploads)
        except ValueError as error:
            return None, f"Not taken: {plain(str(error))}"
        except (RuntimeError, OSError):
            logger.exception("the model of the page cannot be read")
            return None, "Not taken: the model of this page cannot be read; its owner finds the reason in the log."
        finally:
            Path(path).unlink(missing_ok=True)  # it has been read, or refused
        return plan, f"Read: {plain(plan.name)}, {len(plan.rules)} rules."

    kind.change(choose, kind, [of_pattern, of_file], queue=False, api_visibility="private")
    file.change(read, file, [uploaded, said], api_visibility="private")
    return [kind, spec, uploaded], uploaded


def chosen_plan(kind: str, spec: str, uploaded: Plan | None) -> str | Plan:
    """Return what a visitor chose as a plan.

    Raises:
        ValueError: no plan was uploaded.
    """
    if kind == UPLOADED:
        if uploaded is None:
            raise ValueError("upload a plan.json first, or choose another plan")
        return uploaded
    return spec if kind == PATTERN else kind


def ask_of(values: tuple[Any, ...], plan: str | Plan, yardstick: bool = False, monitor: bool = False) -> Ask:
    """Return the Ask for the values of a `Job`'s components."""
    prompt, seed, steps, frames, height, width = values
    return Ask(prompt, plan, 0 if seed is None else seed, steps, frames, height, width, yardstick, monitor)


def compose(name: str, values: tuple[Any, ...]) -> str:
    """Write a pattern's text from the values of its controls; what is the default is left out."""
    parts = []
    known = [field for field in fields(PATTERNS[name]) if field.default is not MISSING]
    for field, value in zip(known, values, strict=True):
        words = text_of(value)
        if words not in ("", text_of(field.default)):
            parts.append(f"{field.name}={words}")
    return f"{name}:{','.join(parts)}" if parts else name


def text_of(value: object) -> str:
    """Write a field's value as the command line reads it; None as nothing."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return "x".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value).strip()


def plain(text: str) -> str:
    """Return text that Markdown shows as it is."""
    return "".join(f"&#{ord(mark)};" if not (mark.isalnum() or mark in " .,") else mark for mark in text)


def _control(pattern: str, name: str, default: Any) -> Any:
    """Make the control of one field: a tick for a bool, a slider for a share, else text."""
    elem_id = f"option-{pattern}-{name}"
    if isinstance(default, bool):
        return gr.Checkbox(default, label=name, elem_id=elem_id, interactive=True)
    if isinstance(default, float) and 0.0 <= default <= 1.0:
        return gr.Slider(0.0, 1.0, default, step=0.01, label=name, elem_id=elem_id, interactive=True)
    return gr.Textbox(text_of(default), label=name, placeholder="not set", elem_id=elem_id, interactive=True)


def _number(label: str, value: int | None, elem_id: str, most: int | None = None) -> gr.Number:
    info = None if most is None else f"At most {most}."
    return gr.Number(value, label=label, precision=0, info=info, elem_id=elem_id, min_width=90)
