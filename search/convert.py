"""Other people's settings as plans: STA's mask strategy files and Radial Attention's flags."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dit_sparse.grid import Grid
from dit_sparse.nearest import did_you_mean
from dit_sparse.patterns import Dense, Neighborhood, Pattern, Radial
from dit_sparse.plan import ModelBinding, Plan, Rule
from dit_sparse.search.plan_folder import write_plan_folder
from dit_sparse.search.plans import parse_grid

STA_TILE = (6, 8, 8)  # tokens: frames, rows, columns; fixed in the published code
STA_ORDER = "tile:2x8x8"  # blocks of 128 that divide its tile
RADIAL_FLAGS = ("dense_layers", "dense_timesteps", "decay_factor", "num_inference_steps", "model_type")
RADIAL_SINK = {"wan": True, "hunyuan": False}  # by model_type: whether all queries see the first frame
RADIAL_NOT_CARRIED = ("use_sage_attention", "block_size", "height", "width", "num_frames", "pattern")

Tiles = tuple[int, int, int]
Cell = tuple[int, int, int]  # step, layer, head


def convert(
    source: str, file: Path | None, out: Path, grid: str | None, transformer: str | None, flags: Mapping[str, Any]
) -> tuple[Path, ...]:
    """Write the plan folder for `sta` or `radial`; flags given here count more than those of a file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another source, an option that it does not take, a broken file, or a folder that cannot be written.
            Nothing was written then.
    """
    if source == "radial":
        if grid is not None or transformer is not None:
            raise ValueError("--grid and --transformer are options of --from sta")
        values = {} if file is None else read_json(file)
        if not isinstance(values, Mapping):
            raise ValueError(f"{file}: flags must be a JSON object, got {type(values).__name__}")
        plan = from_radial({**values, **flags}, "options" if file is None else str(file))
    elif source == "sta":
        if flags:
            raise ValueError(f"{', '.join(flags)}: options of --from radial; STA's file says all that it needs")
        if file is None:
            raise ValueError("--from sta needs the file: dit-sparse plans convert FILE --from sta --out FOLDER")
        plan = from_sta(read_json(file), str(file), None if grid is None else parse_grid(grid), transformer)
    else:
        raise ValueError(f"--from must be sta or radial, got {source!r}")
    return write_plan_folder(out, plan)


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        FileNotFoundError: it does not exist.
        ValueError: it is not JSON.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no valid JSON ({error}). Is the file complete?") from error


def from_sta(
    values: object, where: str, grid: Grid | None = None, transformer: str | None = None, name: str = "sta"
) -> Plan:
    """Turn STA's mask strategy, {"step_layer_head": [tiles of the window, per axis]}, into a plan.

    grid: the video tokens that the file was made for. Without it the full window is taken to be that of step 0, which
    the published files keep dense. transformer: class name to bind the plan to; layers and heads are those of the file.

    Windows become shares of the tiles of an axis, tiles stay 6x8x8 tokens: exact on the file's own grid.

    Raises:
        ValueError: what is no such file, one that lacks a step, layer or head, or a full window that is not known.
    Paper: Fast Video Generation with Sliding Tile Attention (arXiv 2502.04507); its code's mask_strategy JSON.
    """
    windows, (steps, layers, heads) = _sta_windows(values, where)
    tiles = _sta_tiles(windows, where, grid)
    cells = {cell: _sta_pattern(window, tiles) for cell, window in windows.items()}
    made_from: dict[str, Any] = {
        "converted_from": f"STA mask strategy {Path(where).name}",
        "steps": steps,
        "tile": "the tile of 6x8x8 tokens is the stride of each neighborhood; blocks are read in the order tile:2x8x8",
        "full_window_tiles": list(tiles),
        "not_carried": "the step count: windows of steps are shares of any schedule",
    }
    if grid is None:
        made_from["assumed"] = "the window of step 0 is the full one; the file does not name its grid"
    else:
        made_from["grid"] = "x".join(map(str, grid.shape))
    binding = None if transformer is None else ModelBinding(transformer, layers, heads)
    return Plan(_merge(cells, steps, layers, heads), name, binding, made_from)


def from_radial(flags: Mapping[str, Any], where: str, name: str = "radial") -> Plan:
    """Turn Radial Attention's flags (`RADIAL_FLAGS`) into a plan: dense first steps and layers, else its block mask.

    Raises:
        ValueError: an unknown or missing flag, or a value out of range.
    Paper: Radial Attention (arXiv 2506.19852); flags of its released inference scripts.
    """
    known = (*RADIAL_FLAGS, *RADIAL_NOT_CARRIED)
    for flag in flags:
        if flag not in known:
            raise ValueError(f"{where}: unknown flag {flag!r}{did_you_mean(flag, known)}; known: {', '.join(known)}")
    if missing := [flag for flag in RADIAL_FLAGS if flags.get(flag) is None]:
        raise ValueError(f"{where}: flag {missing[0]!r} is missing; needed are {', '.join(RADIAL_FLAGS)}")
    for flag, least in (("dense_layers", 0), ("dense_timesteps", 0), ("num_inference_steps", 1)):
        if not isinstance(flags[flag], int) or isinstance(flags[flag], bool) or flags[flag] < least:
            raise ValueError(f"{where}: {flag} must be an integer >= {least}, got {flags[flag]!r}")
    if flags["model_type"] not in RADIAL_SINK:
        raise ValueError(f"{where}: model_type must be one of {', '.join(RADIAL_SINK)}, got {flags['model_type']!r}")
    layers, first, steps = flags["dense_layers"], flags["dense_timesteps"], flags["num_inference_steps"]
    rules = [Rule(Dense(), (0.0, min(first, steps) / steps))] if first else []
    rules += [Rule(Dense(), layers=tuple(range(layers)))] if layers else []
    try:
        rules.append(Rule(Radial("block", flags["decay_factor"], RADIAL_SINK[flags["model_type"]])))
    except ValueError as error:
        raise ValueError(f"{where}: decay_factor: {error}") from error
    left_out = [f"{flag}={flags[flag]}" for flag in RADIAL_NOT_CARRIED if flag in flags]
    made_from = {
        "converted_from": "Radial Attention, " + ", ".join(f"{flag}={flags[flag]}" for flag in RADIAL_FLAGS),
        "steps": steps,
        "not_carried": ", ".join(["blocks are always of 128 tokens (its Wan2.2 script has 64)", *left_out]),
    }
    return Plan(tuple(rules), name, None, made_from)


def _sta_windows(values: object, where: str) -> tuple[dict[Cell, Tiles], tuple[int, int, int]]:
    """Return the window of each (step, layer, head), in tiles, and how many steps, layers and heads there are."""
    if not isinstance(values, Mapping) or not values:
        raise ValueError(f'{where}: an STA mask strategy maps "step_layer_head" to [tiles], got {values!r:.60}')
    windows: dict[Cell, Tiles] = {}
    for key, window in values.items():
        found = re.fullmatch(r"(\d+)_(\d+)_(\d+)", key, re.ASCII)
        if found is None:
            raise ValueError(f'{where}: keys look like "0_12_3" (step_layer_head), got {key!r}')
        whole = isinstance(window, list) and all(isinstance(n, int) and not isinstance(n, bool) for n in window)
        if not whole or len(window) != 3 or min(window) < 1:
            raise ValueError(f"{where}: the window of {key!r} must be three numbers of tiles >= 1, got {window!r}")
        windows[int(found[1]), int(found[2]), int(found[3])] = (window[0], window[1], window[2])
    steps, layers, heads = (1 + max(cell[axis] for cell in windows) for axis in range(3))
    if len(windows) != steps * layers * heads:
        every = ((s, la, h) for s in range(steps) for la in range(layers) for h in range(heads))
        missing = "_".join(map(str, next(cell for cell in every if cell not in windows)))
        raise ValueError(
            f"{where}: {missing!r} is missing: the file names {steps} steps x {layers} layers x {heads} heads but "
            f"holds {len(windows)} windows. Is it complete?"
        )
    return windows, (steps, layers, heads)


def _sta_tiles(windows: Mapping[Cell, Tiles], where: str, grid: Grid | None) -> Tiles:
    """Return how many tiles each axis has."""
    if grid is None:
        tiles = windows[0, 0, 0]
        source = "step 0, layer 0, head 0"
        if any(window != tiles for (step, _, _), window in windows.items() if step == 0):
            raise ValueError(
                f"{where}: step 0 has more than one window, so the full one is not known; give the grid in tokens, "
                "e.g. --grid 30x48x80"
            )
    else:
        source = f"the grid {grid}"
        frames, height, width = (-(-size // tile) for size, tile in zip(grid.shape, STA_TILE, strict=True))
        tiles = (frames, height, width)
    for cell, window in windows.items():
        if any(size > most for size, most in zip(window, tiles, strict=True)):
            raise ValueError(
                f"{where}: the window {list(window)} of {'_'.join(map(str, cell))!r} is larger than all tiles, "
                f"{list(tiles)} by {source}; give the grid in tokens that the file was made for"
            )
    return tiles


def _sta_pattern(window: Tiles, tiles: Tiles) -> Pattern:
    if window == tiles:
        return Dense()
    frames, height, width = (size / most for size, most in zip(window, tiles, strict=True))
    return Neighborhood((frames, height, width), STA_TILE, clamp="tile", order=STA_ORDER)


def _merge(cells: Mapping[Cell, Pattern], steps: int, layers: int, heads: int) -> tuple[Rule, ...]:
    """Return few rules that give each (step, layer, head) its pattern; no two of them meet, so their order is free."""
    heads_of: dict[tuple[Pattern, int, int, int], list[int]] = defaultdict(list)  # pattern, first, end, layer
    for layer in range(layers):
        for head in range(heads):
            for pattern, first, end in _runs([cells[step, layer, head] for step in range(steps)]):
                heads_of[pattern, first, end, layer].append(head)
    layers_of: dict[tuple[Pattern, int, int, tuple[int, ...]], list[int]] = defaultdict(list)
    for (pattern, first, end, layer), some in heads_of.items():
        layers_of[pattern, first, end, tuple(some)].append(layer)
    rules = [
        Rule(
            pattern,
            (first / steps, end / steps),
            layers=None if len(some_layers) == layers else tuple(some_layers),
            heads=None if len(some_heads) == heads else some_heads,
        )
        for (pattern, first, end, some_heads), some_layers in layers_of.items()
    ]
    return tuple(sorted(rules, key=lambda rule: (rule.steps, rule.layers or (), rule.heads or ())))


def _runs(patterns: list[Pattern]) -> Iterator[tuple[Pattern, int, int]]:
    """Yield (pattern, first, end) for each run of equal ones."""
    first = 0
    for at in range(1, len(patterns) + 1):
        if at == len(patterns) or patterns[at] != patterns[first]:
            yield patterns[first], first, at
            first = at
