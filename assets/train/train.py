r"""Train the bundled model on procedural clips, on one device or data-parallel under torchrun.

torchrun --nproc-per-node 2 -m dit_sparse.assets.train.train --out OUT --checkpoint OUT.pt --budget-s 1660 \
  --stop-after-s 540 --start-from assets/bundled
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TextIO

import torch
import torch.distributed as dist

from dit_sparse.assets.train.batches import Size
from dit_sparse.assets.train.focus import watched_attention
from dit_sparse.assets.train.judge import Crew, join, judge
from dit_sparse.assets.train.parts import CONTEXT_TOKENS
from dit_sparse.assets.train.trainer import Trainer

REPORT_STEPS = 10


@dataclass(frozen=True)
class Stage:
    """Steps cycle through `cycle` until the fraction `until` of the budget is spent."""

    until: float
    cycle: tuple[Size, ...]


# A picture is a clip's first frame: outlines, colours and textures for a sixteenth of the tokens.
PICTURE, LARGE_PICTURE = Size(64, 512, frames=1), Size(128, 128, frames=1)
LOW, MIDDLE, HIGH = Size(32, 128), Size(64, 32), Size(128, 8)
PADDED = replace(MIDDLE, context_tokens=CONTEXT_TOKENS)
FULL_STAGES = (
    Stage(0.09, (PICTURE, LOW, PICTURE)),
    Stage(0.42, (LARGE_PICTURE, MIDDLE, PICTURE, MIDDLE)),
    Stage(1.0, (HIGH, MIDDLE, LARGE_PICTURE, HIGH, MIDDLE, HIGH, PADDED)),
)
TINY_STAGES = (Stage(0.4, (Size(16, 2, frames=1),)), Stage(1.0, (Size(16, 1), Size(16, 2))))  # a check on a CPU


def ahead(stages: tuple[Stage, ...], start: float, stop: float) -> list[Size]:
    """Return the sizes of all steps between two fractions of the budget, each once."""
    begins = (0.0, *(stage.until for stage in stages))
    reached = (s for begin, s in zip(begins, stages, strict=False) if begin < stop and start < s.until)
    return list(dict.fromkeys(size for stage in reached for size in stage.cycle))


def warm_up(trainer: Trainer, sizes: list[Size]) -> Iterator[dict]:
    """Compile and run every size once before the clock starts; yield its cost. Gradients are thrown away."""
    for size in sizes:
        started = time.time()
        trainer.backward(size, first_clip=1 << 40)
        _synchronize(trainer.crew)
        compile_s, started = time.time() - started, time.time()
        for _ in range(3):
            trainer.backward(size, first_clip=1 << 40)
        _synchronize(trainer.crew)
        rate = 3 * size.batch * trainer.crew.world / (time.time() - started)
        yield {"warm_up": asdict(size), "compile_s": round(compile_s, 2), "clips_per_s": round(rate, 1)}
        trainer.gradient.zero_()


def train(
    trainer: Trainer, stages: tuple[Stage, ...], budget_s: float, stop_at: float, checkpoint: Path | None, save_s: float
) -> Iterator[dict]:
    """Train until the budget is spent or the clock reads `stop_at`; yield one line every few steps.

    The checkpoint is written every `save_s` seconds: a kill costs no more.
    """
    crew, saved = trainer.crew, time.time()
    before_s, started = trainer.spent_s, time.time()
    progress, losses, names, seen = before_s / budget_s, [], [], trainer.clips
    while progress < 1:
        stage = next(stage for stage in stages if progress < stage.until)
        size = stage.cycle[trainer.step % len(stage.cycle)]
        losses.append(trainer.backward(size, trainer.clips))
        names.append(size.name)
        trainer.clips += size.batch * crew.world
        norm = trainer.update(progress)
        if trainer.step % REPORT_STEPS:
            continue
        _synchronize(crew)
        clock = torch.tensor([time.time() - started, time.time() - stop_at], device=crew.device)
        means = torch.stack(losses)
        if crew.world > 1:  # all devices must agree on when to stop
            dist.all_reduce(clock, op=dist.ReduceOp.MAX)
            dist.all_reduce(means)
            means /= crew.world
        if not means.isfinite().any():  # the same on all devices; single batches are left out by update()
            raise FloatingPointError(
                f"no loss of the last {len(losses)} steps is finite, at step {trainer.step}: the weights are bad; "
                "resume from the last checkpoint, which is older, with a lower rate"
            )
        trainer.spent_s = before_s + clock[0].item()
        progress = trainer.spent_s / budget_s
        by_size = {n: means[[m == n for m in names]].mean(dim=0).tolist() for n in sorted(set(names))}
        yield {
            "step": trainer.step,
            "clips": trainer.clips,
            "spent_s": round(trainer.spent_s, 2),
            "loss": {name: round(loss, 5) for name, (loss, _) in by_size.items()},
            "spread": {name: round(spread, 4) for name, (_, spread) in by_size.items()},
            "norm": round(norm.item(), 4),
            "clips_in_interval": trainer.clips - seen,
        }
        losses, names, seen = [], [], trainer.clips
        if checkpoint and crew.rank == 0 and time.time() - saved > save_s:
            trainer.save(checkpoint)
            saved = time.time()
        if clock[1] > 0:
            return


def _synchronize(crew: Crew) -> None:
    if crew.device.type == "cuda":
        torch.cuda.synchronize(crew.device)


def _continued(path: Path, step: int) -> TextIO:
    """Open a log to go on after `step`, without the lines that a killed run wrote past its checkpoint."""
    lines = path.read_text().splitlines() if path.exists() else []
    beside = path.with_suffix(".part")
    beside.write_text("".join(line + "\n" for line in lines if json.loads(line).get("step", 0) <= step))
    beside.replace(path)
    return path.open("a")


def main() -> None:
    launched = time.time()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for shards, log, sheets and measures")
    parser.add_argument("--checkpoint", type=Path, help="full state, read by --resume and written at the end")
    parser.add_argument("--save-s", type=float, default=120.0, help="seconds between checkpoints")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument(
        "--start-from", type=Path, help="folder that another run left, or of a pipeline: weights to go on from"
    )
    parser.add_argument("--budget-s", type=float, default=1660.0, help="seconds of training over all runs")
    parser.add_argument("--stop-after-s", type=float, default=540.0, help="seconds of this run, training part")
    parser.add_argument("--warm-up-only", action="store_true", help="compile and time every shape, then leave")
    parser.add_argument("--judge", action="store_true", help="samples and measures although the budget is not spent")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, no compilation: checks the script on a CPU")
    options = parser.parse_args()

    if options.resume and not options.checkpoint:
        parser.error("--resume reads the file of --checkpoint: give it, too")
    for folder in (options.out, *([options.checkpoint.parent] if options.checkpoint else [])):
        folder.mkdir(parents=True, exist_ok=True)  # before hours of training, not after

    crew = join("nccl" if torch.cuda.is_available() else "gloo")
    torch.set_float32_matmul_precision("high")
    trainer = Trainer(crew)
    if options.start_from:
        trainer.take_over(options.start_from)
    if options.resume:
        trainer.load(options.checkpoint)
    stages = TINY_STAGES if options.tiny else FULL_STAGES
    if not options.tiny:
        # Every size and padding is a graph of its own, made once in the warm-up.
        torch._dynamo.config.recompile_limit = 64
        trainer.model.transformer.compile_repeated_blocks(dynamic=False)
    log = _continued(options.out / "log.jsonl", trainer.step) if crew.rank == 0 else None

    def write(line: dict) -> None:
        if log:
            log.write(json.dumps(line) + "\n")
            log.flush()
            if "step" not in line or line["step"] % 100 == 0:
                print(json.dumps(line), flush=True)

    write({"world": crew.world, "torch": torch.__version__, "parameters": trainer.gradient.numel()})
    begin = trainer.spent_s / options.budget_s
    sizes = ahead(stages, begin, min(1.0, begin + options.stop_after_s / options.budget_s))
    first = crew.rank * len(sizes) // crew.world  # each process compiles others first, see join()
    sizes = sizes[first:] + sizes[:first]
    with watched_attention():
        for line in warm_up(trainer, sizes):
            write(line)
        if not options.warm_up_only:
            until = launched + options.stop_after_s
            for line in train(trainer, stages, options.budget_s, until, options.checkpoint, options.save_s):
                write(line)
    finished = trainer.spent_s >= options.budget_s
    if crew.rank == 0 and not options.warm_up_only:
        trainer.hand_over(options.out)
        if options.checkpoint:
            trainer.save(options.checkpoint)
    if finished or options.judge:
        heights, steps = ((16,), (2,)) if options.tiny else ((64, 128), (16, 30))
        judge(trainer.averaged(), crew, options.out, heights, steps)
    write({"finished": finished, "seconds": round(time.time() - launched, 1)})
    if crew.world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
