"""The state of a training run: model, moving average, optimizers, counters; one batch, one update."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from dit_sparse.assets.train import focus
from dit_sparse.assets.train.batches import SEED, Batches, Size
from dit_sparse.assets.train.judge import Crew
from dit_sparse.assets.train.muon import Muon
from dit_sparse.assets.train.parts import COUNTERS, SAMPLING_SHIFT, TextToVideo, read_trained, write_json, write_shards
from dit_sparse.assets.train.words import UNKNOWN, vocabulary

RATE = 1e-3  # of both optimizers: Muon's steps are scaled to the size of AdamW's
WARM_UP_STEPS = 150
DECAY_FROM = 0.55  # fraction of the budget
EMA = 0.999
CAPTION_DROP = 0.10
WORD_DROP = 0.02
FOCUS = 0.03  # weight of the attention's distance from SPREAD beside a velocity loss of .07 to .1
SPREAD = 0.6  # entropy of attention rows over its maximum; version 1 had .74, and released models are more focused
REFERENCE_TOKENS = 4352  # where training and sampling shift noise alike


class Trainer:
    """Model, moving average, optimizers and the counters that a checkpoint carries.

    All randomness of a step follows from its number, the rank and the number of clips seen: they are the RNG's state.
    """

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
        self.optimizers = _optimizers(self.model)
        self.batches = Batches()
        self.step, self.clips, self.spent_s, self.warm_from = 0, 0, 0.0, 0

    def save(self, path: Path) -> None:
        """Write everything, to resume on this machine; written beside and renamed, so a kill loses nothing."""
        state = {
            "model": self.model.state_dict(),
            "average": self.average,
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "counters": (self.step, self.clips, self.spent_s, self.warm_from),
        }
        beside = path.with_suffix(".part")
        torch.save(state, beside)
        beside.replace(path)

    def load(self, path: Path) -> None:
        """Read what `save` wrote."""
        state = torch.load(path, map_location=self.crew.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.average = state["average"]
        self.step, self.clips, self.spent_s, self.warm_from = state["counters"]

    def hand_over(self, folder: Path) -> None:
        """Write the averaged weights in bf16 files of at most 15 MiB and the counters, to go on elsewhere."""
        write_shards(self.averaged().state_dict(), folder)
        write_json(folder / COUNTERS, {"step": self.step, "clips": self.clips, "spent_s": self.spent_s})

    def take_over(self, folder: Path) -> None:
        """Go on from what `hand_over` or `save_pretrained` wrote; the optimizers start anew and warm up again."""
        self.model.load_state_dict(read_trained(folder).state_dict())
        self.average = [p.detach().clone() for p in self.parameters]
        counters = folder / COUNTERS
        if counters.exists():
            saved = json.loads(counters.read_text())
            self.step, self.clips, self.spent_s = saved["step"], saved["clips"], saved["spent_s"]
        self.warm_from = self.step

    def averaged(self) -> TextToVideo:
        """Return an uncompiled copy of the model with the moving average as weights."""
        model = TextToVideo().to(self.crew.device)
        model.load_state_dict(self.model.state_dict())
        with torch.no_grad():
            for p, average in zip(model.parameters(), self.average, strict=True):
                p.copy_(average)
        return model.eval()

    def backward(self, size: Size, first_clip: int) -> Tensor:
        """Add the gradient of one batch to the buffer; return its velocity loss and the spread of attention, [2]."""
        device = self.crew.device
        index = torch.arange(size.batch, device=device) + first_clip + self.crew.rank * size.batch
        with torch.no_grad():
            latents, ids = self.batches(size, index)
            random = torch.Generator(device).manual_seed(1_000_003 * self.step + self.crew.rank)
            uniform = torch.rand(ids.shape, generator=random, device=device)
            ids = ids.masked_fill((uniform < WORD_DROP) & (ids > 0), vocabulary()[UNKNOWN])
            ids = ids * (torch.rand(size.batch, 1, generator=random, device=device) >= CAPTION_DROP)
            noise = torch.randn(latents.shape, generator=random, device=device)
            sigma = torch.sigmoid(torch.randn(size.batch, generator=random, device=device))
            # The more tokens a clip has, the more noise it takes to hide its layout.
            shift = SAMPLING_SHIFT * (size.tokens / REFERENCE_TOKENS) ** 0.4
            sigma = shift * sigma / (1 + (shift - 1) * sigma)
            at = sigma[:, None, None, None, None]
            noisy = (1 - at) * latents + at * noise
            focus.start(torch.rand(focus.ROWS, generator=random, device=device))
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            predicted = self.model(noisy, sigma * 1000, ids, size.context_tokens)
        loss = F.mse_loss(predicted.float(), noise - latents)
        spread = focus.spread() / len(self.model.transformer.blocks)
        (loss + FOCUS * (spread - SPREAD).abs()).backward()
        return torch.stack([loss.detach(), spread.detach()])

    def update(self, progress: float) -> Tensor:
        """Average the gradients of all devices, take one step; return the gradient norm."""
        if self.crew.world > 1:
            dist.all_reduce(self.gradient)
            self.gradient /= self.crew.world
        norm = self.gradient.norm()
        # A batch whose gradient is not finite is left out.
        factor = torch.where(norm.isfinite(), (1.0 / (norm + 1e-6)).clamp(max=1.0), 0.0)
        self.gradient.nan_to_num_(0.0, 0.0, 0.0).mul_(factor)
        decay = max(0.01, min(1.0, (1 - progress) / (1 - DECAY_FROM)))
        warm = min(1.0, (self.step - self.warm_from + 1) / WARM_UP_STEPS)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = RATE * decay * warm
            optimizer.step()
        self.gradient.zero_()
        self.step += 1
        weight = 1 - min(EMA, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(self.average, self.parameters, weight)
        return norm


def _optimizers(model: TextToVideo) -> list[torch.optim.Optimizer]:
    """Return Muon for the matrices of all blocks and AdamW for the rest."""
    matrices: list[Tensor] = []
    rest: list[Tensor] = []
    for name, p in model.named_parameters():
        if p.requires_grad:
            inside = ".blocks." in name or ".layers." in name
            (matrices if inside and p.ndim == 2 else rest).append(p)
    fused = rest[0].device.type == "cuda"
    return [
        Muon(matrices, lr=RATE),
        torch.optim.AdamW(rest, lr=RATE, betas=(0.9, 0.98), weight_decay=0.01, fused=fused),
    ]
