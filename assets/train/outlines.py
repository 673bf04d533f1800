"""Where the objects of a clip are, by the colours that its caption names, and which shape an outline has."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from skimage.measure import label
from torch import Tensor

from dit_sparse.assets.train.clips import CLIP_FRAMES, OBJECTS, Scene
from dit_sparse.assets.train.render import distance
from dit_sparse.assets.train.words import BACKGROUNDS, COLOURS, SHAPES

GRID = 32  # outlines are compared on GRID x GRID points
ROTATIONS = 36
BAR, BACKGROUND, NOBODY = OBJECTS, OBJECTS + 1, OBJECTS + 2  # owners of pixels beside the objects 0..2

_NARROW = ((0.94, 1.0, 1.06), (-0.06, 0.0, 0.06))  # scales and shifts tried, in roots of the area
_WIDE = ((0.9, 1.0, 1.1, 1.2, 1.35), (-0.4, -0.3, -0.2, -0.1, 0.0, 0.1, 0.2, 0.3, 0.4))
_SPAN = 1.06  # the grid reaches this many roots of the area from the centroid: the tips of a moon
_FARTHEST = 0.25  # RGB distance beyond which a pixel has no named colour; no two colours are nearer than .37
_ITSELF = 0.45  # of the way to the second tone: where a colour still counts as itself
_LENGTH = 0.08  # handicap in RGB distance of a segment of length 1, and of colours that the caption does not name


def owners(video: Tensor, clips: Scene, b: int) -> tuple[Tensor, Tensor]:
    """Say which part of the caption of clip `b` each pixel shows, for frames 0, 2, 4 ... of a clip.

    A pixel belongs to the nearest of the segments in RGB that the parts can have: an object's runs from its colour to
    the second tone of its texture, the background's from one of its colours to the other. Colours that the caption
    does not name take pixels too, so that a wrong colour is nobody's.

    Args:
        video: uint8 [T, H, W, 3]

    Returns:
        the owners, int64 [T, H, W], and where they show the named colour itself, no second tone and no blinking: bool
    """
    start, end, owner, lit = _segments(clips, b)
    time = torch.arange(0, 2 * len(video), 2) / (CLIP_FRAMES - 1)
    dim = 1 - clips.light[b].float() * 0.45 * (0.5 - 0.5 * torch.cos(2 * math.pi * time))
    pixels = (video.float() / 255 / dim[:, None, None, None]).reshape(-1, 3)
    along = end - start
    from_start = pixels.square().sum(1, keepdim=True) - 2 * pixels @ start.T + start.square().sum(1)
    dot = pixels @ along.T - (start * along).sum(1)
    squared = along.square().sum(1)
    share = (dot / squared.clamp(min=1e-6)).clamp(0, 1)
    # A long segment comes near many colours by chance: of two equally near parts the shorter one takes the pixel.
    handicap = torch.where(owner == NOBODY, 1.0, squared) * _LENGTH**2
    nearest = (from_start - 2 * share * dot + share.square() * squared + handicap).min(dim=1)
    found = torch.where(nearest.values < _FARTHEST**2, owner[nearest.indices], NOBODY)
    itself = lit[nearest.indices] & (share.gather(1, nearest.indices[:, None])[:, 0] < _ITSELF)
    return found.reshape(video.shape[:3]), itself.reshape(video.shape[:3])


def _segments(clips: Scene, b: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the ends [P, 3], [P, 3] of the segments in RGB, their owners [P], and which are no dark blink [P]."""
    palette = torch.tensor(list(COLOURS.values()))
    rows: list[tuple[Tensor, Tensor, int, bool]] = []
    named = set()
    for k in range(int(clips.count[b])):
        flat = palette[clips.colour[b, k]]
        named.add(int(clips.colour[b, k]))
        toward = (flat.mean() < 0.3).float()  # as render draws the second tone
        tone = flat + (toward - flat) * 0.6 if clips.texture[b, k] else flat
        owner = 0 if k == 1 and clips.twin[b] else k
        rows.append((flat, tone, owner, True))
        if clips.blink[b]:
            rows.append((flat * 0.3, tone * 0.3, owner, False))
    if clips.bar[b]:
        colour = palette[clips.bar_colour[b]]
        named.add(int(clips.bar_colour[b]))
        rows.append((colour, colour, BAR, True))
    first, second = clips.background_colours[b].tolist()
    plain = clips.background[b] == list(BACKGROUNDS).index("plain")
    rows.append((palette[first], palette[first if plain else second], BACKGROUND, True))
    named |= {first} if plain else {first, second}
    rows += [(palette[c], palette[c], NOBODY, True) for c in range(len(COLOURS)) if c not in named]
    starts, ends, parts, lit = zip(*rows, strict=True)
    return torch.stack(starts), torch.stack(ends), torch.tensor(parts), torch.tensor(lit)


