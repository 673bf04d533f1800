"""Folders of finished comparisons: in the app's own temporary folder, few at a time, and none for long."""

from __future__ import annotations

import atexit
import shutil
import tempfile
import threading
import time
from pathlib import Path

PREFIX = "dit-sparse-demo-"


class Results:
    """Hand out folders and remove them: when they are old, when there are too many, and all when the app ends."""

    def __init__(self, most: int = 20, lifetime_seconds: float = 3600.0, every_seconds: float = 60.0) -> None:
        if most < 1 or lifetime_seconds <= 0 or every_seconds <= 0:
            raise ValueError(f"limits must be positive, got {most}, {lifetime_seconds} s, {every_seconds} s")
        self.folder = Path(tempfile.mkdtemp(prefix=PREFIX))  # readable by this user alone
        self.most, self.lifetime_seconds, self.every_seconds = most, lifetime_seconds, every_seconds
        self._made: dict[Path, float] = {}  # oldest first
        self._lock = threading.Lock()
        self._ended = threading.Event()
        threading.Thread(target=self._keep_clean, name="dit-sparse results", daemon=True).start()
        atexit.register(self.close)

    def new(self) -> Path:
        """Make a folder; the oldest ones go where there are too many.

        Raises:
            OSError: the disk is full, or the app has ended.
        """
        with self._lock:
            folder = Path(tempfile.mkdtemp(dir=self.folder, prefix=""))
            self._made[folder] = time.monotonic()
            too_many = list(self._made)[: -self.most]
        for old in too_many:
            self.remove(old)
        return folder

    def remove(self, folder: Path) -> None:
        """Remove one folder that was handed out; others are left alone."""
        with self._lock:
            known = self._made.pop(folder, None) is not None
        if known:
            shutil.rmtree(folder, ignore_errors=True)

    def expire(self) -> None:
        """Remove what is too old."""
        now = time.monotonic()
        with self._lock:
            old = [folder for folder, made in self._made.items() if now - made > self.lifetime_seconds]
        for folder in old:
            self.remove(folder)

    def close(self) -> None:
        """Remove everything; may be called twice."""
        self._ended.set()
        atexit.unregister(self.close)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _keep_clean(self) -> None:
        while not self._ended.wait(self.every_seconds):
            self.expire()
