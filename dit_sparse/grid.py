"""The latent token grid of one transformer call: the key of every cache."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeVar

AXES = ("frames", "height", "width")
T = TypeVar("T")


@dataclass(frozen=True)
class Grid:
    """Describe the tokens of one sample: `prefix` text tokens, the video, `suffix` text tokens.

    Video tokens are row-major (frame, row, column) after patchify. `prefix` and `suffix` hold text, reference or
    history tokens; they are always attended exactly. All sizes are in tokens.

    Raises:
        ValueError: a size that is not a positive integer (axes) or not a non-negative one (prefix, suffix).
    """

    frames: int
    height: int
    width: int
    prefix: int = 0
    suffix: int = 0

    def __post_init__(self) -> None:
        for name in AXES:
            size = getattr(self, name)
            if not isinstance(size, int) or size < 1:
                raise ValueError(f"Grid.{name} must be an integer >= 1, got {size!r}")
        for name in ("prefix", "suffix"):
            size = getattr(self, name)
            if not isinstance(size, int) or size < 0:
                raise ValueError(f"Grid.{name} must be an integer >= 0, got {size!r}")

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.frames, self.height, self.width

    @property
    def frame_tokens(self) -> int:
        return self.height * self.width

    @property
    def video_tokens(self) -> int:
        return self.frames * self.frame_tokens

    @property
    def text_tokens(self) -> int:
        return self.prefix + self.suffix

    @property
    def tokens(self) -> int:
        return self.prefix + self.video_tokens + self.suffix

    def __str__(self) -> str:
        text = f" + {self.text_tokens} text" if self.text_tokens else ""
        return f"{self.frames}x{self.height}x{self.width}{text}"


def per_axis(value: T | tuple[T, ...] | list[T], name: str) -> tuple[T, T, T]:
    """Spread a scalar over the three axes, or check that a sequence names all three.

    Raises:
        ValueError: a sequence that does not hold three entries.
    """
    if isinstance(value, (tuple, list)):
        if len(value) != 3:
            raise ValueError(f"{name} must be one value or three (frames, height, width), got {value!r}")
        return value[0], value[1], value[2]
    return value, value, value


def axis_tokens(size: int | float, axis_tokens_available: int) -> int:
    """Turn an axis size into tokens: an int is tokens, a float in (0, 1] a fraction of the axis (nearest, >= 1)."""
    if isinstance(size, float):
        return max(1, math.floor(size * axis_tokens_available + 0.5))
    return size


def check_axis_size(size: object, name: str) -> None:
    """Refuse what is neither an integer >= 1 (tokens) nor a float in (0, 1] (a fraction of the axis).

    Raises:
        ValueError: with the name, the value and the two accepted forms.
    """
    is_tokens = isinstance(size, int) and not isinstance(size, bool) and size >= 1
    is_fraction = isinstance(size, float) and 0.0 < size <= 1.0
    if not (is_tokens or is_fraction):
        raise ValueError(f"{name} must be an int >= 1 (tokens) or a float in (0, 1] (fraction of it), got {size!r}")
