"""Prices of a machine that is not here: a table measured there, and what it predicts for calls of other sizes."""

from __future__ import annotations

import functools
import json
import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from dit_sparse.estimate.sinks import parse_sinks
from dit_sparse.grid import Grid
from dit_sparse.kernels.indices import BLOCK
from dit_sparse.order import TokenOrder
from dit_sparse.patterns import AutoFrames, Cached, Dense, Pattern, StaticPattern, TopBlocks, pattern_from_text
from dit_sparse.search.planner.prices import CallShape, Price, Prices

MEASURED, SHIPPED = "measured", "shipped"  # words for where prices come from; all else is a file
SHIPPED_TABLE = Path(__file__).with_name("shipped_prices.json")
SCHEMA, VERSION = "dit-sparse/prices", 1
COSTS_LIKE = {"bfloat16": "bfloat16", "float16": "bfloat16", "float32": "float32"}
MEASURE = "measure one with `dit-sparse bench prices --out FILE` on the machine that you mean and give that file"


@dataclass(frozen=True)
class Row:
    """Hold one measured candidate; density: visited pairs over all pairs of the call, text counted.

    raggedness: 128 times the blocks of its token order, over the tokens; a kernel pays for whole blocks.

    Raises: ValueError for numbers out of range, or what is no pattern.
    """

    pattern: str
    density: float
    raggedness: float
    launch_ms: float
    head_ms: float

    def __post_init__(self) -> None:
        pattern_from_text(self.pattern)
        sound = 0.0 < self.density <= 1.0 and 1.0 <= self.raggedness < math.inf
        if not (sound and 0.0 <= self.launch_ms < math.inf and 0.0 <= self.head_ms < math.inf):
            raise ValueError(
                f"a row needs a density in (0, 1], a raggedness >= 1 and milliseconds >= 0, got {asdict(self)}"
            )

    @functools.cached_property
    def family(self) -> str:
        return family_of(pattern_from_text(self.pattern))

    @property
    def area(self) -> float:
        return self.density * self.raggedness**2


@dataclass(frozen=True)
class Measured:
    """Hold the rows of one shape; mixed_ms is what gathering two groups of heads costs, None where not measured."""

    name: str
    shape: CallShape
    mixed_ms: float | None
    rows: tuple[Row, ...]

    def at(self, family: str, area: float) -> Price:
        """Interpolate a family linearly by visited area; beyond its rows the head part goes on, the launch stays.

        One row alone is taken for a cost in proportion to the area.
        """
        nodes = sorted((row.area, row.launch_ms, row.head_ms) for row in self.rows if row.family == family)
        areas = [node[0] for node in nodes]
        if len(nodes) == 1:
            return Price(nodes[0][1], nodes[0][2] * area / areas[0])
        upper = min(max(bisect_left(areas, area), 1), len(nodes) - 1)
        low, high = nodes[upper - 1], nodes[upper]
        share = (area - low[0]) / (high[0] - low[0])
        launch_share = min(max(share, 0.0), 1.0)
        launch = (1 - launch_share) * low[1] + launch_share * high[1]
        return Price(launch, max(0.0, (1 - share) * low[2] + share * high[2]))


