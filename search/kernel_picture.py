"""A picture of the kernel benchmark: the fraction of cuDNN's dense speed that kept blocks realise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from dit_sparse.search.staging import staged

# Bars beside each other; the colours differ in lightness, too.
COLOURS = {
    "cudnn dense": "#9a9a9a", "fa4": "#d1801a", "flex": "#a9c5a0", "triton": "#5b8fb9", "hopper": "#0b3c5d",
}  # fmt: skip
BAR, GAP, LEFT, TOP, HEIGHT, BOTTOM, RIGHT = 16, 22, 56, 56, 300, 64, 20
TEXT, FAINT, LINE = "#222222", "#dddddd", "#888888"
LEAST_TOP = 1.2  # of the axis


def draw_realised(rows: list[dict[str, Any]], path: Path) -> bool:
    """Draw a group of bars for each unit of the section "full", with a line at 1; False where there is no such row."""
    shown = [row for row in rows if row["section"] == "full" and row["realised"] and row["contender"] in COLOURS]
    units = list(dict.fromkeys(row["unit"] for row in shown))
    if not units:
        return False
    value = {(row["unit"], row["contender"]): row["realised"] for row in shown}
    groups = [(unit, [name for name in COLOURS if (unit, name) in value]) for unit in units]
    most = max(LEAST_TOP, *(row["realised"] * 1.05 for row in shown))
    width = LEFT + RIGHT + sum(BAR * len(names) + GAP for _, names in groups)
    picture = Image.new("RGB", (max(width, 760), TOP + HEIGHT + BOTTOM), "white")
    pen, font, small = ImageDraw.Draw(picture), ImageFont.load_default(13), ImageFont.load_default(10)
    base = TOP + HEIGHT

    def level(fraction: float) -> float:
        return base - HEIGHT * fraction / most

    for step in range(int(most / 0.25) + 1):
        at = level(step * 0.25)
        pen.line((LEFT, at, picture.width - RIGHT, at), fill=LINE if step == 4 else FAINT)
        pen.text((LEFT - 8, at), f"{step * 0.25:.2f}", fill=TEXT, font=small, anchor="rm")
    x = LEFT + GAP / 2
    for unit, names in groups:
        for number, name in enumerate(names):
            left = x + BAR * number
            pen.rectangle((left, level(value[unit, name]), left + BAR - 3, base), fill=COLOURS[name])
        middle = x + BAR * len(names) / 2
        shape, _, density = unit.partition("@")
        pen.text((middle, base + 8), shape, fill=TEXT, font=small, anchor="mt")
        pen.text((middle, base + 22), f"{100 * float(density):.0f} %", fill=TEXT, font=small, anchor="mt")
        x += BAR * len(names) + GAP
    pen.text((LEFT, 8), "cuDNN dense time x density / time", fill=TEXT, font=font)
    left = float(LEFT)
    for name in [name for name in COLOURS if any(name in names for _, names in groups)]:
        pen.rectangle((left, 32, left + 10, 42), fill=COLOURS[name])
        pen.text((left + 14, 37), name, fill=TEXT, font=small, anchor="lm")
        left += 28 + pen.textlength(name, font=small)
    with staged(path.parent) as folder:
        picture.save(folder / path.name, format="PNG", optimize=True)
    return True