def clean(mask: Tensor, pieces: int = 1) -> Tensor:
    """Drop what is thin or stray from a bool mask [T, H, W]: bool [pieces, T, H, W].

    One piece keeps every part of a frame that is at least a third of the largest one, for a bar or a nearer object may
    cut it. Two pieces (twins) are the two largest parts, the left one first; empty where a frame has only one.
    """
    reach = max(1, round(mask.shape[1] / 64))
    thick = _eroded(mask, reach)
    result = torch.zeros(pieces, *mask.shape, dtype=torch.bool)
    for t in range(len(mask)):
        if not thick[t].any():
            continue
        parts = label(mask[t].numpy(), connectivity=1)
        sizes = np.bincount(parts.ravel())
        sizes[0] = 0
        whole = np.zeros(len(sizes), bool)
        whole[np.unique(parts[thick[t].numpy()])] = True
        sizes = sizes * whole
        if pieces == 1:
            result[0, t] = torch.from_numpy((sizes >= max(1, sizes.max() / 3))[parts])
            continue
        largest = sizes.argsort()[::-1][:pieces]
        if len(largest) == pieces and sizes[largest[-1]] >= max(1, sizes.max() / 3):
            centres = [np.nonzero(parts == i)[1].mean() for i in largest]
            for piece, i in enumerate(np.argsort(centres)):
                result[piece, t] = torch.from_numpy(parts == largest[i])
    return result


def contact(mask: Tensor, others: Tensor) -> Tensor:
    """Return the fraction [T] of the rim of a bool mask [T, H, W] that lies at the frame's border or at `others`."""
    wide = F.pad(mask.float(), (2, 2, 2, 2))
    outside = F.pad(others.float(), (2, 2, 2, 2), value=1.0)
    rim = F.max_pool2d(wide[:, None], 5, stride=1, padding=2)[:, 0] * (1 - wide)
    return (rim * outside).sum(dim=(1, 2)) / rim.sum(dim=(1, 2)).clamp(min=1)


def match(masks: Tensor, hidden: Tensor, whole: bool) -> tuple[Tensor, Tensor]:
    """Compare bool masks [T, H, W], none empty, with every shape: best overlap [T, 9] and its angle in radians [T, 9].

    The overlap is intersection over union where nothing is `hidden` [T, H, W], after centroid and area are made equal,
    over all rotations and small shifts and changes of scale; larger ones where the objects are not `whole`, for what
    is left of an object has another centroid and area.
    """
    bank = outline_bank().flatten(2)  # [9, ROTATIONS, points]
    mask, shown = _centred(masks, hidden, _NARROW if whole else _WIDE)
    both = torch.einsum("tjp,srp->tjsr", mask * shown, bank)
    drawn = torch.einsum("tjp,srp->tjsr", shown, bank.square())
    either = (mask.square() * shown).sum(-1)[:, :, None, None] + drawn - both
    best = (both / either.clamp(min=1)).amax(dim=1).max(dim=-1)
    return best.values, best.indices * (2 * math.pi / ROTATIONS)