@dataclass(frozen=True)
class PriceTable:
    """Hold what calls cost on one machine, in one dtype or two that cost the same. source: which table, for reports."""

    machine: str  # as `place_of` names it
    torch_version: str
    triton_version: str
    created: str
    shapes: tuple[Measured, ...]
    source: str

    @property
    def where(self) -> str:
        return f"{self.machine} ({self.source})"

    @property
    def dtype(self) -> str:
        """Return what calls are priced in: bfloat16, which costs what float16 does, or float32."""
        return COSTS_LIKE[self.shapes[0].shape.dtype]

    def check(self, patterns: Sequence[Pattern], head_dim: int) -> None:
        """Refuse what cannot be predicted.

        Raises: ValueError for a head_dim or a pattern whose family the table does not hold.
        """
        for pattern in (Dense(), *patterns):
            self._held(pattern, head_dim)

    def predict(self, pattern: Pattern, shape: CallShape, device: torch.device | str = "cpu") -> Price:
        """Predict the price of a call: by visited area within each measured shape, then by tokens between shapes.

        The head part is interpolated as the cost of a pair, in logarithms of cost and tokens; the launch linearly in
        the logarithm of tokens. Outside the measured tokens both are those of the nearest shape. Static patterns count
        some of their blocks on `device`.

        Raises: ValueError for a dtype, head_dim or family that the table does not hold.
        """
        if COSTS_LIKE.get(shape.dtype) != self.dtype:
            raise ValueError(
                f"the price table of {self.where} holds {self.dtype}, got dtype {shape.dtype}; ask for that, or "
                "measure prices here"
            )
        held = self._held(pattern, shape.head_dim)
        area, family = area_of(pattern, shape.grid, device), family_of(pattern)
        nodes = []
        for one in held:
            price, tokens = one.at(family, area), one.shape.grid.tokens
            nodes.append((tokens, price.launch, price.head / (one.shape.batch * tokens**2)))
        launch, of_pair = _by_tokens(nodes, shape.grid.tokens)
        return Price(launch, of_pair * shape.batch * shape.grid.tokens**2)

    def prices(self, patterns: Sequence[Pattern], shape: CallShape, device: torch.device | str = "cpu") -> Prices:
        """Predict all of them, dense and the gathering of two groups of heads, whose cost follows q's numbers.

        Raises: ValueError as `predict`, or where no gathering of this head_dim was measured.
        """
        found = {str(pattern): self.predict(pattern, shape, device) for pattern in (Dense(), *patterns)}
        nodes = [
            (tokens, 0.0, one.mixed_ms / (one.shape.batch * one.shape.heads * tokens))
            for one in self.shapes
            if one.shape.head_dim == shape.head_dim and one.mixed_ms is not None
            for tokens in (one.shape.grid.tokens,)
        ]
        if not nodes:
            raise ValueError(
                f"the price table of {self.where} holds no cost of two head groups at head_dim {shape.head_dim}: its "
                f"measurement was cut short; {MEASURE}"
            )
        _, of_token = _by_tokens(nodes, shape.grid.tokens)
        mixed = of_token * shape.batch * shape.heads * shape.grid.tokens
        return Prices(shape, self.where, found, mixed, predicted=True)

    def to_json(self) -> str:
        values = {name: value for name, value in asdict(self).items() if name != "source"}
        return json.dumps({"schema": SCHEMA, "schema_version": VERSION, **values}, indent=1) + "\n"

    def _held(self, pattern: Pattern, head_dim: int) -> list[Measured]:
        """Return the shapes that tell a pattern's cost."""
        of_size = [one for one in self.shapes if one.shape.head_dim == head_dim]
        if not of_size:
            known = ", ".join(map(str, sorted({one.shape.head_dim for one in self.shapes})))
            raise ValueError(
                f"the price table of {self.where} holds head_dim {known}, got {head_dim}: measure prices on the "
                "machine that you mean"
            )
        family = family_of(pattern)
        found = [one for one in of_size if any(row.family == family for row in one.rows)]
        if not found:
            known = ", ".join(sorted({row.family for one in of_size for row in one.rows}))
            raise ValueError(
                f"the price table of {self.where} holds no price of {family!r} (for {pattern}) at head_dim {head_dim}; "
                f"choose candidates among {known}, or measure prices on the machine that you mean"
            )
        return found


def read_table(prices: str) -> PriceTable:
    """Read the shipped table for "shipped", else a file of `dit-sparse bench prices`.

    Raises:
        FileNotFoundError: there is no such file, or this version ships none.
        ValueError: it is damaged, or of another version.
    """
    shipped = prices == SHIPPED
    path = SHIPPED_TABLE if shipped else Path(prices)
    if not path.is_file():
        raise FileNotFoundError(
            f"this version of dit-sparse ships no price table ({path} does not exist); {MEASURE} instead of {SHIPPED!r}"
            if shipped
            else f"price table {path} does not exist: give {MEASURED}, {SHIPPED} or a file; {MEASURE}"
        )
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if (values["schema"], values["schema_version"]) != (SCHEMA, VERSION):
            raise ValueError(
                f"schema must be {SCHEMA} {VERSION}, got {values['schema']} {values['schema_version']}: another "
                "version of dit-sparse wrote it"
            )
        return _table(values, "shipped table" if shipped else f"price table {path.name}")
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        what = f"no {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"price table {path} cannot be read: {what}; {MEASURE}") from error


