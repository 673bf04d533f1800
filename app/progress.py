"""How far a job is, as HTML: a bar for each run that has begun."""

from __future__ import annotations

import html

from dit_sparse.app.events import Done, Event, Failed, Finished, Stage, Step, Stopped, Waiting

RUNNING, ENDED, WRONG = "running", "ended", "wrong"


class Progress:
    """Follow the events of one job."""

    def __init__(self) -> None:
        self.runs: dict[str, Step] = {}  # the last step of each run, in the order of their beginning
        self.line, self.state = "starting", RUNNING

    def hear(self, event: Event) -> bool:
        """Take an event; say whether there is something new to show."""
        if isinstance(event, Waiting):
            self.line = f"waiting: {event.ahead} job{'s' * (event.ahead != 1)} before this one"
        elif isinstance(event, Stage):
            self.line = f"{event.run}: {event.part}" if event.run else event.part
        elif isinstance(event, Step):
            self.line = f"{event.run}: {event.part}, step {event.done} of {event.total}"
            self.runs[event.run] = event
        elif isinstance(event, Failed):
            self.line, self.state = event.message, WRONG
        elif isinstance(event, (Stopped, Finished, Done)):
            self.line, self.state = "stopped" if isinstance(event, Stopped) else "done", ENDED
        else:
            return False
        return True

    def html(self) -> str:
        """Write the line and the bars."""
        role = "alert" if self.state == WRONG else "status"
        bars = [
            f"<label>{html.escape(step.run)}: {html.escape(step.part)} {step.done} / {step.total}"
            f'<progress max="{step.total}" value="{step.done}"></progress></label>'
            for step in self.runs.values()
        ]
        shown = "".join(bars) if self.state == RUNNING else ""
        return f'<div class="job {self.state}"><p role="{role}">{html.escape(self.line)}</p>{shown}</div>'
