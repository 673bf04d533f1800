"""The words of the procedural captions, and the tables that clips.py draws from.

The order of every table is part of the data: changing it changes every clip and invalidates trained weights.
"""

from __future__ import annotations

# RGB in [0, 1], far enough apart to be told at a glance.
COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.88, 0.12, 0.12),
    "green": (0.13, 0.62, 0.22),
    "blue": (0.12, 0.28, 0.86),
    "yellow": (0.98, 0.88, 0.15),
    "orange": (0.98, 0.52, 0.06),
    "purple": (0.50, 0.16, 0.72),
    "cyan": (0.15, 0.80, 0.85),
    "pink": (0.98, 0.56, 0.78),
    "white": (0.96, 0.96, 0.96),
    "black": (0.05, 0.05, 0.05),
    "brown": (0.45, 0.27, 0.13),
    "gray": (0.50, 0.50, 0.50),
}
SHAPES: dict[str, str] = {  # singular -> plural
    "circle": "circles",
    "square": "squares",
    "triangle": "triangles",
    "star": "stars",
    "heart": "hearts",
    "ring": "rings",
    "cross": "crosses",
    "flower": "flowers",
    "moon": "moons",
}
TEXTURES: dict[str, int] = {"plain": 5, "striped": 2, "dotted": 2, "shaded": 2}  # name -> weight
MOTIONS: dict[str, int] = {  # phrase -> weight
    "still": 1,
    "drifting left": 2,
    "drifting right": 2,
    "drifting up": 2,
    "drifting down": 2,
    "bouncing": 3,
    "circling": 3,
    "swinging": 2,
    "spinning": 3,
    "pulsing": 2,
    "growing": 1,
    "shrinking": 1,
}
BACKGROUNDS: dict[str, int] = {"plain": 4, "gradient": 3, "striped": 2, "checkered": 3, "cloudy": 2}
CAMERAS: dict[str, int] = {  # phrase after "camera" -> weight
    "static": 20,
    "panning left": 2,
    "panning right": 2,
    "panning up": 2,
    "panning down": 2,
    "zooming in": 2,
    "zooming out": 2,
    "rotating": 1,
    "panning away and back": 3,
}
GRAMMAR = (",", "a", "an", "two", "mirrored", "and", "on", "background", "camera", "behind", "bar", "light")
EXTRAS = ("blinking", "changing", "vertical", "horizontal")

PAD, UNKNOWN = "<pad>", "<unk>"


def groups() -> dict[str, list[str]]:
    """Return the known words by kind, each in table order."""

    def single(phrases: dict[str, int]) -> list[str]:
        return list(dict.fromkeys(word for phrase in phrases for word in phrase.split()))

    return {
        "colours": list(COLOURS),
        "shapes": list(SHAPES) + list(SHAPES.values()),
        "textures": list(TEXTURES),
        "motions": single(MOTIONS),
        "backgrounds": list(BACKGROUNDS),
        "camera": single(CAMERAS),
        "extras": list(EXTRAS),
        "grammar": list(GRAMMAR),
    }


def vocabulary() -> dict[str, int]:
    """Return word -> token id; 0 pads, 1 stands for every unknown word."""
    words = dict.fromkeys([PAD, UNKNOWN])
    for group in groups().values():
        words.update(dict.fromkeys(group))
    return {word: index for index, word in enumerate(words)}