def family_of(pattern: Pattern) -> str:
    """Write a pattern without the field that sets its density: what candidates of different densities share."""
    name, _, text = str(pattern).partition(":")
    options = [option for option in text.split(",") if option and not option.startswith(f"{pattern.knob}=")]
    if isinstance(pattern, Cached):
        options.append(f"pattern={family_of(pattern.pattern).replace(',', ';')}")
    return f"{name}:{','.join(options)}" if options else name


def area_of(pattern: Pattern, grid: Grid, device: torch.device | str = "cpu") -> float:
    """Return the area of the visited blocks over that of all pairs: what a kernel pays for."""
    density, raggedness = extent_of(pattern, grid, device)
    return density * raggedness**2


def extent_of(pattern: Pattern, grid: Grid, device: torch.device | str = "cpu") -> tuple[float, float]:
    """Return (density, raggedness) of a pattern on a grid, as in `Row`; dense has no blocks: (1, 1).

    Raises: ValueError where the density follows the content or text is not read by all.
    """
    if isinstance(pattern, Cached):
        return extent_of(pattern.pattern, grid, device)
    if isinstance(pattern, Dense):
        return 1.0, 1.0
    blocks, video_blocks = _blocks_of(pattern.token_order(), grid)
    if isinstance(pattern, StaticPattern) and pattern.reads_text:
        density = pattern.densities(grid, device)[1]
    elif isinstance(pattern, AutoFrames):
        both = [one.densities(grid, device)[1] for one in pattern.candidates()]
        density = sum(both) / len(both)
    elif isinstance(pattern, TopBlocks) and pattern.keep is not None and "text" in parse_sinks(pattern.sinks):
        heads = len(pattern.keep) if isinstance(pattern.keep, tuple) else 1
        density = sum(pattern.kept_blocks(video_blocks, heads)) / heads / video_blocks
    else:
        raise ValueError(f"the density of {pattern} on a grid is not known beforehand: give its budget as a share")
    video = (grid.video_tokens / grid.tokens) ** 2
    return density * video + (1.0 - video), max(1.0, blocks * BLOCK / grid.tokens)


@functools.lru_cache(maxsize=64)
def _blocks_of(order: TokenOrder, grid: Grid) -> tuple[int, int]:
    layout = order.layout(grid)
    return layout.blocks, layout.video_blocks


def _by_tokens(nodes: Sequence[tuple[int, float, float]], tokens: int) -> tuple[float, float]:
    """Interpolate (tokens, launch, cost of a pair) to a number of tokens: see `predict`."""
    nodes = sorted(nodes)
    if tokens <= nodes[0][0] or len(nodes) == 1:
        return nodes[0][1:]
    if tokens >= nodes[-1][0]:
        return nodes[-1][1:]
    upper = bisect_left([node[0] for node in nodes], tokens)
    low, high = nodes[upper - 1], nodes[upper]
    share = math.log(tokens / low[0]) / math.log(high[0] / low[0])
    launch = (1 - share) * low[1] + share * high[1]
    if low[2] <= 0.0 or high[2] <= 0.0:  # lost in the noise of a small shape: no logarithm
        return launch, (1 - share) * low[2] + share * high[2]
    return launch, low[2] ** (1 - share) * high[2] ** share


def _table(values: Mapping[str, Any], source: str) -> PriceTable:
    shapes = tuple(
        Measured(
            one["name"], CallShape.from_dict(one["shape"]), one["mixed_ms"], tuple(Row(**row) for row in one["rows"])
        )
        for one in values["shapes"]
    )
    for one in shapes:
        areas = [(row.family, row.area) for row in one.rows]
        if "dense" not in dict(areas) or len(set(areas)) < len(areas):
            raise ValueError(f"shape {one.name!r} lacks dense, or has two rows of one family and density")
        if one.shape.dtype not in COSTS_LIKE or (one.mixed_ms is not None and not 0.0 <= one.mixed_ms < math.inf):
            raise ValueError(f"shape {one.name!r} has dtype {one.shape.dtype} and mixed_ms {one.mixed_ms}")
    sizes = {(one.shape.head_dim, one.shape.grid.tokens) for one in shapes}
    if not shapes or len(sizes) < len(shapes):
        raise ValueError("it needs shapes that differ in head_dim or tokens")
    if len({COSTS_LIKE[one.shape.dtype] for one in shapes}) > 1:
        raise ValueError("its shapes are of dtypes that cost differently")
    head = {name: str(values[name]) for name in ("machine", "torch_version", "triton_version", "created")}
    return PriceTable(**head, shapes=shapes, source=source)
