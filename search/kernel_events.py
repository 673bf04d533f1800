"""Hear the kernel benchmark: lines go to a file as they come, JSON and a picture are written when it ends."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from dit_sparse.search.kernel_picture import draw_realised
from dit_sparse.search.kernel_report import to_json
from dit_sparse.search.staging import write_text

Event = dict[str, Any]


class Listener:
    """Keep every event of one run, on disk too, so that a run that is cut off loses nothing that it had found."""

    def __init__(self, out: Path | None, told: Callable[[str], None]) -> None:
        self.events: list[Event] = []
        self._out = out
        self._told = told
        self._begin = time.monotonic()
        self._lock = threading.Lock()  # the gates run side by side
        self._lines: TextIO | None = None

    def hear(self, event: Event) -> None:
        """Keep one event and say what is worth a line of progress."""
        with self._lock:
            self.events.append(event)
            if self._out is not None:
                if self._lines is None:
                    self._out.parent.mkdir(parents=True, exist_ok=True)
                    self._lines = self._out.with_suffix(".jsonl").open("w", encoding="utf-8")
                self._lines.write(json.dumps(event) + "\n")
                self._lines.flush()
            if (line := progress(event)) is not None:
                self._told(f"[{time.monotonic() - self._begin:6.1f} s] {line}")

    def close(self) -> dict[str, Any]:
        """Return the report of everything heard, and write it where a file was asked for."""
        report = to_json(self.events)
        report["wall_seconds"] = round(time.monotonic() - self._begin, 1)
        if self._out is not None and self.events:
            write_text(self._out, json.dumps(report, indent=1) + "\n")
            draw_realised(report["rows"], self._out.with_suffix(".png"))
        if self._lines is not None:
            self._lines.close()
        return report


def progress(event: Event) -> str | None:
    """Return what to say of an event, or None."""
    where = f"{event.get('section', '')} {event.get('unit', '')} {event.get('contender') or ''}".strip()
    match event["kind"]:
        case "begin":
            return where
        case "row":
            return f"{where}: {event['ms']:.3f} ms"
        case "gate" if not event["passed"]:
            return f"{where} {event['case']}: failed the gate"
        case "error" | "failed" | "left_out" | "refused":
            reason = event.get("reason") or event["error"]
            return f"{where}: {event['kind']}: {reason.strip().splitlines()[-1]}"
    return None
