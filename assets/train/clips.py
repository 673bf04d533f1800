"""Procedural captioned clips: clip `index` of `seed` is a function of the two numbers alone.

An integer hash draws every parameter, so any device, batch split or resolution gives the same scene. What each
ingredient asks of attention: textured moving objects (local windows, diagonals that follow motion), camera pans
(whole-frame alignment), pan-away-and-back and occluders (long memory), mirrored twins and common blinking (far,
content-addressed), light changes (dense rows).
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dit_sparse.assets.train.words import (
    BACKGROUNDS,
    CAMERAS,
    COLOURS,
    MOTIONS,
    PAD,
    SHAPES,
    TEXTURES,
    UNKNOWN,
    vocabulary,
)

CLIP_FRAMES = 33  # frame i shows time i / 32: a whole clip runs over the unit of time
CAPTION_TOKENS = 64
OBJECTS = 3

_MASK32 = 0xFFFFFFFF


@dataclass(frozen=True)
class Scene:
    """The parameters of B clips; object fields are [B, OBJECTS], the rest [B]."""

    count: Tensor  # objects shown, 1..OBJECTS
    twin: Tensor  # bool: object 1 mirrors object 0
    shape: Tensor
    texture: Tensor
    motion: Tensor
    colour: Tensor
    radius: Tensor  # in half frame heights
    x: Tensor
    y: Tensor
    reach: Tensor  # how far the motion goes
    rate: Tensor  # turns per second, signed
    phase: Tensor
    background: Tensor
    background_colours: Tensor  # [B, 2]
    background_angle: Tensor
    background_waves: Tensor  # [B, 5, 3] direction x, direction y, phase
    camera: Tensor
    camera_speed: Tensor
    blink: Tensor  # bool
    light: Tensor  # bool
    bar: Tensor  # bool
    bar_vertical: Tensor  # bool
    bar_colour: Tensor
    bar_centre: Tensor
    bar_width: Tensor
    phrasing: Tensor  # [B, 8] uniform numbers that choose among equivalent captions

    def __len__(self) -> int:
        return self.count.shape[0]


@functools.cache
def constant(values: tuple, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a tensor of these numbers, copied to the device once and kept.

    Copies cannot be captured in CUDA graphs, and graphs read these tensors again for as long as they live.
    """
    return torch.tensor(values, dtype=dtype, device=device)


def scene(seed: int, index: Tensor) -> Scene:
    """Draw the parameters of the clips `index` [B] of `seed`."""
    key = _mix(_mix(torch.full_like(index, seed) & _MASK32) ^ (index & _MASK32))
    key = _mix(key + (index >> 32))

    def uniform(stream: int, *shape: int) -> Tensor:
        size = math.prod(shape)
        lane = torch.arange(size, device=index.device) + stream * 1024
        bits = _mix(key[:, None] ^ _mix(lane)[None])
        return ((bits >> 8).float() / (1 << 24)).reshape(len(index), *shape)

    def weighted(stream: int, table: dict[str, int], *shape: int) -> Tensor:
        edges = constant(tuple(table.values()), torch.long, index.device).cumsum(0)
        return torch.searchsorted(edges, (uniform(stream, *shape) * edges[-1]).long(), right=True)

    count_draw, twin_draw = uniform(0, 1)[:, 0], uniform(1, 1)[:, 0]
    count = 1 + (count_draw > 0.60).long() + (count_draw > 0.88).long()
    twin = (count >= 2) & (twin_draw < 0.35)
    # One permutation gives every part of a clip its own colour: nothing vanishes into its background.
    palette = uniform(2, len(COLOURS)).argsort(dim=1, stable=True)

    radius = 0.20 + 0.12 * uniform(3, OBJECTS)
    radius[:, 0] += torch.full_like(radius[:, 0], 0.06).masked_fill(count == 1, 0.13)
    spread, turn = uniform(4, OBJECTS), uniform(5, 1) * (2 * math.pi)
    angle = turn + torch.arange(OBJECTS, device=index.device) * (2 * math.pi) / count[:, None]
    distance = torch.where(count[:, None] == 1, 0.30 * spread, 0.45 + 0.15 * spread)
    x, y = distance * angle.cos(), distance * angle.sin()
    motion = weighted(6, MOTIONS, OBJECTS)
    spin = torch.ones_like(radius).masked_fill(uniform(7, OBJECTS) < 0.5, -1.0)
    fields = {
        "shape": (uniform(8, OBJECTS) * len(SHAPES)).long(),
        "texture": weighted(9, TEXTURES, OBJECTS),
        "motion": motion,
        "colour": palette[:, 2 : 2 + OBJECTS].clone(),
        "radius": radius,
        "reach": 0.5 + 0.5 * uniform(10, OBJECTS),
        "rate": spin * (0.75 + 0.5 * uniform(11, OBJECTS)),
        "phase": uniform(12, OBJECTS) * (2 * math.pi),
    }
    for value in fields.values():
        value[:, 1] = torch.where(twin, value[:, 0], value[:, 1])
    away = 0.42 + 0.15 * spread[:, 0]
    x[:, 0], x[:, 1] = torch.where(twin, -away, x[:, 0]), torch.where(twin, away, x[:, 1])
    y[:, 0] = torch.where(twin, 0.4 * (spread[:, 1] - 0.5), y[:, 0])
    y[:, 1] = torch.where(twin, y[:, 0], y[:, 1])
    flags = uniform(13, 4)
    return Scene(
        count=count.masked_fill(twin, 2),
        twin=twin,
        x=x,
        y=y,
        background=weighted(14, BACKGROUNDS, 1)[:, 0],
        background_colours=palette[:, :2],
        background_angle=uniform(15, 1)[:, 0] * (2 * math.pi),
        background_waves=uniform(16, 5, 3) * 2 - 1,
        camera=weighted(17, CAMERAS, 1)[:, 0],
        camera_speed=0.7 + 0.6 * uniform(18, 1)[:, 0],
        blink=flags[:, 0] < 0.10,
        light=flags[:, 1] < 0.10,
        bar=flags[:, 2] < 0.15,
        bar_vertical=flags[:, 3] < 0.5,
        bar_colour=palette[:, 2 + OBJECTS],
        bar_centre=uniform(19, 1)[:, 0] * 0.8 - 0.4,
        bar_width=0.10 + 0.10 * uniform(20, 1)[:, 0],
        phrasing=uniform(21, 8),
        **fields,
    )


