"""Measure the price table that searches on other machines predict from: `search/planner/price_table.py`."""

from __future__ import annotations

import datetime
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from dit_sparse.grid import Grid
from dit_sparse.patterns import Cached, Dense, Pattern, StaticPattern, TopBlocks, pattern_from_text
from dit_sparse.search.environment import environment
from dit_sparse.search.planner.candidates import candidates, suggested
from dit_sparse.search.planner.price_table import Measured, PriceTable, Row, extent_of, family_of, read_table
from dit_sparse.search.planner.prices import CallShape, Price, measure_prices, place_of
from dit_sparse.search.planner.renders import OutOfTimeError
from dit_sparse.search.row_check import check_rows
from dit_sparse.search.staging import write_text

DENSITIES = (0.06, 0.15, 0.35, 0.6)
FEW_DENSITIES = (0.06, 0.35)  # cost is nearly linear in the visited area, so two tell it
CONTENT = tuple(text for text in suggested() if not isinstance(pattern_from_text(text), StaticPattern))
FEW_STATIC = ("neighborhood", "radial:kind=block", "stripes:kind=diagonal")
# What no class suggests and people name; measured where building static masks takes little time.
MORE = (
    "powers", "strided", "autoframes", "topblocks:order=raster", "topblocks:order=tile", "topblocks:order=hilbert",
    "topblocks:score=lse", "topblocks:score=sampled", "topblocks:score=region",
)  # fmt: skip


@dataclass(frozen=True)
class Wanted:
    """Say what is measured at one shape. densities: of patterns that choose by content afresh; few: of all others.

    rounds: calls that a median is of, few where a call takes long.
    """

    shape: CallShape
    specs: tuple[str, ...]
    densities: tuple[float, ...] = DENSITIES
    few: tuple[float, ...] = FEW_DENSITIES
    rounds: int = 5

    def patterns(self, device: torch.device | str) -> list[Pattern]:
        """Return the candidates, those that choose by content afresh last: the gathering is timed with one of them."""
        found: dict[Pattern, None] = {}
        for spec in self.specs:
            content = not isinstance(pattern_from_text(spec), StaticPattern)
            for density in sorted({*self.densities, *self.few} if content else self.few):
                for one in _offered(self.shape.grid, spec, density, device):
                    if density in (self.few if isinstance(one, (Cached, StaticPattern)) else self.densities):
                        found[one] = None
        extents = [(family_of(one), extent_of(one, self.shape.grid, device)) for one in found]
        unique = [one for n, one in enumerate(found) if extents[n] not in extents[:n]]
        return sorted(unique, key=lambda one: 2 - isinstance(one, Cached) - 2 * isinstance(one, StaticPattern))


def _bf16(grid: Grid, heads: int, head_dim: int) -> CallShape:
    return CallShape(grid, 1, heads, head_dim, "bfloat16")


LARGE = (0.06, 0.2, 0.6)
# On a GPU, from small to large. Building static masks takes most of the time at 720p, where a pair costs about what it
# does at 480p: few of them are measured there.
SHAPES = {
    "bundled-17x16x16": Wanted(_bf16(Grid(17, 16, 16), 6, 64), suggested()),
    "bundled-17x32x32": Wanted(_bf16(Grid(17, 32, 32), 6, 64), suggested()),
    "cogvideox-5b": Wanted(_bf16(Grid(13, 30, 45, prefix=226), 48, 64), (*suggested(), *MORE)),
    "wan-480p": Wanted(_bf16(Grid(21, 30, 52), 12, 128), (*suggested(), *MORE)),
    "hunyuanvideo-720p": Wanted(_bf16(Grid(33, 45, 80, suffix=256), 24, 128), CONTENT, LARGE, rounds=3),
    "wan-720p": Wanted(_bf16(Grid(21, 45, 80), 40, 128), (*CONTENT, *FEW_STATIC), LARGE, rounds=3),
}
# What a CPU is asked to run; in the dtype that it computes in.
CPU_SHAPES = {
    "bundled-17x16x16": Wanted(CallShape(Grid(17, 16, 16), 1, 6, 64, "float32"), suggested(), LARGE, LARGE, rounds=3),
}


def shapes_of(device: torch.device | str) -> dict[str, Wanted]:
    """Return the shapes that are measured on this kind of device, by name."""
    return SHAPES if torch.device(device).type == "cuda" else CPU_SHAPES


