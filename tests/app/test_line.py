"""The line of jobs: first come, first served, and a stopped job never begins."""

from __future__ import annotations

import threading
import time

from dit_sparse.app.events import Done, Event, Failed, Stopped
from dit_sparse.app.line import Line


def follow(line: Line, task: object, stop: threading.Event, seen: list[Event]) -> threading.Thread:
    """Run a job in a thread that collects its events."""
    thread = threading.Thread(target=lambda: seen.extend(line.run(lambda tell: task(tell), stop)))  # type: ignore[operator]
    thread.start()
    return thread


def wait_until(true: object, seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not true():  # type: ignore[operator]
        assert time.monotonic() < end
        time.sleep(0.01)


def test_jobs_run_in_the_order_of_their_coming() -> None:
    line, go, order = Line(8), threading.Event(), []
    events: list[list[Event]] = [[] for _ in range(6)]
    threads = [follow(line, lambda tell: go.wait(), threading.Event(), events[0])]
    wait_until(lambda: line.waiting == 0 and line._busy)
    for number in range(1, 6):
        threads.append(follow(line, lambda tell, n=number: order.append(n), threading.Event(), events[number]))
        wait_until(lambda n=number: line.waiting == n)
    go.set()
    for thread in threads:
        thread.join(20)
    assert order == [1, 2, 3, 4, 5]
    assert all(isinstance(seen[-1], Done) for seen in events)
    assert line.waiting == 0


def test_a_job_that_was_stopped_while_it_waited_never_begins() -> None:
    line, go, ran, stop = Line(1), threading.Event(), [], threading.Event()
    first: list[Event] = []
    second: list[Event] = []
    third: list[Event] = []
    threads = [follow(line, lambda tell: go.wait(), threading.Event(), first)]
    wait_until(lambda: line.waiting == 0 and line._busy)
    threads.append(follow(line, lambda tell: ran.append(1), stop, second))
    wait_until(lambda: line.waiting == 1)
    threads.append(follow(line, lambda tell: ran.append(2), threading.Event(), third))  # one too many
    threads[2].join(10)
    assert isinstance(third[-1], Failed)
    stop.set()
    threads[1].join(10)
    assert isinstance(second[-1], Stopped)
    go.set()
    threads[0].join(10)
    assert ran == []
