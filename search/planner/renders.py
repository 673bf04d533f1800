"""Clips of held-out prompts: dense once, each plan once, measured against each other and kept on disk, one by one."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dit_sparse.patterns import TopBlocks
from dit_sparse.pipelines.enable import sparse, summary
from dit_sparse.pipelines.generate import Job, generate_batch, run_steps
from dit_sparse.pipelines.timing import time_attention
from dit_sparse.plan import Plan
from dit_sparse.search.metrics import Frames, Metrics, mean_metrics, measure
from dit_sparse.search.planner.capture import Stop, Told
from dit_sparse.search.planner.store import Store
from dit_sparse.search.staging import staged
from dit_sparse.search.video import to_bytes

CLIPS = "clips"
STRIP_FRAMES, STRIP_HEIGHT = 6, 128
YARDSTICKS = (  # name, distance of the seed, what runs
    ("another seed", 1_000_003, Plan.dense()),
    ("another dense kernel", 0, Plan.of(TopBlocks(keep=1.0))),
)


class OutOfTimeError(Exception):
    """The limit of a search was reached between two clips."""


@dataclass(frozen=True)
class Render:
    """Hold what one plan's clips measured: one Metrics for each job, seconds of a clip and of its attention."""

    metrics: tuple[Metrics, ...]
    seconds: tuple[float, ...]
    attention_seconds: float | None
    run_density: float | None

    @property
    def squared_error(self) -> float:
        """Return the mean squared error of the clips, of pixel values in [0, 1]."""
        return float(np.mean([0.0 if m.psnr_db is None else 10 ** (-m.psnr_db / 10) for m in self.metrics]))


