"""The frames of a grid side by side, with the tokens lit that one token reads; and back from a click to a token."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from dit_sparse.app.choice import READ, SKIPPED, STOOD_FOR, Choice, Token, keys_of, text_tokens_read
from dit_sparse.grid import Grid

GAP_PIXELS, LABEL_PIXELS, TEXT_PIXELS = 6, 14, 11
MOST_CELL_PIXELS, FRAMES_WANTED = 8, 4  # of a token; in a row
# They differ in lightness too, and are told from a white and from a black page.
COLOURS = {SKIPPED: (59, 66, 82, 255), STOOD_FOR: (124, 134, 152, 255), READ: (250, 190, 70, 255)}
THROUGH = {SKIPPED: 0.25, STOOD_FOR: 0.4, READ: 0.6}  # how much of a clip is seen
HERE, LABEL = (214, 0, 110, 255), (136, 136, 136, 255)
WORDS = {SKIPPED: "dark", STOOD_FOR: "grey", READ: "yellow", "here": "magenta"}


@dataclass(frozen=True)
class Sheet:
    """Place the frames of a grid on an image of about a width: row-major, a number above each, gaps around all."""

    grid: Grid
    width_pixels: int

    def __post_init__(self) -> None:
        if self.width_pixels < 1:
            raise ValueError(f"width_pixels must be at least 1, got {self.width_pixels}")

    @property
    def cell(self) -> int:
        """Return the side of a token in pixels."""
        room = self.width_pixels // min(FRAMES_WANTED, self.grid.frames) - GAP_PIXELS
        return max(1, min(MOST_CELL_PIXELS, room // self.grid.width))

    @property
    def columns(self) -> int:
        """Return the frames in a row: as many as the width holds, at least one."""
        fitting = (self.width_pixels - GAP_PIXELS) // (self.cell * self.grid.width + GAP_PIXELS)
        return max(1, min(self.grid.frames, fitting))

    @property
    def pitch(self) -> tuple[int, int]:
        """Return the distance of frames, across and down."""
        return (
            self.cell * self.grid.width + GAP_PIXELS,
            self.cell * self.grid.height + GAP_PIXELS + LABEL_PIXELS,
        )

    @property
    def size(self) -> tuple[int, int]:
        """Return the width and height of the image."""
        rows = math.ceil(self.grid.frames / self.columns)
        return GAP_PIXELS + self.columns * self.pitch[0], GAP_PIXELS + rows * self.pitch[1]

    def corner(self, frame: int) -> tuple[int, int]:
        """Return the left and top pixel of a frame's first token."""
        row, column = divmod(frame, self.columns)
        return GAP_PIXELS + column * self.pitch[0], GAP_PIXELS + LABEL_PIXELS + row * self.pitch[1]

    def token_at(self, x: int, y: int) -> Token | None:
        """Return the token under a pixel, or None beside the frames."""
        column, row = (x - GAP_PIXELS) // self.pitch[0], (y - GAP_PIXELS) // self.pitch[1]
        frame = row * self.columns + column
        if not 0 <= frame < self.grid.frames:
            return None
        left, top = self.corner(frame)
        place = ((y - top) // self.cell, (x - left) // self.cell)
        if not (0 <= place[0] < self.grid.height and 0 <= place[1] < self.grid.width):
            return None
        return frame, *place


def token_at(x: int, y: int, grid: Grid, width_pixels: int) -> Token | None:
    """Return the token under a pixel of `neighbourhood_image`, or None beside the frames."""
    return Sheet(grid, width_pixels).token_at(x, y)


def neighbourhood_image(
    choice: Choice,
    token: Token | None,
    width_pixels: int = 720,
    clip: NDArray[np.uint8] | None = None,  # [frames of the clip, h, w, 3]
) -> Image.Image:
    """Draw all frames with the tokens lit that `token` reads (frame, row, column), itself marked; None lights none.

    A clip shines through: of its frames that stand evenly for those of the grid, most where a token is read.

    Raises:
        ValueError: the token lies outside the grid.
    """
    grid, sheet = choice.grid, Sheet(choice.grid, width_pixels)
    levels = np.zeros(grid.shape, np.uint8) if token is None else keys_of(choice, token).numpy()
    table = np.array([COLOURS[level] for level in sorted(COLOURS)], np.uint8)
    tokens: NDArray[np.uint8] = table[levels]  # [T, H, W, 4]
    if token is not None:
        tokens[token] = HERE
    shares = np.array([THROUGH[level] for level in sorted(THROUGH)])[levels]
    if token is not None:
        shares[token] = 0.0
    through = np.round(255 * shares).astype(np.uint8).repeat(sheet.cell, 1).repeat(sheet.cell, 2)
    pixels = tokens.repeat(sheet.cell, 1).repeat(sheet.cell, 2)
    picture = Image.new("RGBA", sheet.size)
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(TEXT_PIXELS)
    for frame, shown in enumerate(pixels):
        left, top = sheet.corner(frame)
        of_grid = Image.fromarray(shown)
        if clip is not None:
            number = round(frame * (len(clip) - 1) / max(grid.frames - 1, 1))
            behind = Image.fromarray(clip[number]).convert("RGBA").resize(of_grid.size, Image.Resampling.BILINEAR)
            of_grid = Image.composite(behind, of_grid, Image.fromarray(through[frame]))
        picture.paste(of_grid, (left, top))
        pen.text((left, top - 2), str(frame), fill=LABEL, font=font, anchor="ls")
    return picture


def neighbourhood_text(choice: Choice, token: Token | None) -> str:
    """Say what a neighbourhood image shows: how many tokens this one reads, frame by frame, and the colours."""
    grid = choice.grid
    if token is None:
        return "Choose a token: its neighbourhood is shown over all frames."
    levels = keys_of(choice, token)
    by_frame = (levels == READ).sum((1, 2)).tolist()
    count = sum(by_frame)
    frames = ", ".join(f"frame {frame}: {some}" for frame, some in enumerate(by_frame) if some) or "none"
    rest = f"{WORDS[SKIPPED]}: left out"
    if choice.compensate:
        rest = f"{WORDS[STOOD_FOR]}: means of their blocks stand for them"
    text = f" Of {grid.text_tokens} text tokens it reads {text_tokens_read(choice, token)}." if grid.text_tokens else ""
    how = "by blocks of up to 128 tokens" if choice.definition is None else "token by token"
    return (
        f"Frame {token[0]}, row {token[1]}, column {token[2]} ({WORDS['here']}) reads {count:,} of "
        f"{grid.video_tokens:,} video tokens ({count / grid.video_tokens:.1%}), told {how}. {WORDS[READ]}: read; "
        f"{rest}.{text} Read in {frames}."
    )
