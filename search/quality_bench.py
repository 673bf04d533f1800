"""What each pattern costs in quality at equal budgets: density, recall, distance from the dense clip, seconds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dit_sparse.grid import Grid
from dit_sparse.patterns import Pattern, pattern_from_text
from dit_sparse.pipelines.enable import sparse, summary
from dit_sparse.pipelines.generate import Clip, Job, default_dtype, generate, known_transformers, load_pipeline
from dit_sparse.pipelines.generate import with_defaults as filled
from dit_sparse.pipelines.geometry import expected_grid
from dit_sparse.search.fitting import fit
from dit_sparse.search.metrics import Metrics, mean_metrics, measure
from dit_sparse.search.report_parts import number

HEADINGS = (
    "budget", "pattern", "density", "computed", "recall", "lowest", "error", "PSNR dB", "least", "SSIM", "LPIPS",
    "seconds",
)  # fmt: skip
PROMPTS = (
    "a striped red circle bouncing on a gradient blue and cyan background",
    "a shaded orange heart swinging on a cloudy blue and white background, camera zooming in",
    "a red circle bouncing on a white background",
)
PATTERNS = (
    "neighborhood", "radial:kind=block", "stripes:kind=diagonal", "stripes:kind=multi-diagonal",
    "stripes:kind=vertical", "frames:kind=spatial", "frames:kind=temporal", "autoframes", "powers", "strided",
    "topblocks", "topblocks:compensate=true", "topblocks:order=tile:4x4x8,compensate=true",
    "topblocks:order=tile,compensate=true", "topblocks:order=gilbert,compensate=true", "topblocks:order=raster",
    "topblocks:order=hilbert",
    "topblocks:order=gilbert", "topblocks:order=cycle", "topblocks:heads=adaptive",
    "topblocks:order=tile,sinks=text+first_frame+diagonal", "topblocks:score=lse", "topblocks:score=antidiagonal",
    "topblocks:score=sampled", "topblocks:score=exact", "topblocks:score=lowbit", "topblocks:score=proxy",
    "topblocks:score=region", "topblocks:clusters=64",
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """Hold what one pattern measured at one budget, over the prompts.

    budget: the computed density asked for. recall, lowest_recall, error: of single sparse calls (`monitor=True`), for
    the first prompt.
    psnr_db: one for each prompt, against the dense clip of the same seed. ssim, lpips: means of the prompts, None where
    a clip lacks it. seconds: median of whole generations.
    """

    budget: float
    pattern: str
    density: float
    computed_density: float
    recall: float
    lowest_recall: float
    error: float
    psnr_db: tuple[float, ...]
    ssim: float | None
    lpips: float | None
    seconds: float


@dataclass(frozen=True)
class Yardstick:
    """Hold what the rows are read against: dense seconds, and how far another seed's clips are from the dense ones."""

    dense_seconds: float
    other_seed_psnr_db: tuple[float, ...]
    other_seed_lpips: float | None


@dataclass(frozen=True)
class Setting:
    """Say what is generated: one clip for each prompt, all with one seed; None leaves a size to the model."""

    model: str = "bundled"
    device: str = "cuda"
    prompts: tuple[str, ...] = PROMPTS
    seed: int = 0
    steps: int | None = None
    frames: int | None = None
    height: int | None = None
    width: int | None = None
    dense_steps: float = 0.12

    @property
    def jobs(self) -> tuple[Job, ...]:
        return tuple(Job(p, self.seed, self.steps, self.frames, self.height, self.width) for p in self.prompts)


def bench_quality(
    setting: Setting,
    specs: Sequence[str],
    budgets: Sequence[float],
    told: Callable[[str], None],
    keep: Callable[[Yardstick, Sequence[Row]], None],
) -> tuple[Yardstick, list[Row]]:
    """Generate with every pattern at every budget, all else equal: first steps dense, then the one pattern everywhere.

    keep: called with all that is measured so far, before the first row and after each.

    Raises: ValueError for an unknown spec or a model without a grid.
    """
    patterns = [pattern_from_text(spec) for spec in specs]
    pipe = load_pipeline(setting.model, setting.device, default_dtype(setting.device))
    pipe.set_progress_bar_config(disable=True)
    jobs = [filled(pipe, setting.model, job) for job in setting.jobs]
    generate(pipe, jobs[0])
    dense = [generate(pipe, job) for job in jobs]
    others = [generate(pipe, replace(job, seed=setting.seed + 1)) for job in jobs]
    apart = _distances(dense, others)
    yardstick = Yardstick(_median(dense), tuple(map(_psnr, apart)), mean_metrics(apart).lpips)
    told(f"dense {yardstick.dense_seconds:.2f} s; another seed {_mean(yardstick.other_seed_psnr_db):.1f} dB")
    rows: list[Row] = []
    keep(yardstick, rows)
    for budget in budgets:
        for pattern in patterns:
            try:
                fitted = fit(pattern, _grid(pipe, jobs[0]), budget, setting.device)
            except ValueError as refused:
                told(f"{budget}  {pattern}: {refused}")
                continue
            rows.append(_row(pipe, setting, jobs, budget, fitted, dense))
            keep(yardstick, rows)
            told("  ".join(cells(rows[-1:])[0]))
    return yardstick, rows


def _row(
    pipe: Any, setting: Setting, jobs: Sequence[Job], budget: float, pattern: Pattern, dense: Sequence[Clip]
) -> Row:
    with sparse(pipe, pattern, dense_steps=setting.dense_steps, min_tokens=0, monitor=True):
        generate(pipe, jobs[0])  # warms up, too
        found = summary(pipe)
    with sparse(pipe, pattern, dense_steps=setting.dense_steps, min_tokens=0):
        timed = [generate(pipe, job) for job in jobs]
    measured = found.measured
    assert measured is not None
    assert found.density is not None
    assert found.computed_density is not None
    distances = _distances(dense, timed)
    mean = mean_metrics(distances)
    return Row(
        budget, str(pattern), found.density, found.computed_density, measured.recall, measured.lowest_recall,
        measured.error, tuple(map(_psnr, distances)), mean.ssim, mean.lpips, _median(timed),
    )  # fmt: skip


def _grid(pipe: Any, job: Job) -> Grid:
    """Return the grid that a clip of this job will have."""
    transformer = next(iter(known_transformers(pipe).values()))
    if job.height is None or job.width is None:
        raise ValueError("the clip's height and width must be known: give them")
    grid = expected_grid(transformer, pipe.vae.config, job.frames or 1, job.height, job.width)
    if grid is None:
        raise ValueError(f"no grid is known for {type(transformer).__name__} at this size")
    return grid


def _distances(dense: Sequence[Clip], clips: Sequence[Clip]) -> list[Metrics]:
    return [measure(one.frames, other.frames) for one, other in zip(dense, clips, strict=True)]


def _psnr(found: Metrics) -> float:
    return math.inf if found.psnr_db is None else found.psnr_db


def _median(clips: Sequence[Clip]) -> float:
    return statistics.median(clip.seconds for clip in clips)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def cells(rows: Sequence[Row]) -> list[list[str]]:
    """Return the table's cells under HEADINGS."""
    return [
        [
            f"{row.budget}", row.pattern, f"{row.density:.3f}", f"{row.computed_density:.3f}", f"{row.recall:.3f}",
            f"{row.lowest_recall:.3f}", f"{row.error:.3f}", f"{_mean(row.psnr_db):.2f}", f"{min(row.psnr_db):.2f}",
            number(row.ssim, ".3f"), number(row.lpips, ".3f"), f"{row.seconds:.2f}",
        ]
        for row in rows
    ]  # fmt: skip
