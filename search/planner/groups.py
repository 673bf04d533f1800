"""Step groups: windows of the schedule in which a plan keeps its choice, and the steps that stand for them."""

from __future__ import annotations

from dataclasses import dataclass

EDGES = (0.0, 0.1, 0.25, 0.5, 1.0)


@dataclass(frozen=True)
class StepGroups:
    """Cut the schedule at fractions: group g holds the steps i of n with edges[g] <= i / n < edges[g + 1].

    Raises: ValueError unless the edges rise from 0 to 1.
    """

    edges: tuple[float, ...] = EDGES

    def __post_init__(self) -> None:
        rising = all(a < b for a, b in zip(self.edges, self.edges[1:], strict=False))
        if len(self.edges) < 2 or self.edges[0] != 0.0 or self.edges[-1] != 1.0 or not rising:
            raise ValueError(f"step edges must rise from 0 to 1, got {list(self.edges)}")

    def __len__(self) -> int:
        return len(self.edges) - 1

    def window(self, group: int) -> tuple[float, float]:
        return self.edges[group], self.edges[group + 1]

    def steps_of(self, group: int, total_steps: int) -> range:
        """Return the steps of a group in a schedule of so many; none where the schedule is too short for it."""
        start, end = self.window(group)
        inside = [step for step in range(total_steps) if start <= step / total_steps < end]
        return range(inside[0], inside[-1] + 1) if inside else range(0)

    def sampled(self, total_steps: int) -> dict[int, int]:
        """Return the step that stands for each group that has one: its middle, the later one of two."""
        steps = {group: self.steps_of(group, total_steps) for group in range(len(self))}
        return {of[len(of) // 2]: group for group, of in steps.items() if of}
