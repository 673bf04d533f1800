"""What a user says around a plan: which calls stay dense whatever it holds, and which kernels run."""

from __future__ import annotations

from dataclasses import dataclass

from dit_sparse.kernels.backends import BACKENDS
from dit_sparse.plan import parse_indices

MIN_TOKENS = {"cpu": 2048}
MIN_TOKENS_ACCELERATOR = 8192
Guard = int | float | tuple[int | float, int | float] | None


@dataclass(frozen=True)
class Options:
    """Say what stays dense around a plan, and which kernels run.

    dense_steps: int = that many first steps, float = that fraction of them, a pair = (first, last).
    dense_layers: "0, 1, 47-49". What these two keep dense is the model's own call with its mask, bit for bit; where a
    mask is dear (HunyuanVideo), a plan with `Dense()` there leaves padded text out instead.
    min_tokens: below it sparse is slower (default 2,048 on a CPU, 8,192 elsewhere).
    backend: "auto" or a name. strict: raise where a call would fall back to dense for a reason nobody asked for.
    monitor: measure the recall and the output error of every sparse call on some rows; a diagnostic that costs time.

    Raises: ValueError for a value out of range.
    """

    dense_steps: Guard = None
    dense_layers: str | None = None
    min_tokens: int | None = None
    backend: str = "auto"
    strict: bool = False
    monitor: bool = False

    def __post_init__(self) -> None:
        first, last = self.dense_ends
        for count in (first, last):
            whole = isinstance(count, int) and not isinstance(count, bool) and count >= 0
            if not whole and not (isinstance(count, float) and 0.0 <= count <= 1.0):
                raise ValueError(
                    f"dense_steps must be an int >= 0, a fraction in [0, 1] or a pair, got {self.dense_steps!r}"
                )
        parse_indices(self.dense_layers, "dense_layers")
        if self.min_tokens is not None and (not isinstance(self.min_tokens, int) or self.min_tokens < 0):
            raise ValueError(f"min_tokens must be an int >= 0, got {self.min_tokens!r}")
        if self.backend != "auto" and self.backend not in BACKENDS:
            raise ValueError(f"backend must be one of {', '.join(('auto', *BACKENDS))}, got {self.backend!r}")

    @property
    def dense_ends(self) -> tuple[int | float, int | float]:
        if isinstance(self.dense_steps, (tuple, list)):
            if len(self.dense_steps) != 2:
                raise ValueError(f"dense_steps must be one value or (first, last), got {self.dense_steps!r}")
            return self.dense_steps[0], self.dense_steps[1]
        return (0 if self.dense_steps is None else self.dense_steps), 0

    @property
    def needs_step(self) -> bool:
        return any(self.dense_ends)

    @property
    def needs_total_steps(self) -> bool:
        first, last = self.dense_ends
        return bool(last) or (isinstance(first, float) and first > 0)

    def dense_reason(
        self, layer: int, depth: int, tokens: int, device_type: str, step: int | None, total_steps: int | None
    ) -> str | None:
        """Return why these options keep a call of layer `layer` of `depth` dense, or None."""
        if self.dense_layers is not None:
            layers = parse_indices(self.dense_layers, "dense_layers")
            if layers is None or layer in layers or layer - depth in layers:
                return "dense_layers"
        least = self.min_tokens
        if least is None:
            least = MIN_TOKENS.get(device_type, MIN_TOKENS_ACCELERATOR)
        if tokens < least:
            return f"{tokens} tokens < min_tokens {least}"
        first, last = self.dense_ends
        if step is None or (self.needs_total_steps and not total_steps):
            return None  # the schedule says so, and runs dense
        total = total_steps or 0
        first_steps = round(first * total) if isinstance(first, float) else first
        last_steps = round(last * total) if isinstance(last, float) else last
        inside = first_steps <= step and (not last_steps or step < total - last_steps)
        return None if inside else "dense_steps"
