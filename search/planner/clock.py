"""The time of a search: what is left of its limit, and what each part took."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Clock:
    """Tell when the time is up, and what each part took."""

    minutes: float | None
    started: float = field(default_factory=time.monotonic)
    seconds: dict[str, float] = field(default_factory=dict)

    def up(self) -> bool:
        return self.left < 0

    @property
    def left(self) -> float:
        return math.inf if self.minutes is None else self.started + 60 * self.minutes - time.monotonic()

    def timed(self, part: str, run: Callable[[], Any]) -> Any:
        begin = time.monotonic()
        try:
            return run()
        finally:
            self.seconds[part] = self.seconds.get(part, 0.0) + time.monotonic() - begin