def caption_ids(clips: Scene) -> Tensor:
    """Return the token ids [B, CAPTION_TOKENS] of the captions, padded with 0."""
    device, batch = clips.count.device, len(clips)
    ids = vocabulary()
    none = torch.zeros(batch, dtype=torch.long, device=device)

    def word(text: str, shown: Tensor) -> Tensor:
        return none.masked_fill(shown, ids[text])

    def look(texts: list[str], which: Tensor, shown: Tensor) -> Tensor:
        table = constant(tuple(ids.get(text, 0) for text in texts), torch.long, device)
        return torch.where(shown, table[which], none)

    always = clips.count > 0
    first_words, second_words = _split_phrases(MOTIONS)
    slots: list[Tensor] = []
    for k in range(OBJECTS):
        shown = (clips.count > k) & ~(clips.twin if k == 1 else torch.zeros_like(clips.twin))
        paired = clips.twin if k == 0 else torch.zeros_like(clips.twin)
        groups = clips.count.masked_fill(clips.twin, 1)
        say_motion = shown & ~((clips.motion[:, k] == 0) & (clips.phrasing[:, 0] < 0.5))
        one_word = constant(tuple(word == "" for word in second_words), torch.bool, device)[clips.motion[:, k]]
        ahead = say_motion & one_word & (clips.phrasing[:, 1] < 0.35)
        say_texture = shown & ((clips.texture[:, k] != 0) | (clips.phrasing[:, 2] < 0.3))
        bare_orange = (clips.colour[:, k] == list(COLOURS).index("orange")) & ~say_texture & ~ahead
        slots += [
            word(",", shown & (groups == 3) & (k == 1)),
            word("and", shown & (groups == k + 1) & (k > 0)),
            word("a", shown & ~paired & ~bare_orange),
            word("an", shown & ~paired & bare_orange),
            word("two", paired),
            word("mirrored", paired),
            look(first_words, clips.motion[:, k], ahead),
            look(list(TEXTURES), clips.texture[:, k], say_texture),
            look(list(COLOURS), clips.colour[:, k], shown),
            look(list(SHAPES), clips.shape[:, k], shown & ~paired),
            look(list(SHAPES.values()), clips.shape[:, k], paired),
            look(first_words, clips.motion[:, k], say_motion & ~ahead),
            look(second_words, clips.motion[:, k], say_motion & ~ahead),
        ]
    plain = clips.background == 0
    say_plain = ~plain | (clips.phrasing[:, 3] < 0.5)
    orange_first = plain & ~say_plain & (clips.background_colours[:, 0] == list(COLOURS).index("orange"))
    slots += [
        word("on", always),
        word("a", ~orange_first),
        word("an", orange_first),
        look(list(BACKGROUNDS), clips.background, say_plain),
        look(list(COLOURS), clips.background_colours[:, 0], always),
        word("and", ~plain),
        look(list(COLOURS), clips.background_colours[:, 1], ~plain),
        word("background", always),
    ]
    say_camera = (clips.camera != 0) | (clips.phrasing[:, 4] < 0.3)
    slots += [word(",", say_camera), word("camera", say_camera)]
    for texts in _split_phrases(CAMERAS, parts=4):
        slots.append(look(texts, clips.camera, say_camera))
    slots += [word(",", clips.bar), word("behind", clips.bar)]
    orange_bar = clips.bar & (clips.bar_colour == list(COLOURS).index("orange"))
    slots += [
        word("a", clips.bar & ~orange_bar),
        word("an", orange_bar),
        look(list(COLOURS), clips.bar_colour, clips.bar),
        look(["horizontal", "vertical"], clips.bar_vertical.long(), clips.bar),
        word("bar", clips.bar),
        *(word(text, clips.blink) for text in (",", "blinking")),
        *(word(text, clips.light) for text in (",", "changing", "light")),
    ]
    table = torch.stack(slots, dim=1)
    order = (table == 0).to(torch.int8).argsort(dim=1, stable=True)
    return table.gather(1, order)[:, :CAPTION_TOKENS]


def captions(clips: Scene) -> list[str]:
    """Return the captions as text, spelled from `caption_ids`."""
    spelling = [word for word in vocabulary() if word not in (PAD, UNKNOWN)]
    rows = caption_ids(clips).tolist()
    return [" ".join(spelling[i - 2] for i in row if i).replace(" ,", ",") for row in rows]


def _split_phrases(phrases: dict[str, int], parts: int = 2) -> list[list[str]]:
    padded = [(phrase.split() + [""] * parts)[:parts] for phrase in phrases]
    return [[words[i] for words in padded] for i in range(parts)]


def _mix(x: Tensor) -> Tensor:
    """Hash 32-bit numbers held in int64 (xor-shift-multiply; constants of Chris Wellons' lowbias32)."""
    x = x & _MASK32
    x = ((x ^ (x >> 16)) * 0x21F0AAAD) & _MASK32
    x = ((x ^ (x >> 15)) * 0x735A2D97) & _MASK32
    return x ^ (x >> 15)
