"""Write clips as mp4 files that every browser plays. For viewing only: metrics never read them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from dit_sparse.search.metrics import Frames

VIEW_PIXELS = 256  # smaller clips are enlarged to about this many rows
STILL_PIXELS = 128  # the same for each frame of the stills
CAPTION_PIXELS = 22
GAP_PIXELS = 8
BACKGROUND = 24


def to_bytes(frames: Frames) -> NDArray[np.uint8]:
    """Round [T, H, W, 3] in [0, 1] to 8 bits."""
    return (frames * 255.0).round().clip(0, 255).astype(np.uint8)


def enlarge(frames: NDArray[np.uint8], rows: int = VIEW_PIXELS) -> NDArray[np.uint8]:
    """Repeat pixels of a small clip a whole number of times, so that nothing is invented between them."""
    factor = max(1, rows // frames.shape[1])
    return frames if factor == 1 else frames.repeat(factor, axis=1).repeat(factor, axis=2)


def write_mp4(path: Path, frames: NDArray[np.uint8], fps: float) -> None:
    """Encode [T, H, W, 3] as h264, yuv420p, faststart; odd sizes are padded by their last row or column.

    Raises:
        ValueError: frames of another shape or type, or fps that is not positive.
    """
    import imageio_ffmpeg

    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or 0 in frames.shape:
        raise ValueError(f"frames must be uint8 [T, H, W, 3], got {frames.dtype} {frames.shape}")
    if not fps > 0 or not math.isfinite(fps):
        raise ValueError(f"fps must be a positive number, got {fps}")
    height, width = frames.shape[1:3]
    padded = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    writer = imageio_ffmpeg.write_frames(
        str(path),
        (padded.shape[2], padded.shape[1]),
        fps=fps,
        codec="libx264",
        pix_fmt_out="yuv420p",
        quality=None,
        macro_block_size=1,
        output_params=["-crf", "16", "-preset", "medium", "-movflags", "+faststart"],
        ffmpeg_log_level="error",
    )
    writer.send(None)
    try:
        for frame in padded:
            writer.send(np.ascontiguousarray(frame))
    finally:
        writer.close()


def side_by_side(clips: Sequence[NDArray[np.uint8]], captions: Sequence[str]) -> NDArray[np.uint8]:
    """Place clips of one shape [T, H, W, 3] next to each other, a caption above each."""
    frames, height, width = clips[0].shape[:3]
    columns = len(clips)
    canvas = np.full(
        (frames, height + CAPTION_PIXELS, columns * width + (columns - 1) * GAP_PIXELS, 3), BACKGROUND, dtype=np.uint8
    )
    header = Image.new("RGB", (canvas.shape[2], CAPTION_PIXELS), (BACKGROUND,) * 3)
    draw = ImageDraw.Draw(header)
    font = ImageFont.load_default(size=13)
    for i, (clip, caption) in enumerate(zip(clips, captions, strict=True)):
        left = i * (width + GAP_PIXELS)
        canvas[:, CAPTION_PIXELS:, left : left + width] = clip
        draw.text((left + 4, 3), _fit(caption, font, width - 8), font=font, fill=(235, 235, 235))
    canvas[:, :CAPTION_PIXELS] = np.asarray(header)
    return canvas


def stills(clips: Sequence[NDArray[np.uint8]], captions: Sequence[str], columns: int = 8) -> Image.Image:
    """Lay out each clip [T, H, W, 3] as a row of frames spread over its time, its caption above."""
    rows = []
    for clip, caption in zip(clips, captions, strict=True):
        at = np.linspace(0, len(clip) - 1, min(columns, len(clip))).round().astype(int)
        frames = enlarge(clip[at], STILL_PIXELS)
        row = side_by_side([frame[None] for frame in frames], ["" for _ in at])[0]
        picture = Image.fromarray(row)
        ImageDraw.Draw(picture).text((4, 3), caption, font=ImageFont.load_default(size=13), fill=(235, 235, 235))
        rows.append(np.asarray(picture))
    return Image.fromarray(np.concatenate(rows))


def _fit(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, pixels: int) -> str:
    if font.getlength(text) <= pixels:
        return text
    while text and font.getlength(text + "…") > pixels:
        text = text[:-1]
    return text + "…"
