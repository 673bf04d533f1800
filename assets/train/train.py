"""Train the bundled model on procedural clips, on one device or data-parallel under torchrun.

torchrun --nproc-per-node 4 -m dit_sparse.assets.train.train --out OUT --budget-s 850 --stop-after-s 540
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from dit_sparse.assets.train.clips import CLIP_FRAMES, caption_ids, scene
from dit_sparse.assets.train.judge import Crew, judge
from dit_sparse.assets.train.measure import to_latents
from dit_sparse.assets.train.parts import CONTEXT_TOKENS, SAMPLING_SHIFT, TextToVideo, read_shards, write_shards
from dit_sparse.assets.train.render import render
from dit_sparse.assets.train.words import UNKNOWN, vocabulary

SEED = 1
PEAK_RATE = 1e-3
WARM_UP_STEPS = 150
DECAY_FROM = 0.55  # fraction of the budget
EMA = 0.999
CAPTION_DROP = 0.10
WORD_DROP = 0.02
REPORT_STEPS = 10
SHORT_CONTEXT = 64


@dataclass(frozen=True)
class Size:
    """One kind of step: square clips of `height` pixels, `batch` of them on each device."""

    height: int
    batch: int

    @property
    def tokens(self) -> int:
        return (CLIP_FRAMES // 2 + 1) * (self.height // 4) ** 2


@dataclass(frozen=True)
class Stage:
    """Steps cycle through `cycle` until the fraction `until` of the budget is spent."""

    until: float
    cycle: tuple[Size, ...]


LOW, MIDDLE, HIGH = Size(32, 128), Size(64, 32), Size(128, 8)
FULL_STAGES = (Stage(0.12, (LOW,)), Stage(0.58, (MIDDLE,)), Stage(1.0, (MIDDLE, MIDDLE, HIGH)))
TINY_STAGES = (Stage(0.4, (Size(16, 2),)), Stage(1.0, (Size(16, 1), Size(16, 2))))  # a check on a CPU


class Trainer:
    """Model, moving average, optimizer and the counters that a checkpoint carries."""

    def __init__(self, crew: Crew) -> None:
        torch.manual_seed(SEED)
        self.crew = crew
        self.model = TextToVideo().to(crew.device)
        self.parameters: list[Tensor] = [p for p in self.model.parameters() if p.requires_grad]
        # One flat buffer behind all gradients: one all-reduce, one norm, one fill a step.
        self.gradient = torch.zeros(sum(p.numel() for p in self.parameters), device=crew.device)
        offset = 0
        for p in self.parameters:
            p.grad = self.gradient[offset : offset + p.numel()].view_as(p)
            offset += p.numel()
        self.average = [p.detach().clone() for p in self.parameters]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=PEAK_RATE, betas=(0.9, 0.98), weight_decay=0.01, fused=crew.device.type == "cuda"
        )
        self.step, self.clips, self.spent_s = 0, 0, 0.0

    def save(self, path: Path) -> None:
        state = {
            "model": self.model.state_dict(),
            "average": self.average,
            "optimizer": self.optimizer.state_dict(),
            "counters": (self.step, self.clips, self.spent_s),
        }
        torch.save(state, path)

    def load(self, path: Path) -> None:
        state = torch.load(path, map_location=self.crew.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.average = state["average"]
        self.step, self.clips, self.spent_s = state["counters"]

    def averaged(self) -> TextToVideo:
        """Return an uncompiled copy of the model with the moving average as weights."""
        model = TextToVideo().to(self.crew.device)
        model.load_state_dict(self.model.state_dict())
        with torch.no_grad():
            for p, average in zip(model.parameters(), self.average, strict=True):
                p.copy_(average)
        return model.eval()

    def backward(self, size: Size, context_tokens: int, first_clip: int) -> Tensor:
        """Add the gradient of one batch to the buffer; return its loss."""
        device = self.crew.device
        index = torch.arange(size.batch, device=device) + first_clip + self.crew.rank * size.batch
        with torch.no_grad():
            clips = scene(SEED, index)
            latents = to_latents(render(clips, CLIP_FRAMES, size.height, size.height))
            ids = caption_ids(clips)
            random = torch.Generator(device).manual_seed(1_000_003 * self.step + self.crew.rank)
            uniform = torch.rand(ids.shape, generator=random, device=device)
            ids = torch.where((uniform < WORD_DROP) & (ids > 0), vocabulary()[UNKNOWN], ids)
            ids = ids * (torch.rand(size.batch, 1, generator=random, device=device) >= CAPTION_DROP)
            noise = torch.randn(latents.shape, generator=random, device=device)
            sigma = torch.sigmoid(torch.randn(size.batch, generator=random, device=device))
            # The more tokens a clip has, the more noise it takes to hide its layout.
            shift = SAMPLING_SHIFT * (size.tokens / 4352) ** 0.4
            sigma = shift * sigma / (1 + (shift - 1) * sigma)
            at = sigma[:, None, None, None, None]
            noisy = (1 - at) * latents + at * noise
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            predicted = self.model(noisy, sigma * 1000, ids, context_tokens)
        loss = F.mse_loss(predicted.float(), noise - latents)
        loss.backward()
        return loss.detach()

    def update(self, progress: float) -> Tensor:
        """Average the gradients of all devices, take one step; return the gradient norm."""
        if self.crew.world > 1:
            dist.all_reduce(self.gradient)
            self.gradient /= self.crew.world
        norm = self.gradient.norm()
        self.gradient *= (1.0 / (norm + 1e-6)).clamp(max=1.0)
        decay = max(0.01, min(1.0, (1 - progress) / (1 - DECAY_FROM)))
        for group in self.optimizer.param_groups:
            group["lr"] = PEAK_RATE * decay * min(1.0, (self.step + 1) / WARM_UP_STEPS)
        self.optimizer.step()
        self.gradient.zero_()
        self.step += 1
        weight = 1 - min(EMA, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(self.average, self.parameters, weight)
        return norm


def warm_up(trainer: Trainer, stages: tuple[Stage, ...]) -> Iterator[dict]:
    """Compile and run every shape once before the clock starts; yield its cost. Gradients are thrown away."""
    for size in dict.fromkeys(size for stage in stages for size in stage.cycle):
        for context_tokens in (SHORT_CONTEXT, CONTEXT_TOKENS):
            started = time.time()
            trainer.backward(size, context_tokens, first_clip=1 << 40)
            _synchronize(trainer.crew)
            compile_s, started = time.time() - started, time.time()
            for _ in range(3):
                trainer.backward(size, context_tokens, first_clip=1 << 40)
            _synchronize(trainer.crew)
            rate = 3 * size.batch * trainer.crew.world / (time.time() - started)
            yield {"warm_up": asdict(size), "context": context_tokens, "compile_s": compile_s, "clips_per_s": rate}
            trainer.gradient.zero_()


def train(trainer: Trainer, stages: tuple[Stage, ...], budget_s: float, stop_at: float) -> Iterator[dict]:
    """Train until the budget is spent or the clock reads `stop_at`; yield one line every few steps."""
    crew = trainer.crew
    before_s, started = trainer.spent_s, time.time()
    progress, losses, names, seen = before_s / budget_s, [], [], trainer.clips
    while progress < 1:
        stage = next(stage for stage in stages if progress < stage.until)
        size = stage.cycle[trainer.step % len(stage.cycle)]
        # Both paddings meet every size: the cycles' lengths have no factor 4.
        context_tokens = CONTEXT_TOKENS if trainer.step % 4 == 3 else SHORT_CONTEXT
        losses.append(trainer.backward(size, context_tokens, trainer.clips))
        names.append(size.height)
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
        trainer.spent_s = before_s + clock[0].item()
        progress = trainer.spent_s / budget_s
        by_size = {h: [m for m, n in zip(means.tolist(), names, strict=True) if n == h] for h in sorted(set(names))}
        yield {
            "step": trainer.step,
            "clips": trainer.clips,
            "spent_s": round(trainer.spent_s, 2),
            "loss": {str(h): round(sum(values) / len(values), 5) for h, values in by_size.items()},
            "norm": round(norm.item(), 4),
            "clips_in_interval": trainer.clips - seen,
        }
        losses, names, seen = [], [], trainer.clips
        if clock[1] > 0:
            return


def _synchronize(crew: Crew) -> None:
    if crew.device.type == "cuda":
        torch.cuda.synchronize(crew.device)


def _join() -> Crew:
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    if world > 1:
        dist.init_process_group("nccl" if cuda else "gloo")
    return Crew(rank, world, device)


def main() -> None:
    launched = time.time()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for shards, log, sheets and measures")
    parser.add_argument("--checkpoint", type=Path, help="full state, read by --resume and written at the end")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--start-from", type=Path, help="folder of shards to start from (fresh optimizer)")
    parser.add_argument("--budget-s", type=float, default=850.0, help="seconds of training over all runs")
    parser.add_argument("--stop-after-s", type=float, default=540.0, help="seconds of this run, training part")
    parser.add_argument("--warm-up-only", action="store_true", help="compile and time every shape, then leave")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, no compilation: checks the script on a CPU")
    options = parser.parse_args()

    crew = _join()
    trainer = Trainer(crew)
    if options.start_from:
        trainer.model.load_state_dict(read_shards(options.start_from).state_dict())
        trainer.average = [p.detach().clone() for p in trainer.parameters]
    if options.resume:
        trainer.load(options.checkpoint)
    stages = TINY_STAGES if options.tiny else FULL_STAGES
    if not options.tiny:
        # Every size and padding is a graph of its own, made once in the warm-up.
        torch._dynamo.config.recompile_limit = 64
        trainer.model.transformer.compile_repeated_blocks(dynamic=False)
    options.out.mkdir(parents=True, exist_ok=True)
    log = (options.out / "log.jsonl").open("a") if crew.rank == 0 else None

    def write(line: dict) -> None:
        if log:
            log.write(json.dumps(line) + "\n")
            log.flush()
            if "step" not in line or line["step"] % 100 == 0:
                print(json.dumps(line), flush=True)

    write({"world": crew.world, "torch": torch.__version__, "parameters": trainer.gradient.numel()})
    for line in warm_up(trainer, stages):
        write(line)
    if not options.warm_up_only:
        for line in train(trainer, stages, options.budget_s, launched + options.stop_after_s):
            write(line)
        if crew.rank == 0:
            if options.checkpoint:
                trainer.save(options.checkpoint)
            write_shards(trainer.averaged().state_dict(), options.out)
        if trainer.spent_s >= options.budget_s:
            heights, steps = ((16,), (2,)) if options.tiny else ((64, 128), (16, 30))
            judge(trainer.averaged(), crew, options.out, heights, steps)
        write({"finished": trainer.spent_s >= options.budget_s, "seconds": round(time.time() - launched, 1)})
    if crew.world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
