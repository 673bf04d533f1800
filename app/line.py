"""One job at a time, each in a thread of its own; a job's iterator tells a page what happens."""

from __future__ import annotations

import logging
import queue
import secrets
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dit_sparse.app.events import LAST, Beat, Done, Event, Failed, Preview, Step, StopJob, Stopped, Waiting, stage_of

logger = logging.getLogger("dit_sparse")
BEAT_SECONDS = 0.4


class Tell:
    """Be what a job calls on its way; between two steps it ends a job that nobody wants any more."""

    def __init__(self, events: queue.SimpleQueue[Event], *ends: threading.Event) -> None:
        self._events, self._ends = events, ends

    def progress(self, what: str, done: int, total: int) -> None:
        """Tell a stage (done = 0) or a step; raises StopJob where the job was stopped."""
        if any(end.is_set() for end in self._ends):
            raise StopJob
        stage = stage_of(what)
        self._events.put(Step(stage.run, stage.part, done, total) if done else stage)

    def preview(self, run: str, frame: NDArray[np.uint8]) -> None:
        """Tell a picture of a run."""
        self._events.put(Preview(run, frame))


Task = Callable[[Tell], Any]  # returns the value of Done, or one of LAST


class Line:
    """Let jobs run one after the other."""

    def __init__(self, most_waiting: int) -> None:
        self.most_waiting = most_waiting
        self._free, self._closed = threading.Condition(), threading.Event()
        self._tickets: deque[object] = deque()  # of jobs that wait, the next one first
        self._busy = False
        self._worker: threading.Thread | None = None

    @property
    def waiting(self) -> int:
        return len(self._tickets)

    def run(self, task: Task, stop: threading.Event) -> Iterator[Event]:
        """Run a task when it is its turn; yield its events, the last of which is one of LAST.

        An event comes at least every half second. Setting `stop`, or closing the iterator, ends the job when it next
        tells its progress; the next job begins when it has ended. What the task raises becomes an event: a ValueError
        is taken for the visitor's to mend, all else is logged.
        """
        left = threading.Event()
        events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        tell = Tell(events, stop, left, self._closed)
        try:
            last = yield from self._wait_for_turn(stop)
            if last is not None:
                yield last
                return
            self._start(task, tell, events)
            event: Event = Beat()
            while not isinstance(event, LAST):
                try:
                    event = events.get(timeout=BEAT_SECONDS)
                except queue.Empty:
                    event = Beat()
                yield event
        finally:
            left.set()

    def close(self) -> None:
        """End the job that runs at its next step, wait for that, and let no other begin."""
        self._closed.set()
        if self._worker is not None:
            self._worker.join()

    def _wait_for_turn(self, stop: threading.Event) -> Generator[Event, None, Event | None]:
        """Take the turn, first come, first served; return None, or the event that ends a job that never began."""
        ticket = object()
        with self._free:
            if self._busy and self.waiting >= self.most_waiting:
                return Failed(f"{self.most_waiting} jobs wait already; come back in some minutes")
            self._tickets.append(ticket)
        try:
            while True:
                with self._free:
                    if stop.is_set():
                        return Stopped()
                    if not self._busy and self._tickets[0] is ticket:
                        self._busy = True
                        return None
                    ahead = self._tickets.index(ticket) + self._busy
                yield Waiting(ahead)
                with self._free:
                    if self._busy or self._tickets[0] is not ticket:
                        self._free.wait(BEAT_SECONDS)
        finally:
            with self._free:
                self._tickets.remove(ticket)

    def _give_turn_on(self) -> None:
        with self._free:
            self._busy = False
            self._free.notify_all()

    def _start(self, task: Task, tell: Tell, events: queue.SimpleQueue[Event]) -> None:
        worker = threading.Thread(target=self._work, args=(task, tell, events), daemon=True)
        try:
            worker.start()
        except RuntimeError:  # no more threads
            self._give_turn_on()
            raise
        self._worker = worker

    def _work(self, task: Task, tell: Tell, events: queue.SimpleQueue[Event]) -> None:
        """Run a task and give the turn on, whatever happens."""
        last: Event = Stopped()
        try:
            if not self._closed.is_set():
                value = task(tell)
                last = value if isinstance(value, LAST) else Done(value)
        except StopJob:
            pass
        except ValueError as error:
            last = Failed(str(error))
        except Exception as error:
            last = failure(error)
        finally:
            self._give_turn_on()
            events.put(last)


def failure(error: Exception) -> Failed:
    """Log an error under an id and return what a visitor may know of it."""
    log_id = secrets.token_hex(4)
    logger.error("job %s failed", log_id, exc_info=error)
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return Failed(f"the GPU has too little memory for this; choose a smaller size (log {log_id})", log_id)
    return Failed(f"this failed, and not by your doing; the log of this page has it under {log_id}", log_id)
