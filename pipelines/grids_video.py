"""Grid rules of video models: from the arguments of a transformer's forward to its token grid."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from dit_sparse.grid import Grid

# Framepack: latents of the past and the stride of the convolution that makes tokens of them, nearest past first.
FRAMEPACK_HISTORY = (
    ("latents_clean", "indices_latents_clean", (1, 2, 2)),
    ("latents_history_2x", "indices_latents_history_2x", (2, 4, 4)),
    ("latents_history_4x", "indices_latents_history_4x", (4, 8, 8)),
)


def patched_video(config: Any, arguments: Mapping[str, Any]) -> Grid:
    """Read latents [B, C, T, H, W] and a patch of three sizes, or of one and one for frames."""
    frames, height, width = arguments["hidden_states"].shape[2:]
    patch = config.patch_size
    patch_frames, patch_height, patch_width = (config.patch_size_t, patch, patch) if isinstance(patch, int) else patch
    return Grid(frames // patch_frames, height // patch_height, width // patch_width)


def frames_first(config: Any, arguments: Mapping[str, Any]) -> Grid:
    """Read latents [B, T, C, H, W] and a patch of three sizes, or of one and perhaps one for frames."""
    _, frames, _, height, width = arguments["hidden_states"].shape
    patch = config.patch_size
    if isinstance(patch, int):
        patch = (getattr(config, "patch_size_t", None) or 1, patch, patch)
    return Grid(frames // patch[0], height // patch[1], width // patch[2])


def reference_frame(config: Any, arguments: Mapping[str, Any]) -> Grid:
    """Read latents [B, C, 1 + T, H, W] whose first frame is the reference image: that one is a prefix."""
    grid = patched_video(config, arguments)
    return Grid(grid.frames - 1, grid.height, grid.width, prefix=grid.frame_tokens)


def framepack(config: Any, arguments: Mapping[str, Any]) -> Grid:
    """Read latents [B, C, T, H, W] and those of the past, whose tokens stand in front; text is left out."""
    grid = patched_video(config, arguments)
    history = 0
    for latents, indices, stride in FRAMEPACK_HISTORY:
        if arguments.get(latents) is not None and arguments.get(indices) is not None:
            sizes = arguments[latents].shape[2:]
            history += math.prod(-(-size // step) for size, step in zip(sizes, stride, strict=True))
    return Grid(*grid.shape, prefix=history)


def video_per_frame(config: Any, arguments: Mapping[str, Any]) -> Grid:
    """Read latents [B, C, T, H, W], each frame patched by itself."""
    frames, height, width = arguments["hidden_states"].shape[2:]
    return Grid(frames, height // config.patch_size, width // config.patch_size)


def channels_last_video(config: Any, arguments: Mapping[str, Any]) -> Grid:
    """Read latents [B, T, H, W, C].

    Raises: ValueError for NABLA in its tiled order, where tokens do not stand row by row.
    """
    if (arguments.get("sparse_params") or {}).get("to_fractal"):
        raise ValueError("NABLA is on, and its tokens are ordered in tiles of 8x8")
    _, *shape = arguments["hidden_states"].shape[:-1]
    return Grid(*(size // patch for size, patch in zip(shape, config.patch_size, strict=True)))


def kandinsky6(config: Any, arguments: Mapping[str, Any]) -> Grid:
    """Read latents [B, T, H, W, C]; given rotary positions mean that the last frame is a reference."""
    grid = channels_last_video(config, arguments)
    if arguments.get("visual_rope_pos") is None:
        return grid
    return Grid(grid.frames - 1, grid.height, grid.width, suffix=grid.height * grid.width)


def counted_video(config: Any, arguments: Mapping[str, Any]) -> Grid:
    """Read the numbers `num_frames`, `height` and `width` of packed latents."""
    return Grid(arguments["num_frames"], arguments["height"], arguments["width"])


def ltx(config: Any, arguments: Mapping[str, Any]) -> Grid:
    """Read the numbers of packed latents, or `video_coords` [B, 3, S] where a pipeline gives them instead."""
    coordinates = arguments.get("video_coords")
    return counted_video(config, arguments) if coordinates is None else _clip_among(coordinates[0].T)


def minimax_h3(config: Any, arguments: Mapping[str, Any]) -> Grid:
    """Read `position_ids` [S, 3]: the video is the longest part of the packed sequence."""
    return _clip_among(arguments["position_ids"])


def cosmos3(config: Any, arguments: Mapping[str, Any]) -> Grid:
    """Read the numbers of the one video, of the text in front, and of sound and action behind."""
    ((frames, height, width),) = arguments["vision_token_shapes"]
    others = [*(arguments.get("sound_token_shapes") or []), *(arguments.get("action_token_shapes") or [])]
    behind = sum(math.prod(shape) for shape in others)
    return Grid(frames, height, width, prefix=arguments["und_len"], suffix=behind)


def _clip_among(coordinates: Tensor) -> Grid:  # [S, 3]: frame, row, column of each token
    """Return the grid of the clip in a packed sequence: the longest run of equal frames at growing times.

    What stands before it (text, keyframes, audio) is its prefix, what stands behind it (frames of an earlier window, to
    overlap with or to guide) its suffix; of runs of one length the first is the clip.

    Raises: ValueError where the coordinates are no grid.
    """
    coordinates = coordinates.detach().cpu()
    tokens = len(coordinates)
    frame_tokens = _equal_at_the_end(coordinates[:, :1])
    width = _equal_at_the_end(coordinates[:, :2])
    if frame_tokens % width:
        raise ValueError(f"the last frame's {frame_tokens} tokens are not rows of {width}")
    frames = coordinates[tokens % frame_tokens :].unflatten(0, (-1, frame_tokens))
    times = frames[:, 0, 0]
    like_the_last = (frames[..., 1:] == frames[-1, :, 1:]).flatten(1).all(1) & (frames[..., 0] == times[:, None]).all(1)
    times = times[len(times) - _trues_at_the_end(like_the_last) :].tolist()
    starts = [0, *(at for at in range(1, len(times)) if times[at] <= times[at - 1])]
    lengths = [end - start for start, end in zip(starts, [*starts[1:], len(times)], strict=True)]
    count, start = max(lengths), starts[lengths.index(max(lengths))]
    behind = (len(times) - start - count) * frame_tokens
    return Grid(count, frame_tokens // width, width, tokens - count * frame_tokens - behind, behind)


def _equal_at_the_end(rows: Tensor) -> int:
    """Count the rows at the end that equal the last one."""
    return _trues_at_the_end((rows == rows[-1]).all(1))


def _trues_at_the_end(flags: Tensor) -> int:
    return int(flags.flip(0).long().cumprod(0).sum())
