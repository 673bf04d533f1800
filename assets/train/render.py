"""Draw procedural clips: Scene -> pixels, at any size, on the scene's device."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dit_sparse.assets.train.clips import CLIP_FRAMES, OBJECTS, Scene, constant
from dit_sparse.assets.train.words import BACKGROUNDS, CAMERAS, COLOURS, MOTIONS, SHAPES, TEXTURES


def render(clips: Scene, frames: int, height: int, width: int) -> Tensor:
    """Return pixels [B, 3, frames, height, width] in [-1, 1]; frame i shows time i / 32."""
    device = clips.count.device
    time = torch.arange(frames, device=device) / (CLIP_FRAMES - 1)
    time = time[None, :, None, None]
    rows = (torch.arange(height, device=device) + 0.5) / height * 2 - 1
    columns = ((torch.arange(width, device=device) + 0.5) / width * 2 - 1) * (width / height)
    screen_y, screen_x = rows[:, None], columns[None, :]
    world_x, world_y, zoom = _camera(clips, time, screen_x, screen_y)
    pixel = zoom * (2 / height)

    palette = constant(tuple(COLOURS.values()), torch.float32, device)
    image = _background(clips, palette, world_x, world_y)
    for k in reversed(range(OBJECTS)):
        colour, alpha = _object(clips, k, palette, time, world_x, world_y, pixel)
        image = image + (colour - image) * alpha[:, None]
    across = torch.where(_wide(clips.bar_vertical), screen_x, screen_y)
    bar = (0.5 + (_wide(clips.bar_width) - (across - _wide(clips.bar_centre)).abs()) * height / 2).clamp(0, 1)
    bar = (bar * _wide(clips.bar))[:, None]
    image = image + (palette[clips.bar_colour][:, :, None, None, None] - image) * bar
    dim = 1 - _wide(clips.light) * 0.45 * (0.5 - 0.5 * torch.cos(2 * math.pi * time))
    return (image * dim[:, None]).clamp(0, 1) * 2 - 1


def _wide(value: Tensor) -> Tensor:
    return value[:, None, None, None] if value.dtype == torch.bool else value.float()[:, None, None, None]


def _is(value: Tensor, table: dict[str, int], *names: str) -> Tensor:
    places = constant(tuple(list(table).index(name) for name in names), torch.long, value.device)
    return _wide((value[:, None] == places).any(dim=1).float())


def _camera(clips: Scene, time: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    def on(*names: str) -> Tensor:
        return _is(clips.camera, CAMERAS, *names) * _wide(clips.camera_speed)

    centred = time - 0.5
    back = torch.sin(math.pi * time)
    pan_x = (on("panning right") - on("panning left")) * centred * 0.9 + on("panning away and back") * back
    pan_y = (on("panning down") - on("panning up")) * centred * 0.9
    zoom = torch.exp((on("zooming out") - on("zooming in")) * centred * 0.7)
    angle = on("rotating") * centred * 1.2
    cosine, sine = angle.cos(), angle.sin()
    return (x * cosine - y * sine) * zoom + pan_x, (x * sine + y * cosine) * zoom + pan_y, zoom


def _background(clips: Scene, palette: Tensor, x: Tensor, y: Tensor) -> Tensor:
    cosine, sine = _wide(clips.background_angle.cos()), _wide(clips.background_angle.sin())
    along = x * cosine + y * sine
    waves = clips.background_waves
    clouds = torch.zeros_like(x)
    for i in range(waves.shape[1]):
        inner = (_wide(waves[:, i, 0]) * x + _wide(waves[:, i, 1]) * y) * (2.0 + i)
        clouds = clouds + torch.sin(inner + math.pi * _wide(waves[:, i, 2])) * (1.2 - 0.15 * i)
    mixes = {
        "plain": torch.full_like(x, -1.0),
        "gradient": along,
        "striped": (torch.sin(7 * along) * 5).clamp(-1, 1),
        "checkered": (torch.sin(5 * x + 0.6) * torch.sin(5 * y + 0.6) * 6).clamp(-1, 1),
        "cloudy": clouds * 0.8,
    }
    share = torch.zeros_like(x)
    for name, mix in mixes.items():
        share = share + _is(clips.background, BACKGROUNDS, name) * (mix.clamp(-1, 1) * 0.5 + 0.5)
    ends = palette[clips.background_colours]  # [B, 2, 3]
    first, second = ends[:, 0, :, None, None, None], ends[:, 1, :, None, None, None]
    return first + (second - first) * share[:, None]


def _object(
    clips: Scene, k: int, palette: Tensor, time: Tensor, world_x: Tensor, world_y: Tensor, pixel: Tensor
) -> tuple[Tensor, Tensor]:
    def on(*names: str) -> Tensor:
        return _is(clips.motion[:, k], MOTIONS, *names)

    reach, rate, phase = (_wide(value[:, k]) for value in (clips.reach, clips.rate, clips.phase))
    theta = 2 * math.pi * rate * time + phase
    centred = time - 0.5
    drift = 1.3 * reach * centred
    swing = 0.9 * torch.sin(theta)
    # Image rows grow downward, so "up" is negative y.
    shift_x = (on("drifting right") - on("drifting left")) * drift + on("circling") * 0.4 * theta.cos()
    shift_x = shift_x + on("swinging") * 0.6 * torch.sin(swing) + on("bouncing") * 0.4 * rate * centred
    shift_y = (on("drifting down") - on("drifting up")) * drift + on("circling") * 0.4 * theta.sin()
    shift_y = shift_y + on("swinging") * 0.6 * (torch.cos(swing) - 0.8)
    shift_y = shift_y + on("bouncing") * (0.4 - 0.9 * reach * torch.sin(theta).abs())
    size = on("pulsing") * 0.35 * torch.sin(2 * theta) + (on("growing") - on("shrinking")) * centred
    radius = _wide(clips.radius[:, k]) * (1 + size)
    turn = on("spinning") * theta - on("swinging") * swing

    x = world_x - (_wide(clips.x[:, k]) + shift_x)
    if k == 1:  # a twin moves as the mirror image of object 0
        mirrored = _wide(clips.twin)
        x = torch.where(mirrored, -world_x - (_wide(clips.x[:, 0]) + shift_x), x)
    y = world_y - (_wide(clips.y[:, k]) + shift_y)
    cosine, sine = turn.cos() / radius, turn.sin() / radius
    u, v = x * cosine + y * sine, y * cosine - x * sine

    edge = distance(clips.shape[:, k], u, v) * radius
    alpha = (0.5 - edge / pixel).clamp(0, 1) * _wide(clips.count > k)
    flat = palette[clips.colour[:, k]]
    # The second tone of a texture goes toward white on dark colours and toward black on light ones.
    toward = (flat.mean(dim=1, keepdim=True) < 0.3).float()
    tone = _texture(clips.texture[:, k], u, v)[:, None]
    base = flat[:, :, None, None, None]
    colour = base + (toward[:, :, None, None, None] - base) * tone * 0.6
    dark = (torch.sin(4 * math.pi * time + _wide(clips.phase[:, 0])) > 0).float() * _wide(clips.blink)
    return colour * (1 - 0.7 * dark)[:, None], alpha


def _texture(texture: Tensor, u: Tensor, v: Tensor) -> Tensor:
    stripes = (torch.sin(7 * u) * 4).clamp(-1, 1) * 0.5 + 0.5
    dots = (torch.cos(6 * u) * torch.cos(6 * v) * 8 - 3).clamp(-1, 1) * 0.5 + 0.5
    shade = (0.5 + 0.5 * (u + v) / 1.4).clamp(0, 1)
    tones = {"striped": stripes, "dotted": dots, "shaded": shade}
    result = torch.zeros_like(u)
    for name, tone in tones.items():
        result = result + _is(texture, TEXTURES, name) * tone
    return result


def distance(shape: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """Return the signed distance to the outline (negative inside), in object radii."""
    radial = (u * u + v * v + 1e-9).sqrt()
    polar = torch.atan2(v, u)
    au, av = u.abs(), v.abs()
    third = torch.remainder(polar + math.pi / 2, 2 * math.pi / 3) - math.pi / 3
    fifth = (torch.remainder(polar + math.pi / 2 + math.pi / 5, 2 * math.pi / 5) - math.pi / 5).abs()
    # One edge of the star runs from its tip (1.15, 0) to the notch at radius .5; the normal points outward.
    notch_x, notch_y = 0.5 * math.cos(math.pi / 5), 0.5 * math.sin(math.pi / 5)
    length = math.hypot(1.15 - notch_x, notch_y)
    star = ((radial * fifth.cos() - 1.15) * notch_y + radial * fifth.sin() * (1.15 - notch_x)) / length
    lobe = (torch.sqrt((au - 0.4) ** 2 + (v + 0.25) ** 2 + 1e-9)) - 0.566
    outlines = {
        "circle": radial - 0.95,
        "square": torch.maximum(au, av) - 0.85,
        "triangle": radial * third.cos() - 0.58,
        "star": star,
        "heart": torch.minimum(lobe, (au + (v - 0.15).abs() - 0.8) * 0.7071),
        "ring": (radial - 0.72).abs() - 0.26,
        "cross": torch.minimum(torch.maximum(au - 0.36, av - 1), torch.maximum(au - 1, av - 0.36)),
        "flower": (radial - 0.76 - 0.22 * torch.cos(6 * polar)) * 0.8,
        "moon": torch.maximum(radial - 1, 0.82 - ((u - 0.5) ** 2 + v * v + 1e-9).sqrt()),
    }
    result = torch.zeros_like(u)
    for index, name in enumerate(SHAPES):
        result = result + _wide(shape == index) * outlines[name]
    return result