@functools.cache
def outline_bank() -> Tensor:
    """Draw every shape at every rotation, centred and of one area: [9, ROTATIONS, GRID, GRID] in [0, 1]."""
    step = _SPAN * 2 / GRID
    line = (torch.arange(GRID) + 0.5) * step - _SPAN
    turn = torch.arange(ROTATIONS) * (2 * math.pi / ROTATIONS)
    cosine, sine = turn.cos()[:, None, None], turn.sin()[:, None, None]
    bank = []
    for index, (area, centre_u, centre_v) in enumerate(_moments().tolist()):
        root = math.sqrt(area)
        y, x = line[:, None] * root, line[None, :] * root
        u, v = x * cosine + y * sine + centre_u, y * cosine - x * sine + centre_v
        edge = distance(torch.tensor([index]), u[None], v[None])[0] / root
        bank.append((0.5 - edge / step).clamp(0, 1))
    return torch.stack(bank)


def shape_areas() -> Tensor:
    """Return the area [9] of every shape at radius 1."""
    return _moments()[:, 0]


@functools.cache
def _moments() -> Tensor:
    """Return area and centroid (u, v) of every shape at radius 1: [9, 3]."""
    line = (torch.arange(256) + 0.5) / 128 * 1.3 - 1.3
    v, u = torch.meshgrid(line, line, indexing="ij")
    rows = []
    for index in range(len(SHAPES)):
        inside = distance(torch.tensor([index]), u[None, None], v[None, None])[0, 0] < 0
        rows.append(torch.stack([inside.float().mean() * 2.6**2, u[inside].mean(), v[inside].mean()]))
    return torch.stack(rows)


def centroids(masks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return x, y in pixels and the area in pixels, each [T], of bool masks [T, H, W]; x = y = 0 for an empty one."""
    area = masks.sum(dim=(1, 2)).float()
    rows = torch.arange(masks.shape[1]) + 0.5
    columns = torch.arange(masks.shape[2]) + 0.5
    y = (masks.sum(dim=2) * rows).sum(1) / area.clamp(min=1)
    x = (masks.sum(dim=1) * columns).sum(1) / area.clamp(min=1)
    return x, y, area


def _centred(masks: Tensor, hidden: Tensor, jitters: tuple[Sequence[float], Sequence[float]]) -> tuple[Tensor, Tensor]:
    """Sample masks [T, H, W] and what is not hidden around the centroids: two of [T, jitters, GRID * GRID].

    `jitters` holds scales and shifts in roots of the area; every scale goes with every shift down and across.
    """
    height, width = masks.shape[1:]
    x, y, area = centroids(masks)
    line = (torch.arange(GRID) + 0.5) / GRID * 2 * _SPAN - _SPAN
    scales, shifts = (torch.tensor(values) for values in jitters)
    scale, down, across = (value.reshape(1, -1, 1) for value in torch.meshgrid(scales, shifts, shifts, indexing="ij"))
    root = area.sqrt()[:, None, None]
    rows = (y[:, None, None] + root * (line * scale + down)) / height * 2 - 1  # [T, jitters, GRID]
    columns = (x[:, None, None] + root * (line * scale + across)) / width * 2 - 1
    columns, rows = torch.broadcast_tensors(columns[:, :, None, :], rows[:, :, :, None])
    grid = torch.stack([columns, rows], dim=-1).flatten(1, 2)
    layers = torch.stack([masks, ~hidden], dim=1).float()
    # Zeros beyond the frame: nothing is shown there.
    sampled = F.grid_sample(layers, grid, align_corners=False, padding_mode="zeros")
    mask, shown = sampled.reshape(len(masks), 2, -1, GRID * GRID).unbind(1)
    return mask, shown


def _eroded(mask: Tensor, reach: int) -> Tensor:
    """Erode a bool mask [T, H, W] by `reach` pixels; what lies outside the frame counts as inside."""
    size = 2 * reach + 1
    return F.max_pool2d((~mask).float()[:, None], size, stride=1, padding=reach)[:, 0] < 0.5