def bench_prices(
    shapes: Sequence[str] | None,
    minutes: float,
    out: Path,
    told: Callable[[str], None],
    device: torch.device | str = "cuda",
    table_of: dict[str, Wanted] | None = None,
) -> tuple[PriceTable, list[str]]:
    """Measure shapes of `table_of`, None for all of `shapes_of`; write the table after each one; return it with what is
    missing, as text.

    What `out` already holds of this machine and these versions is kept and not measured again. At the limit of minutes
    it stops between two candidates.

    Raises:
        ValueError: an unknown shape, or `out` holds a table of another machine or other versions.
        RuntimeError: no such GPU is here, or a result is wrong.
    """
    table_of = shapes_of(device) if table_of is None else table_of
    shapes = list(table_of) if shapes is None else shapes
    if unknown := sorted(set(shapes) - table_of.keys()):
        raise ValueError(f"shape must be one of {', '.join(table_of)}, got {unknown[0]!r}")
    device = torch.device(device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("no GPU is here: give --device cpu to measure what calls cost on the CPU")
    table = _begun(out, device)
    until = time.monotonic() + 60.0 * minutes
    missing: list[str] = []
    checked: set[tuple[int, str]] = set()
    for name in shapes:
        wanted = table_of[name]
        patterns = wanted.patterns(device)
        before = next((one for one in table.shapes if one.name == name), None)
        found, worst = _measure(name, wanted, patterns, before, until, checked, device)
        left = [str(one) for one in (Dense(), *patterns) if str(one) not in {row.pattern for row in found.rows}]
        left += ["two groups in one call"] if found.mixed_ms is None else []
        missing += [f"{name}: {one}" for one in left]
        if any(row.family == "dense" for row in found.rows):
            kept = [one for one in table.shapes if one.name != name]
            table = replace(table, shapes=tuple(sorted((*kept, found), key=lambda one: list(table_of).index(one.name))))
            write_text(out, table.to_json())
        told(_line(found, worst, len(left)))
    return table, missing


def _measure(
    name: str, wanted: Wanted, patterns: Sequence[Pattern], before: Measured | None, until: float,
    checked: set[tuple[int, str]], device: torch.device,
) -> tuple[Measured, float]:  # fmt: skip
    """Measure what `before` lacks; also return the largest error over what was allowed, 0 where nothing was checked."""
    shape, rows = wanted.shape, {row.pattern: row for row in (before.rows if before else ())}
    by_text = {str(one): one for one in (Dense(), *patterns)}
    mixed, worst = before.mixed_ms if before else None, 0.0

    def keep(text: str, price: Price) -> None:
        rows[text] = Row(text, *extent_of(by_text[text], shape.grid, device), price.launch, price.head)
        stop()

    def stop() -> None:
        if time.monotonic() > until:
            raise OutOfTimeError

    known = {text: Price(row.launch_ms, row.head_ms) for text, row in rows.items()}
    if not known.keys() >= by_text.keys() or mixed is None:
        try:
            stop()
            for pattern in _to_check([one for one in patterns if str(one) not in known], shape.head_dim, checked):
                error, allowed = check_rows(
                    pattern, shape.grid, shape.heads, shape.head_dim, device, getattr(torch, shape.dtype)
                )
                if not error <= allowed:
                    raise RuntimeError(
                        f"{pattern} at {name} is wrong by {error:.2e} where {allowed:.2e} is allowed: no price stands"
                    )
                worst = max(worst, error / allowed if allowed else 0.0)
                stop()
            prices = measure_prices(patterns, shape, device, "auto", known, keep, mixed, rounds=wanted.rounds)
            mixed = prices.mixed
        except OutOfTimeError:
            pass  # the caller tells what is missing
    order = [text for text in by_text if text in rows]
    return Measured(name, shape, mixed, tuple(rows[text] for text in order)), worst


def _to_check(patterns: Sequence[Pattern], head_dim: int, checked: set[tuple[int, str]]) -> Iterator[Pattern]:
    """Yield one pattern of each family that was not checked at this head_dim; of TopBlocks' families at every shape.

    A kept choice runs the kernel that its fresh twin does.
    """
    seen: set[tuple[int, str]] = {one for one in checked if not one[1].startswith(TopBlocks.name)}
    for pattern in patterns:
        key = (head_dim, family_of(pattern))
        if key not in seen and not isinstance(pattern, Cached):
            seen.add(key)
            checked.add(key)
            yield pattern


def _offered(grid: Grid, spec: str, density: float, device: torch.device | str) -> Sequence[Pattern]:
    """Fit one pattern to one density; nothing where the grid refuses it."""
    try:
        return candidates(grid, [spec], (density,), device=device)[1:]
    except ValueError:
        return ()


def _begun(out: Path, device: torch.device) -> PriceTable:
    """Return what `out` holds of this machine, or an empty table.

    Raises: ValueError for a table of another machine or other versions.
    """
    packages = environment()["packages"]
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    empty = PriceTable(place_of(device), packages["torch"], packages["triton"], now, (), f"price table {out.name}")
    if not out.exists():
        return empty
    found = read_table(str(out))
    for what in ("machine", "torch_version", "triton_version"):
        if getattr(found, what) != getattr(empty, what):
            raise ValueError(
                f"{out} holds prices of {what} {getattr(found, what)}, here it is {getattr(empty, what)}: give another "
                "--out"
            )
    return replace(found, created=now)


def _line(found: Measured, worst: float, missing: int) -> str:
    dense = next((row for row in found.rows if row.family == "dense"), None)
    ms = math.nan if dense is None else dense.launch_ms + dense.head_ms * found.shape.heads
    told = f"{found.name}: {len(found.rows)} prices, dense {ms:.3f} ms, worst check {worst:.2f} of what is allowed"
    return told + (f", {missing} missing" if missing else "")
