"""From what a user writes to a plan: a preset, a pattern with options, a file, or an object."""

from __future__ import annotations

from pathlib import Path

from dit_sparse.hub import fetch, is_repo_id
from dit_sparse.nearest import did_you_mean
from dit_sparse.patterns import PATTERNS, Cached, Dense, Pattern, TopBlocks, pattern_from_text
from dit_sparse.plan import Plan, Rule

# The first steps decide what a clip shows, and the outer layers attend broadly in every model profiled so far, so both
# stay dense; elsewhere a selection is reused for some steps. Strips put near tokens in whole blocks, and means that
# stand for what is skipped come closer to dense at the same density (docs/measurements.md; cost: docs/kernels.md).


def _blocks(keep: float) -> TopBlocks:
    return TopBlocks(keep, "strips", compensate=True)


OUTER = Rule(Dense(), layers=(-2, -1, 0))
PRESETS: dict[str, Plan] = {
    "quality": Plan((Rule(Dense(), (0.0, 0.25)), OUTER, Rule(Cached(_blocks(0.35), 2))), "quality"),
    "balanced": Plan((Rule(Dense(), (0.0, 0.12)), OUTER, Rule(Cached(_blocks(0.2), 3))), "balanced"),
    "fast": Plan((Rule(Dense(), (0.0, 0.12)), Rule(Cached(_blocks(0.12), 4))), "fast"),
}


def parse_spec(spec: str | Path | Pattern | Plan) -> Plan:
    """Return the plan that `spec` means: a preset, a pattern name with options, the path of a plan, `user/repo`
    on the Hugging Face hub, or the object.

    Presets and pattern names win over files of the same name, and files over the hub; write `./balanced` for the file.
    From the hub only plan.json and README.md are fetched, into its cache.

    Raises: ValueError for an unknown name or a broken plan; FileNotFoundError for a path or a repository that does not
        exist; OSError where the hub cannot be reached.
    """
    if isinstance(spec, Plan):
        return spec
    if isinstance(spec, Pattern):
        return Plan.of(spec)
    if isinstance(spec, str):
        if spec in PRESETS:
            return PRESETS[spec]
        if spec.partition(":")[0] in PATTERNS:
            return Plan.of(pattern_from_text(spec), spec)
    if isinstance(spec, (str, Path)):
        if Path(spec).exists() or isinstance(spec, Path):
            return Plan.load(spec)
        if "/" in spec or spec.endswith(".json"):
            if is_repo_id(spec):
                return _from_hub(spec)
            raise FileNotFoundError(f"no plan at {spec}")
        near = did_you_mean(spec.partition(":")[0], [*PRESETS, *PATTERNS])
        raise ValueError(
            f"unknown plan {spec!r}{near}: not a preset ({', '.join(PRESETS)}), not a pattern ({', '.join(PATTERNS)}), "
            "and no such file"
        )
    raise ValueError(f"a plan is a str, Path, Pattern or Plan, got {type(spec).__name__}")


def _from_hub(repo_id: str) -> Plan:
    try:
        return Plan.load(fetch(repo_id))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"no file or folder {repo_id} here, and {error}") from error
