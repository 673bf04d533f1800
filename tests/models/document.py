"""Write docs/models.md from the model table and its test cases: `make docs`."""

from __future__ import annotations

import re
from pathlib import Path

from dit_sparse.pipelines.model_table import MODELS, REFUSED
from dit_sparse.pipelines.models import Model
from dit_sparse.pipelines.table_image import IMAGE_MODELS
from dit_sparse.pipelines.table_video import VIDEO_MODELS
from tests.models.cases import CASES, OUTSIDE, SINCE

PAGE = Path(__file__).resolve().parents[2] / "docs" / "models.md"
INTRODUCTION = f"""# Models

Made by `make docs` from the model table and its test cases; CI compares. {len(MODELS)} transformer classes of
diffusers.

What is sparse: the self-attention over image or video tokens of the modules named here. Text, reference, history and
condition tokens in the same sequence are read by every query and read every key, exactly; attention of its own to text
(cross-attention), text encoders and refiners are never touched. "Padded text" says that tokens which the model's
mask hides are left out, by number and not by a mask. A call that cannot be honoured runs the model's own attention, and
`summary()` names the reason. Calls of fewer than `min_tokens` tokens run dense as well, by default 8,192 on a GPU: most
image models have 4,096 at 1024x1024, so there it takes a lower `min_tokens` or a larger image.

What holds it: `pytest tests/models -k <class>`, with a tiny model for each form in the last column. One changed patch
of latents must change the query of its own token and of no other one; a dense plan, calls below `min_tokens` and a
disabled model are bit-identical to the stock one; a pattern that keeps everything runs the sparse kernel and agrees
with it; a sparse one agrees with the stock model whose self-attention alone gets the pattern's mask; two prompts of
different lengths in one batch agree with the stock mask; the grid at the usual size comes from the rule itself.

For a class that is not here: `enable(transformer, spec, grid=Grid(frames, height, width, prefix, suffix))`, with the
text tokens before and after; `layers=` (a regex of module paths) says which attention is meant. A grid is the number of
tokens along each axis, after patchify. What tells the denoising step: [steps](steps.md).
"""
PLACES = {"cross": "–", "prefix": "before", "suffix": "after"}
HEADINGS = (
    "class",
    "usual size",
    "grid, tokens",
    "sparse",
    "other tokens",
    "padded text",
    "stays dense, remarks",
    "forms",
)


def document() -> str:
    """Return the page."""
    parts = [INTRODUCTION]
    for title, models in (("Video", VIDEO_MODELS), ("Images", IMAGE_MODELS)):
        rows = [_row(name, models[name]) for name in sorted(models)]
        parts.append(f"## {title}\n\n{_table(HEADINGS, rows)}")
    refused = [(f"`{name}`", reason) for name, reason in sorted(REFUSED.items())]
    parts.append(f"## Nothing to make sparse\n\n{_table(('class', 'reason'), refused)}")
    outside = ", ".join(f"`{name}` ({what})" for name, what in sorted(OUTSIDE.items()))
    parts.append(f"Not about images or video: {outside}.\n")
    return "\n".join(parts)


def _row(name: str, model: Model) -> tuple[str, ...]:
    since = f" (diffusers {SINCE[name]})" if name in SINCE else ""
    size, grid = model.usual
    forms = [case.form or "plain" for case in CASES if case.model == name]
    layers = re.sub(r"\\d\+", "N", model.layers).replace(r"\.", ".").replace("|", "&#124;")
    return (
        f"`{name}`{since}",
        size,
        f"{'×'.join(map(str, grid.shape))}, {grid.video_tokens:,}",
        f"`{layers}`" if "&#124;" not in layers else f"<code>{layers}</code>",
        PLACES[model.text],
        "left out" if model.masks else "–",
        model.dense or "–",
        ", ".join(forms),
    )


def _table(headings: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [headings, tuple("---" for _ in headings), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(document(), encoding="utf-8")
    print(PAGE.name)
