"""What charts of the page share: a scale with ticks, axes and text as SVG that follows the page's colours."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 480, 300
LEFT, RIGHT, TOP, BOTTOM = 54, 14, 14, 40  # margins
FONT = 12
LETTER = 0.58  # mean width of a letter, in font sizes
MOST_TICKS = 6
ACCENT, SECOND = "var(--color-accent, #c26a00)", "var(--body-text-color-subdued, #777)"
INK = 'fill="currentColor"'


@dataclass(frozen=True)
class Scale:
    """Map values from `low` to `high` to pixels from `start` to `end`; ticks are at least `least_step` apart."""

    low: float
    high: float
    start: float
    end: float
    least_step: float = 0.0

    @staticmethod
    def around(values: Sequence[float], start: float, end: float, margin: float = 0.08) -> Scale:
        """Span all values, with a margin in shares of their range on both sides."""
        low, high = min(values), max(values)
        room = margin * (high - low) or max(abs(high), 1.0) * margin
        return Scale(low - room, high + room, start, end)

    def at(self, value: float) -> float:
        return round(self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start), 2)

    def ticks(self) -> list[float]:
        """Return round values within the scale: 1, 2 or 5 times a power of ten apart."""
        raw = max((self.high - self.low) / (MOST_TICKS - 1), self.least_step)
        power = 10.0 ** math.floor(math.log10(raw))
        step = next(times * power for times in (1, 2, 5, 10) if times * power >= raw * (1 - 1e-9))
        first = math.ceil(self.low / step - 1e-9)
        return [number * step for number in range(first, math.floor(self.high / step + 1e-9) + 1)]


def chart(title: str, description: str, parts: Sequence[str], height: int = HEIGHT) -> str:
    """Return parts as an SVG element that readers are told the title and the description of."""
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="100%" role="group" '
            f'aria-label="{html.escape(title)}" font-size="{FONT}" font-family="system-ui, sans-serif" '
            f'{INK} style="max-width: 46rem; height: auto">',
            f"<title>{html.escape(title)}</title>",
            f"<desc>{html.escape(description)}</desc>",
            *parts,
            "</svg>",
        ]
    )


def axes(across: Scale, up: Scale, x_label: str, y_label: str) -> list[str]:
    """Draw ticks, their lines and the names of both axes."""
    left, right, bottom, top = across.start, across.end, up.start, up.end
    parts = [line(left, bottom, right, bottom), line(left, bottom, left, top)]
    for value in across.ticks():
        parts.append(line(across.at(value), bottom, across.at(value), top, opacity=0.15))
        parts.append(text(across.at(value), bottom + FONT + 3, f"{value:g}", anchor="middle"))
    for value in up.ticks():
        parts.append(line(left, up.at(value), right, up.at(value), opacity=0.15))
        parts.append(text(left - 5, up.at(value) + FONT / 3, f"{value:g}", anchor="end"))
    parts.append(text((left + right) / 2, bottom + 2 * FONT + 8, x_label, anchor="middle"))
    middle = (top + bottom) / 2
    turned = f'<g transform="rotate(-90 {FONT} {middle})">'
    return [*parts, f"{turned}{text(FONT, middle, y_label, anchor='middle')}</g>"]


def line(x1: float, y1: float, x2: float, y2: float, *, opacity: float = 0.6, dash: str = "") -> str:
    dashes = f' stroke-dasharray="{dash}"' if dash else ""
    return f'<path d="M{x1} {y1}L{x2} {y2}" stroke="currentColor" stroke-opacity="{opacity}"{dashes} fill="none"/>'


def polyline(points: Sequence[tuple[float, float]], colour: str, dash: str = "") -> str:
    dashes = f' stroke-dasharray="{dash}"' if dash else ""
    places = " ".join(f"{x},{y}" for x, y in points)
    return f'<polyline points="{places}" fill="none" style="stroke: {colour}" stroke-width="2"{dashes}/>'


def text(x: float, y: float, words: str, *, anchor: str = "start") -> str:
    return f'<text x="{round(x, 2)}" y="{round(y, 2)}" text-anchor="{anchor}">{html.escape(words)}</text>'


def mark(x: float, y: float, told: str, colour: str, *, filled: bool = True, radius: float = 5) -> str:
    """Draw a point that the keyboard reaches and that tells what it is."""
    fill = colour if filled else "none"
    told = html.escape(told)
    return (
        f'<g tabindex="0" role="img" aria-label="{told}"><title>{told}</title>'
        f'<circle cx="{x}" cy="{y}" r="{radius}" style="fill: {fill}; stroke: {colour}" stroke-width="2" '
        'pointer-events="all"/></g>'
    )


def text_width(words: str) -> float:
    """Return about how wide a text is, in pixels of the chart."""
    return LETTER * FONT * len(words)
