"""Clips of held-out prompts: dense once, each plan once, measured against each other and kept on disk, one by one."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator, Sequence
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
from dit_sparse.search.metrics import Frames, Metrics, measure
from dit_sparse.search.planner.capture import Stop, Told
from dit_sparse.search.planner.store import Store
from dit_sparse.search.staging import staged
from dit_sparse.search.video import to_bytes

CLIPS = "clips"
STRIP_FRAMES, STRIP_HEIGHT = 6, 128
SEED_APART = 1_000_003  # of the clip that tells how far another seed is


class OutOfTimeError(Exception):
    """The limit of a search was reached between two clips."""


@dataclass(frozen=True)
class Render:
    """Hold what one plan's clips measured: one Metrics for each job, seconds of a clip and of its attention."""

    metrics: tuple[Metrics, ...]
    seconds: tuple[float, ...]
    attention_seconds: float | None
    run_density: float | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Render:
        metrics = tuple(Metrics(**one) for one in values["metrics"])
        return cls(metrics, tuple(values["seconds"]), values["attention_seconds"], values["run_density"])

    @property
    def squared_error(self) -> float:
        """Return the mean squared error of the clips, of pixel values in [0, 1]."""
        return float(np.mean([0.0 if m.psnr_db is None else 10 ** (-m.psnr_db / 10) for m in self.metrics]))


class Renders:
    """Generate clips of `jobs` with plans, `batch` at a time; what is on disk is not generated again.

    backend: of the sparse calls. Raises OutOfTimeError where `stop()` says so before a batch.
    """

    def __init__(
        self, pipe: Any, jobs: Sequence[Job], batch: int, store: Store, backend: str, stop: Stop, told: Told
    ) -> None:
        self.pipe, self.jobs, self.batch, self.store, self.backend = pipe, tuple(jobs), batch, store, backend
        self.stop, self.told = stop, told

    def dense(self) -> Render:
        """Generate the dense clips that every plan is measured against, and time them."""
        known = self.store.read("dense")
        if known is not None and all(self._path(job).exists() for job in self.jobs):
            return Render.from_dict(known)
        run_steps(self.pipe, self.jobs[: self.batch], lambda: True)
        seconds = []
        for jobs in self._batches("dense clips", self.jobs):
            for job, clip in zip(jobs, generate_batch(self.pipe, jobs), strict=True):
                seconds.append(clip.seconds)
                self._keep(job, clip.frames)
        with sparse(self.pipe, Plan.dense()):
            timed = self._time_attention(self.jobs)
        same = Metrics(None, None, None, None, True)
        found = Render((same,) * len(self.jobs), tuple(seconds), timed["seconds"], 1.0)
        self.store.write("dense", found.to_dict())
        return found

    def of(self, plan: Plan, what: str, jobs: Sequence[Job] | None = None) -> Render:
        """Generate the clips of a plan, for some jobs only if they are given, and measure them."""
        wanted = self.jobs if jobs is None else tuple(jobs)
        name = f"renders/{_hash(plan.to_dict()['rules'])}"
        names = {job: f"{name}-{_hash(asdict(job))}" for job in wanted}
        missing = [job for job in wanted if self.store.read(names[job]) is None]
        with sparse(self.pipe, plan, min_tokens=0, backend=self.backend):
            if missing:
                run_steps(self.pipe, missing[: self.batch], lambda: True)  # masks are built and kernels compiled
            for batch in self._batches(what, missing):
                for job, clip in zip(batch, generate_batch(self.pipe, batch), strict=True):
                    with staged(self.store.folder / "renders") as folder:
                        (folder / self._strip(plan, job).name).write_bytes(strip(clip.frames))
                    found = {"metrics": asdict(measure(self.frames(job), clip.frames)), "seconds": clip.seconds}
                    self.store.write(names[job], found)
            timed = self.store.read(f"{name}-attention")
            if timed is None:
                timed = self._time_attention(wanted)
                self.store.write(f"{name}-attention", timed)
        clips: list[Any] = [self.store.read(names[job]) for job in wanted]
        metrics = tuple(Metrics(**clip["metrics"]) for clip in clips)
        return Render(metrics, tuple(clip["seconds"] for clip in clips), timed["seconds"], timed["run_density"])

    def _time_attention(self, jobs: Sequence[Job]) -> dict[str, float | None]:
        """Time every attention call of one run of what is enabled; seconds of a clip."""
        batch = jobs[: self.batch]
        taken = time_attention(self.pipe, batch, None)
        record = summary(self.pipe)
        seconds = taken.of_run(record.sparse_calls, record.dense_calls)
        return {"seconds": None if seconds is None else seconds / len(batch), "run_density": record.run_density}

    def yardsticks(self, most: int = 4) -> dict[str, Metrics]:
        """Measure how far another seed's clip is, and that of another kernel that reads every block; means of some."""
        known = self.store.read("yardsticks")
        if known is not None:
            return {name: Metrics(**values) for name, values in known.items()}
        other: list[Metrics] = []
        kernel: list[Metrics] = []
        for batch in self._batches("yardsticks", self.jobs[:most]):
            others = [replace(job, seed=job.seed + SEED_APART) for job in batch]
            for found, jobs, plan in ((other, others, Plan.dense()), (kernel, batch, Plan.of(TopBlocks(keep=1.0)))):
                with sparse(self.pipe, plan, min_tokens=0, backend=self.backend):
                    clips = generate_batch(self.pipe, jobs)
                found += [measure(self.frames(job), clip.frames) for job, clip in zip(batch, clips, strict=True)]
        means = {"another seed": mean_metrics(other), "another dense kernel": mean_metrics(kernel)}
        self.store.write("yardsticks", {name: asdict(one) for name, one in means.items()})
        return means

    def frames(self, job: Job) -> Frames:
        """Return the dense clip of a job, float32 [T, H, W, 3] in [0, 1]."""
        found: Frames = np.load(self._path(job), allow_pickle=False).astype(np.float32)
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

    def _path(self, job: Job) -> Path:
        return self.store.folder / CLIPS / f"dense-{_hash(asdict(job))}.npy"

    def _batches(self, what: str, jobs: Sequence[Job]) -> Iterator[Sequence[Job]]:
        for at in range(0, len(jobs), self.batch):
            self.told(what, at, len(jobs))
            if self.stop():
                raise OutOfTimeError
            yield jobs[at : at + self.batch]


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


def mean_metrics(clips: Sequence[Metrics]) -> Metrics:
    """Return the mean of each metric over the clips that have it; PSNR of identical clips counts as none."""

    def mean(name: str) -> float | None:
        values = [value for clip in clips if (value := getattr(clip, name)) is not None]
        return float(np.mean(values)) if values else None

    identical = all(clip.identical for clip in clips)
    return Metrics(mean("psnr_db"), mean("ssim"), mean("flicker"), mean("warp_error"), identical)


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