class Renders:
    """Generate clips of `jobs` with plans, `batch` at a time; what is on disk is not generated again.

    backend: of the sparse calls. needed: metrics that a clip measured before must have, or it is generated again: it
    may be of a time when what they need was not installed. Raises OutOfTimeError where `stop()` says so before a batch.
    """

    def __init__(
        self, pipe: Any, jobs: Sequence[Job], batch: int, store: Store, backend: str, stop: Stop, told: Told,
        needed: Collection[str] = (),
    ) -> None:  # fmt: skip
        self.pipe, self.jobs, self.batch, self.store, self.backend = pipe, tuple(jobs), batch, store, backend
        self.stop, self.told = stop, told
        self.needed = frozenset(needed) - {"psnr_db"}  # which identical clips do not have

    def dense(self) -> Render:
        """Generate the dense clips that every plan is measured against, and time them."""
        missing = [job for job in self.jobs if self._seconds(job) is None]
        with sparse(self.pipe, Plan.dense()):
            for jobs in self._batches("dense clips", missing):
                for job, clip in zip(jobs, generate_batch(self.pipe, jobs), strict=True):
                    self._keep(job, clip.frames)
                    self.store.write(self._fact(job), {"seconds": clip.seconds})
            timed = self._attention("dense-attention", self.jobs, bool(missing))
        seconds = tuple(self._seconds(job) or 0.0 for job in self.jobs)
        same = Metrics(None, None, None, None, True)
        return Render((same,) * len(self.jobs), seconds, timed["seconds"], 1.0)

    def of(self, plan: Plan, what: str, jobs: Sequence[Job] | None = None, timed: bool = True) -> Render:
        """Generate the clips of a plan, for some jobs only if they are given, and measure them.

        timed: time its attention, too, in a run of its own.
        """
        wanted = self.jobs if jobs is None else tuple(jobs)
        name = f"renders/{_hash(plan.to_dict()['rules'])}"
        found: dict[Job, Any] = {job: self._measured(f"{name}-{_hash(asdict(job))}") for job in wanted}
        missing = [job for job in wanted if found[job] is None]
        with sparse(self.pipe, plan, min_tokens=0, backend=self.backend):
            for batch in self._batches(what, missing):
                for job, clip in zip(batch, generate_batch(self.pipe, batch), strict=True):
                    with staged(self.store.folder / "renders") as folder:
                        (folder / self._strip(plan, job).name).write_bytes(strip(clip.frames))
                    found[job] = {"metrics": asdict(measure(self.frames(job), clip.frames)), "seconds": clip.seconds}
                    self.store.write(f"{name}-{_hash(asdict(job))}", found[job])
            nothing = {"seconds": None, "run_density": None}
            attention = self._attention(f"{name}-attention", wanted, bool(missing)) if timed else nothing
        metrics = tuple(Metrics(**found[job]["metrics"]) for job in wanted)
        seconds = tuple(found[job]["seconds"] for job in wanted)
        return Render(metrics, seconds, attention["seconds"], attention["run_density"])

    def yardsticks(self, most: int = 4) -> dict[str, Metrics]:
        """Measure how far another seed's clip is, and that of another kernel that reads every block; means of some."""
        means = {}
        for name, seed_apart, plan in YARDSTICKS:
            facts = {job: f"yardsticks/{_hash([name, asdict(job)])}" for job in self.jobs[:most]}
            found: dict[Job, Any] = {job: self.store.read(fact) for job, fact in facts.items()}
            with sparse(self.pipe, plan, min_tokens=0, backend=self.backend):
                for batch in self._batches(f"yardstick: {name}", [job for job in facts if found[job] is None]):
                    others = [replace(job, seed=job.seed + seed_apart) for job in batch]
                    for job, clip in zip(batch, generate_batch(self.pipe, others), strict=True):
                        found[job] = asdict(measure(self.frames(job), clip.frames))
                        self.store.write(facts[job], found[job])
            means[name] = mean_metrics([Metrics(**one) for one in found.values()])
        return means

    def _measured(self, fact: str) -> Any | None:
        """Return what is on disk of a clip, None where that is nothing or lacks a metric that is needed."""
        known = self.store.read(fact)
        lacking = known is None or any(known["metrics"].get(metric) is None for metric in self.needed)
        return None if lacking else known

    def _attention(self, fact: str, jobs: Sequence[Job], warm: bool) -> dict[str, float | None]:
        """Time every attention call of one run of what is enabled; seconds of a clip.

        warm: it has run here before; otherwise it does so now, as masks are built and kernels compiled on the way.
        """
        known: dict[str, float | None] | None = self.store.read(fact)
        if known is None:
            self._check_time()
            batch = jobs[: self.batch]
            if not warm:
                run_steps(self.pipe, batch, lambda: False)
            taken = time_attention(self.pipe, batch, None)
            record = summary(self.pipe)
            seconds = taken.of_run(record.sparse_calls, record.dense_calls)
            known = {"seconds": None if seconds is None else seconds / len(batch), "run_density": record.run_density}
            self.store.write(fact, known)
        return known

    def frames(self, job: Job) -> Frames:
        """Return the dense clip of a job that was generated, float32 [T, H, W, 3] in [0, 1]."""
        found: Frames = np.load(self._path(job), allow_pickle=False)
        return found

    def strips(self, plan: Plan, job: Job) -> tuple[bytes, bytes]:
        """Return some frames of the dense clip and of a plan's clip that was rendered, as PNG."""
        return strip(self.frames(job)), self._strip(plan, job).read_bytes()

    def _strip(self, plan: Plan, job: Job) -> Path:
        return self.store.folder / "renders" / f"{_hash(plan.to_dict()['rules'])}-{_hash(asdict(job))}.png"

    def _keep(self, job: Job, frames: Frames) -> None:
        path = self._path(job)
        with staged(path.parent) as folder:
            np.save(folder / path.name, frames.astype(np.float32), allow_pickle=False)

    def _seconds(self, job: Job) -> float | None:
        """Return the seconds of a dense clip that is whole on disk, or None."""
        known = self.store.read(self._fact(job))
        path = self._path(job)
        if known is None or not path.exists():
            return None
        try:
            np.load(path, allow_pickle=False, mmap_mode="r")
        except (ValueError, OSError, EOFError) as error:
            self.store.set_aside(path, str(error))
            return None
        return float(known["seconds"])

    def _fact(self, job: Job) -> str:
        return f"{CLIPS}/dense-{_hash(asdict(job))}"

    def _path(self, job: Job) -> Path:
        return self.store.folder / CLIPS / f"dense-{_hash(asdict(job))}.npy"

    def _batches(self, what: str, jobs: Sequence[Job]) -> Iterator[Sequence[Job]]:
        """Cut jobs into batches, after one step of the first to warm up: masks are built and kernels compiled."""
        for at in range(0, len(jobs), self.batch):
            self.told(what, at, len(jobs))
            self._check_time()
            batch = jobs[at : at + self.batch]
            if at == 0:
                run_steps(self.pipe, batch, lambda: True)
            yield batch

    def _check_time(self) -> None:
        if self.stop():
            raise OutOfTimeError


def strip(frames: Frames) -> bytes:
    """Lay out STRIP_FRAMES frames of a clip [T, H, W, 3] side by side, as PNG; tall frames are made smaller."""
    chosen = frames[np.linspace(0, len(frames) - 1, min(STRIP_FRAMES, len(frames))).round().astype(int)]
    height, width = (round(side * min(1.0, STRIP_HEIGHT / frames.shape[1])) for side in frames.shape[1:3])
    tiles = [Image.fromarray(frame).resize((max(1, width), max(1, height))) for frame in to_bytes(chosen)]
    laid = Image.new("RGB", (sum(tile.width for tile in tiles), tiles[0].height))
    for number, tile in enumerate(tiles):
        laid.paste(tile, (number * tiles[0].width, 0))
    written = io.BytesIO()
    laid.save(written, format="PNG", optimize=True)
    return written.getvalue()


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
