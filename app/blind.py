"""The blind test: two clips, which is the dense one? What a visitor's page gets does not tell."""

from __future__ import annotations

import math
import os
import random
import secrets
import struct
import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist

SIDES = ("left", "right")
CONFIDENCE = 0.95
MOST_QUESTIONS = 200  # whose clips are kept; the oldest go first
SAME_TIME = (0, 0)  # of last access and change of every copy: a server tells them
BOX_HEADER_BYTES, MOST_SPARE_BYTES = 8, 4096


@dataclass(frozen=True)
class Question:
    """Hold what a page may know: a key to answer with, and the clips to show on either side."""

    key: str
    left: Path
    right: Path


@dataclass(frozen=True)
class Answer:
    """Tell whether a vote was right, on which side the dense clip was, and all votes on the same plan."""

    right: bool
    dense_side: str
    tally: Tally


@dataclass(frozen=True)
class Tally:
    """Count votes, and those that named the dense clip."""

    votes: int = 0
    right: int = 0

    @property
    def wrong(self) -> int:
        return self.votes - self.right

    def interval(self) -> tuple[float, float]:
        """Return Wilson's 95 % score interval of the share of right votes; everything is possible without any."""
        if not self.votes:
            return 0.0, 1.0
        z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
        share, weight = self.right / self.votes, z * z / self.votes
        middle = (share + weight / 2) / (1 + weight)
        half = z * math.sqrt(share * (1 - share) / self.votes + weight / (4 * self.votes)) / (1 + weight)
        return max(0.0, middle - half), min(1.0, middle + half)

    def sentence(self) -> str:
        """Say what the votes show; more than guessing only where the interval excludes a half."""
        if not self.votes:
            return "No votes yet."
        low, high = self.interval()
        found = f"{self.right} of {self.votes} right ({self.right / self.votes:.0%}; 95 %: {low:.0%} to {high:.0%})"
        if low > 0.5:
            return f"{found}: more than guessing."
        if high < 0.5:
            return f"{found}: less than guessing; the clips are told apart, and the sparse one is taken for dense."
        return f"{found}: no more than guessing would give."


@dataclass(frozen=True)
class _Open:
    about: str
    dense_side: str
    files: tuple[Path, Path]
    answered: bool = False


class BlindTest:
    """Ask visitors which clip is dense and count their votes, in memory; any thread may call.

    folder: where copies of clips go, of the app's own. seed: draws the sides; None draws the seed itself. Clips of
    the oldest questions are removed, and all of them by `close`. Whoever compares the pictures with clips that the page
    shows by name elsewhere can tell them apart.
    """

    def __init__(self, folder: Path, seed: int | None = None) -> None:
        self._folder, self._lock = folder, threading.Lock()
        self._sides = random.Random(secrets.randbits(128) if seed is None else seed)
        self._questions: OrderedDict[str, _Open] = OrderedDict()
        self._tallies: dict[str, Tally] = {}

    def ask(self, dense: Path, sparse: Path, about: str) -> Question:
        """Copy both clips under random names and draw a side for the dense one; votes count for `about`, the plan.

        Raises:
            OSError: a clip cannot be read or its copy not written.
        """
        hidden = hidden_copies((dense, sparse), self._folder)
        with self._lock:
            dense_side = self._sides.choice(SIDES)
            key = secrets.token_urlsafe(16)
            self._questions[key] = _Open(about, dense_side, (hidden[0], hidden[1]))
            while len(self._questions) > MOST_QUESTIONS:
                _, oldest = self._questions.popitem(last=False)
                _remove(oldest.files)
        left, right = hidden if dense_side == "left" else reversed(hidden)
        return Question(key, left, right)

    def forget(self, key: str) -> None:
        """Remove the clips of a question that nobody looks at any more."""
        with self._lock:
            found = self._questions.pop(key, None)
        if found is not None:
            _remove(found.files)

    def vote(self, key: str, side: str) -> Answer:
        """Count a visitor's answer, once for each question, and tell the right one.

        Raises:
            ValueError: no such side, a question that was answered before, or one that is not known any more.
        """
        if side not in SIDES:
            raise ValueError(f"side must be one of {', '.join(SIDES)}, got {side!r}")
        with self._lock:
            found = self._questions.get(key)
            if found is None:
                raise ValueError("this question is not known any more: ask for the next one")
            if found.answered:
                raise ValueError("this question has been answered already: ask for the next one")
            self._questions[key] = _Open(found.about, found.dense_side, found.files, answered=True)
            right, before = side == found.dense_side, self._tallies.get(found.about, Tally())
            self._tallies[found.about] = Tally(before.votes + 1, before.right + right)
            tally = self._tallies[found.about]
        return Answer(right, found.dense_side, tally)

    def tally(self, about: str) -> Tally:
        """Return the votes on one plan."""
        with self._lock:
            return self._tallies.get(about, Tally())

    def close(self) -> None:
        """Forget every question and remove the copies; the votes stay."""
        with self._lock:
            for found in self._questions.values():
                _remove(found.files)
            self._questions.clear()


def hidden_copies(clips: tuple[Path, ...], folder: Path) -> list[Path]:
    """Copy mp4 files into a folder, in the order given, so that neither name, time, size nor checksum tells them apart.

    Each copy ends with a box of type "free" that players skip: random bytes up to one length for all.
    Source: ISO/IEC 14496-12, section 8.1.2.

    Raises:
        OSError: a clip cannot be read or a copy not written; no copy is left then.
    """
    folder.mkdir(parents=True, exist_ok=True)
    copies = [folder / f"{secrets.token_hex(16)}.mp4" for _ in clips]
    try:
        contents = [clip.read_bytes() for clip in clips]
        length = max(map(len, contents)) + BOX_HEADER_BYTES + secrets.randbelow(MOST_SPARE_BYTES) + 16
        for content, copy in zip(contents, copies, strict=True):
            box = length - len(content)
            filling = secrets.token_bytes(box - BOX_HEADER_BYTES)
            copy.write_bytes(content + struct.pack(">I", box) + b"free" + filling)
            os.utime(copy, SAME_TIME)
    except OSError:
        _remove(copies)
        raise
    return copies


def _remove(files: tuple[Path, ...] | list[Path]) -> None:
    for file in files:
        file.unlink(missing_ok=True)
