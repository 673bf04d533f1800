"""Space-filling curves over a box of tokens: each returns raster indices int64 [tokens] in the order of the curve."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

Place = tuple[int, ...]  # coordinates, sizes or bits, one per axis


def morton(shape: Place) -> Tensor:
    """Follow the Z-order curve: the bits of the coordinates interleaved, the last axis fastest."""
    return torch.argsort(_interleave(_coordinates(shape)), stable=True)


def hilbert(shape: Place) -> Tensor:
    """Follow the Hilbert curve of the enclosing power-of-two cube, leaving out the places beyond the box.

    Axes of size 1 do not count: an image gets the 2-D curve. On a power-of-two cube consecutive places are
    neighbours; elsewhere the curve leaves the box and comes back somewhere else.

    Paper: Programming the Hilbert curve (J. Skilling, AIP Conf. Proc. 707, 2004): from axes to the transposed index.
    """
    axes = [axis for axis, size in zip(_coordinates(shape), shape, strict=True) if size > 1]
    if not axes:
        return torch.zeros(1, dtype=torch.int64)
    top = (max(shape) - 1).bit_length() - 1
    # From the largest cube to the smallest, undo what turned it: inverted bits of the first axis, or a swap with it.
    for bit in range(top, 0, -1):
        below = (1 << bit) - 1
        for i, axis in enumerate(axes):
            far = (axis >> bit & 1).bool()
            swapped = torch.where(far, 0, (axes[0] ^ axis) & below)
            axes[i] = axis ^ swapped
            axes[0] = axes[0] ^ torch.where(far, below, swapped)
    for i in range(1, len(axes)):  # the Gray code of each octant's number
        axes[i] = axes[i] ^ axes[i - 1]
    flips = torch.zeros_like(axes[0])
    for bit in range(top, 0, -1):
        flips ^= (axes[-1] >> bit & 1) * ((1 << bit) - 1)
    return torch.argsort(_interleave([axis ^ flips for axis in axes]), stable=True)


def gilbert(shape: Place) -> Tensor:
    """Follow a Hilbert-like curve made for this very box, so that consecutive places are neighbours.

    The box is halved along some of its axes, the longest ones first, and its parts are chained so that each touches
    the next; each part is walked from a corner to a corner in the same way. Which axes, chain and corners: the first
    ones that go the shortest way, found once per size of part. No box tried so far (all up to 8x8x8, and drawn ones up
    to 100 an axis) needed a step to a place that is no neighbour.
    """
    walks = _Walks()
    # The best corner to end at is one that closes the walk along the longest axis, as the Hilbert curve does.
    goals = [ends for ends in itertools.product((0, 1), repeat=len(shape)) if _is_corner(shape, ends)]
    goals.sort(key=lambda ends: (sum(ends), -sum(n * e for n, e in zip(shape, ends, strict=True))))
    place = walks.places(shape, min(goals, key=lambda ends: walks.detour(shape, ends)))
    index = torch.zeros(len(place), dtype=torch.int64)
    for axis, size in enumerate(shape):
        index = index * size + place[:, axis]
    return index


def strips(shape: tuple[int, int, int], strip: tuple[int, int]) -> Tensor:
    """Walk bars of about `strip` (frames, rows) that span the columns, each in the opposite direction of the last one.

    Frames and rows are cut in equal parts (to one), whose number is the nearest. A bar is walked cross-section by
    cross-section, these to and fro as well: all steps within a bar go to a neighbour, and those to the next bar are
    no longer than its frames and rows together.
    """
    frame, row, column = _coordinates(shape)
    slab, _ = _part(frame, shape[0], strip[0])
    bar, bars = _part(row, shape[1], strip[1])
    place = slab
    for index, size in ((bar, bars), (column, shape[2]), (frame, shape[0]), (row, shape[1])):
        # Where what came before has an odd number, this axis is walked backwards.
        place = place * size + torch.where(place % 2 == 1, size - 1 - index, index)
    return torch.argsort(place)


@dataclass(frozen=True)
class _Part:
    """Hold one box of a chain: low corner, sizes, and the places where the walk enters and leaves it."""

    low: Place
    sizes: Place
    start: Place
    end: Place

    @property
    def ends(self) -> Place:
        return tuple(int(a != b) for a, b in zip(self.start, self.end, strict=True))


@dataclass(frozen=True)
class _Walk:
    """Hold how to walk a box: `detour` is what the way is longer than one per step, 0 when all are neighbours."""

    detour: int
    parts: tuple[_Part, ...]


class _Walks:
    """Find walks through boxes, from the corner 0 to the corner `ends` (per axis 1: the far side), each size once."""

    def __init__(self) -> None:
        self._walks: dict[tuple[Place, Place], _Walk] = {}
        self._places: dict[tuple[Place, Place], Tensor] = {}

    def detour(self, sizes: Place, ends: Place) -> int:
        return self._walk(*_longest_first(sizes, ends)[:2]).detour

    def places(self, sizes: Place, ends: Place) -> Tensor:
        """Return the coordinates along the walk, int64 [places, axes]."""
        sizes, ends, column = _longest_first(sizes, ends)
        if (sizes, ends) not in self._places:
            parts = [torch.zeros(1, len(sizes), dtype=torch.int64)] if sizes[0] == 1 else []
            for part in self._walk(sizes, ends).parts:
                walk, low = self.places(part.sizes, part.ends), torch.tensor(part.low)
                mirrored = torch.tensor(part.start) > low
                parts.append(low + torch.where(mirrored, torch.tensor(part.sizes) - 1 - walk, walk))
            self._places[sizes, ends] = torch.cat(parts)
        return self._places[sizes, ends][:, column]

    def _walk(self, sizes: Place, ends: Place) -> _Walk:
        if sizes[0] == 1:
            return _Walk(0, ())
        if (sizes, ends) not in self._walks:
            # As on a chessboard a step to a neighbour changes the colour: the two ends tell if one must be longer.
            way = sum((n - 1) * e for n, e in zip(sizes, ends, strict=True))
            least = (math.prod(sizes) - 1 - way) % 2
            best: _Walk | None = None
            for cut, chain in _chains(sizes, ends):
                found = self._cross(sizes, cut, chain, ends)
                if best is None or found.detour < best.detour:
                    best = found
                if best.detour == least:
                    break
            assert best is not None
            self._walks[sizes, ends] = best
        return self._walks[sizes, ends]

    def _cross(self, sizes: Place, cut: Place, chain: tuple[Place, ...], ends: Place) -> _Walk:
        """Choose where the walk enters and leaves each part of a chain for the shortest way."""
        goal = tuple((n - 1) * e for n, e in zip(sizes, ends, strict=True))
        exits: dict[Place, _Walk] = {}
        for number, bits in enumerate(chain):
            low = tuple(c * b for c, b in zip(cut, bits, strict=True))
            part = tuple(n - c if b else c or n for n, c, b in zip(sizes, cut, bits, strict=True))
            corners = _corners(low, part)
            entries = _enter(exits, corners) if number else {low: _Walk(0, ())}
            exits = {}
            for start, before in entries.items():
                for end in corners if number + 1 < len(chain) else [goal]:
                    if (start == end) != (max(part) == 1):
                        continue
                    step = _Part(low, part, start, end)
                    detour = before.detour + self.detour(part, step.ends)
                    if end not in exits or detour < exits[end].detour:
                        exits[end] = _Walk(detour, (*before.parts, step))
        return exits[goal]


def _enter(exits: dict[Place, _Walk], corners: list[Place]) -> dict[Place, _Walk]:
    """Go on from the places where one part can be left to each corner of the next."""
    entries: dict[Place, _Walk] = {}
    for corner in corners:
        for end, walk in exits.items():
            detour = walk.detour + sum(abs(a - b) for a, b in zip(end, corner, strict=True)) - 1
            if corner not in entries or detour < entries[corner].detour:
                entries[corner] = _Walk(detour, walk.parts)
    return entries


def _corners(low: Place, sizes: Place) -> list[Place]:
    return list(itertools.product(*((at, at + n - 1) if n > 1 else (at,) for at, n in zip(low, sizes, strict=True))))


def _is_corner(sizes: Place, ends: Place) -> bool:
    """Say whether `ends` names a corner other than 0 (0 itself in a box of one place), an axis of size 1 as 0."""
    return any(ends) == (max(sizes) > 1) and all(n > 1 or not e for n, e in zip(sizes, ends, strict=True))


def _longest_first(sizes: Place, ends: Place) -> tuple[Place, Place, list[int]]:
    """Sort the axes by size; return sizes, ends, and the column of each axis in the sorted ones."""
    order = sorted(range(len(sizes)), key=lambda axis: (-sizes[axis], -ends[axis]))
    return tuple(sizes[a] for a in order), tuple(ends[a] for a in order), [order.index(a) for a in range(len(sizes))]


def _chains(sizes: Place, ends: Place) -> Iterator[tuple[Place, tuple[Place, ...]]]:
    """Yield ways to halve a box: where each axis is cut (0: not), and the parts (per axis 0 or 1) as a chain.

    Cuts in the middle come before cuts beside it, then those that leave the shortest longest side, in few parts.
    """
    axes = [axis for axis, size in enumerate(sizes) if size > 1]
    ways = []
    for off in (0, 1):
        for count in range(1, len(axes) + 1):
            for chosen in itertools.combinations(axes, count):
                cut = tuple(max(1, n // 2 - off) if a in chosen else 0 for a, n in enumerate(sizes))
                longest = max(n - c for n, c in zip(sizes, cut, strict=True))
                ways.append((off, longest, count, cut))
    for _, _, _, cut in sorted(ways):
        last = tuple(e if c else 0 for e, c in zip(ends, cut, strict=True))
        for chain in _gray_paths(((0,) * len(cut),), cut):
            if chain[-1] == last:
                yield cut, chain


def _gray_paths(path: tuple[Place, ...], cut: Place) -> Iterator[tuple[Place, ...]]:
    """Yield every continuation of `path` through all parts, each differing from the next in one cut axis."""
    if len(path) == 1 << sum(c > 0 for c in cut):
        yield path
    for axis, at in enumerate(cut):
        after = tuple(1 - b if a == axis else b for a, b in enumerate(path[-1]))
        if at and after not in path:
            yield from _gray_paths((*path, after), cut)


def _part(index: Tensor, size: int, part: int) -> tuple[Tensor, int]:
    """Return in which part each index of an axis lies, and how many parts there are: equal to one, of about `part`."""
    parts = max(1, (2 * size + part) // (2 * part))
    return index * parts // size, parts


def _coordinates(shape: Place) -> list[Tensor]:
    return [axis.flatten() for axis in torch.meshgrid(*(torch.arange(n) for n in shape), indexing="ij")]


def _interleave(axes: list[Tensor]) -> Tensor:
    """Weave the bits of the coordinates into one number: of equal bits that of the first axis counts most."""
    code = torch.zeros_like(axes[0])
    for bit in range(int(torch.stack(axes).max()).bit_length()):
        for place, axis in enumerate(reversed(axes)):
            code |= (axis >> bit & 1) << (len(axes) * bit + place)
    return code
