"""What the tabs of the page share: the studio, the comparison that is shown first, the blind test."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gradio as gr

from dit_sparse.app.blind import BlindTest
from dit_sparse.app.code import code_of_run
from dit_sparse.app.figures import figures_html
from dit_sparse.app.player import player_value, videos_of
from dit_sparse.app.stored import Report
from dit_sparse.app.studio import Studio
from dit_sparse.search.report import load_report

STATE_SECONDS = 3600  # that the server remembers what a visitor looks at
SHAPE = re.compile(r"(\w+): \w+, (\d+) layers x (\d+) heads")


@dataclass(frozen=True, eq=False)
class Shown:
    """Name what a visitor looks at: the folder of a comparison, its report, and the run name of one of its plans."""

    folder: Path
    report: Report
    name: str

    @classmethod
    def first_of(cls, folder: Path, report: Report) -> Shown:
        """Look at the first plan of a comparison."""
        return cls(folder, report, report["sparse"][0]["name"])

    @classmethod
    def read(cls, folder: Path) -> Shown:
        """Read a results folder of `compare`.

        Raises:
            FileNotFoundError: there is no report.json, or a video that it names is missing.
            ValueError: the report does not follow its schema.
        """
        report = load_report(folder)
        videos_of(report, folder)
        return cls.first_of(folder, report)

    def __deepcopy__(self, memo: dict[int, Any]) -> Shown:
        return self  # Gradio copies the first value of a state for each visitor; nobody changes this one

    @property
    def names(self) -> list[str]:
        return [run["name"] for run in self.report["sparse"]]

    @property
    def here(self) -> bool:
        """Say whether its clips are still there: results are removed after some time."""
        try:
            return bool(videos_of(self.report, self.folder))
        except FileNotFoundError:
            return False

    def transformers(self) -> dict[str, tuple[int, int]]:
        """Return layers and heads of each transformer by its component name.

        Raises:
            ValueError: the report does not tell them.
        """
        found = (SHAPE.match(text) for text in self.report["model"]["transformers"])
        shapes = {match[1]: (int(match[2]), int(match[3])) for match in found if match is not None}
        if not shapes:
            raise ValueError("the layers and heads of this comparison's model are not known")
        return shapes

    def view(self) -> tuple[dict[str, Any], str, str]:
        """Return what the player, the figures and the code box show."""
        report, name = self.report, self.name
        return player_value(report, self.folder, name), figures_html(report, name), code_of_run(report, name)


@dataclass(frozen=True, eq=False)
class Site:
    """Hold what the tabs share. uploads: the folder where the server keeps uploaded files."""

    studio: Studio
    first: Shown
    blind: BlindTest
    uploads: Path
    _stops: dict[str, threading.Event] = field(default_factory=dict)  # of a visitor's job in a tab
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def allowed_paths(self) -> list[str]:
        """Name what the server may send: the clips shown first, and the results of its own jobs."""
        stored = videos_of(self.first.report, self.first.folder).values()
        return [*map(str, stored), str(self.studio.results.folder)]

    @contextmanager
    def job(self, request: gr.Request, tab: str) -> Iterator[threading.Event]:
        """Give what ends the job that a visitor now runs in a tab; an earlier one of the same tab ends."""
        self.stop(request, tab)
        key, stop = f"{request.session_hash}/{tab}", threading.Event()
        with self._lock:
            self._stops[key] = stop
        try:
            yield stop
        finally:
            with self._lock:
                if self._stops.get(key) is stop:
                    del self._stops[key]

    def stop(self, request: gr.Request, *tabs: str) -> None:
        """End a visitor's jobs of some tabs, or of all where none is named, after the step that runs."""
        begins = tuple(f"{request.session_hash}/{tab}" for tab in tabs) or (f"{request.session_hash}/",)
        with self._lock:
            found = [stop for key, stop in self._stops.items() if key.startswith(begins)]
        for stop in found:
            stop.set()

    def leave(self, request: gr.Request) -> None:
        """End all jobs of a visitor who closed the page."""
        self.stop(request)

    def queue_text(self) -> str:
        """Tell how many jobs wait."""
        count = self.studio.waiting
        return f"{count} job{'s' * (count != 1)} waiting; one runs at a time."

    def close(self) -> None:
        """End the running job, and remove all results and copies."""
        self.blind.close()
        self.studio.close()
