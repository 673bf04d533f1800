"""The training script's own parts: runs go on where they stopped, steps are those of the slow twins."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from diffusers.models.transformers import transformer_wan
from torch import Tensor

from dit_sparse.assets.train import focus, measure
from dit_sparse.assets.train import trainer as trainer_module
from dit_sparse.assets.train.attention import draw, sampling_levels, shares, table
from dit_sparse.assets.train.batches import Batches, Size
from dit_sparse.assets.train.batches import draw as draw_batch
from dit_sparse.assets.train.judge import Crew
from dit_sparse.assets.train.muon import Muon
from dit_sparse.assets.train.parts import TextToVideo, read_trained, write_shards
from dit_sparse.assets.train.train import Stage, ahead, train
from dit_sparse.assets.train.trainer import RATE, WARM_UP_STEPS, Trainer

TINY = Size(height=16, batch=1)
ALONE = Crew(rank=0, world=1, device=torch.device("cpu"))


def _steps(trainer: Trainer, count: int) -> None:
    with focus.watched_attention():
        for _ in range(count):
            trainer.backward(TINY, trainer.clips)
            trainer.clips += TINY.batch
            trainer.update(progress=0.0)


def _rates(trainer: Trainer) -> list[float]:
    return [group["lr"] for optimizer in trainer.optimizers for group in optimizer.param_groups]


def test_a_resumed_run_takes_the_same_steps(tmp_path: Path) -> None:
    straight = Trainer(ALONE)
    _steps(straight, 1)
    straight.save(tmp_path / "state.pt")
    _steps(straight, 1)
    resumed = Trainer(ALONE)
    resumed.load(tmp_path / "state.pt")
    assert (resumed.step, resumed.clips) == (1, 1)
    _steps(resumed, 1)
    for before, after in zip(straight.parameters, resumed.parameters, strict=True):
        torch.testing.assert_close(before, after)
    assert any(not torch.equal(p, average) for p, average in zip(resumed.parameters, resumed.average, strict=True))


def test_another_machine_goes_on_from_averages_and_counters_and_warms_up_again(tmp_path: Path) -> None:
    here = Trainer(ALONE)
    _steps(here, 2)
    here.spent_s = 12.5
    here.hand_over(tmp_path)
    assert all(path.stat().st_size <= 16 << 20 for path in tmp_path.iterdir())
    there = Trainer(ALONE)
    there.take_over(tmp_path)
    assert (there.step, there.clips, there.spent_s) == (2, 2, 12.5)
    for average, p in zip(here.average, there.parameters, strict=True):
        assert torch.equal(average.bfloat16().float(), p)
    _steps(there, 1)
    assert _rates(there) == pytest.approx([RATE / WARM_UP_STEPS] * 2)


def test_a_killed_run_resumes_from_its_last_checkpoint(tmp_path: Path) -> None:
    command = [
        sys.executable, "-m", "dit_sparse.assets.train.train", "--tiny", "--out", str(tmp_path), "--save-s", "0",
        "--checkpoint", str(tmp_path / "state.pt"), "--budget-s", "1000",
    ]  # fmt: skip

    def lines() -> list[dict]:
        log = tmp_path / "log.jsonl"
        return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []

    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as running:
        try:
            deadline = time.time() + 120
            while not (tmp_path / "state.pt").exists():
                assert running.poll() is None, "the run ended before its first checkpoint"
                assert time.time() < deadline, "no checkpoint in two minutes"
                time.sleep(0.1)
        finally:
            running.kill()
    with (tmp_path / "log.jsonl").open("a") as log:  # what a run killed long after its checkpoint leaves
        log.writelines(json.dumps({"step": step}) + "\n" for step in (70, 80))
    subprocess.run([*command, "--resume", "--stop-after-s", "0"], check=True, stdout=subprocess.DEVNULL)
    after = [line["step"] for line in lines() if "step" in line]
    kept = torch.load(tmp_path / "state.pt", weights_only=True)["counters"][0]
    assert after == list(range(10, kept + 1, 10))
    assert kept in (20, 30)  # one report more than the checkpoint, which was the first or, killed late, the second
    read_trained(tmp_path)


def test_only_sizes_that_a_run_reaches_are_compiled() -> None:
    first, second, third = (Size(height, 1) for height in (16, 32, 64))
    stages = (Stage(0.2, (first, second)), Stage(0.5, (second, third)), Stage(1.0, (third,)))
    assert ahead(stages, 0.0, 0.1) == [first, second]
    assert ahead(stages, 0.1, 0.3) == [first, second, third]
    assert ahead(stages, 0.2, 0.3) == [second, third]
    assert ahead(stages, 0.5, 1.0) == [third]


def test_shards_hold_the_whole_model_in_bf16(tmp_path: Path) -> None:
    model = TextToVideo()
    paths = write_shards(model.state_dict(), tmp_path, shard_bytes=8 << 20)
    assert len(paths) == 4
    assert max(path.stat().st_size for path in paths) < 9 << 20
    again = read_trained(tmp_path).state_dict()
    assert all(torch.equal(value.bfloat16().float(), again[name]) for name, value in model.state_dict().items())


def test_muon_steps_like_torchs_own() -> None:
    shapes = ((32, 48), (48, 32), (32, 32), (32, 32))
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    before = [p.detach().clone() for p in ours]
    slow = torch.optim.Muon(theirs, lr=1e-2, adjust_lr_fn="match_rms_adamw")
    fast = Muon(ours, lr=1e-2)
    for _ in range(3):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        fast.step()
        slow.step()
    for a, b, start in zip(ours, theirs, before, strict=True):
        moved = (b - start).norm()
        assert moved > 0.1
        assert (a - b).norm() < 0.03 * moved  # both iterate in bf16, in another order


def test_a_batch_that_is_not_finite_is_left_out_and_many_are_told() -> None:
    trainer = Trainer(ALONE)
    _steps(trainer, 1)
    trainer.gradient[5] = torch.nan
    assert not trainer.update(progress=0.0).isfinite()
    assert all(p.isfinite().all() for p in [*trainer.parameters, *trainer.average])
    trainer.backward = lambda size, first: torch.full((2,), torch.nan)  # type: ignore[method-assign]
    stages = (Stage(1.0, (TINY,)),)
    with pytest.raises(FloatingPointError, match="finite, at step 10"):
        list(train(trainer, stages, 100.0, math.inf, None, 0.0))


def test_muon_refuses_what_is_no_matrix() -> None:
    with pytest.raises(ValueError, match=r"matrices, got \(3,\)"):
        Muon([torch.nn.Parameter(torch.ones(3))], lr=1e-3)


def test_spread_is_the_entropy_of_sampled_rows() -> None:
    q, k = torch.randn(2, 2, 40, 3, 16)
    rows = torch.rand(focus.ROWS)
    weights = torch.einsum("bqhd,bkhd->bhqk", q.double(), k.double()).div(4).softmax(-1)
    entropy = -(weights * weights.log()).sum(-1)[:, :, (rows * 40).long()]
    torch.testing.assert_close(focus.entropy_share(q, k, rows).double(), entropy.mean() / math.log(40))
    assert float(focus.entropy_share(q * 0, k, rows)) == pytest.approx(1.0)
    assert float(focus.entropy_share(q * 100, k, rows)) < 0.2


def test_watching_adds_up_layers_draws_gradients_and_ends() -> None:
    stock = transformer_wan.dispatch_attention_fn
    trainer = Trainer(ALONE)
    with focus.watched_attention():
        trainer.backward(TINY, 0)
        spread = focus.spread().detach()
    assert transformer_wan.dispatch_attention_fn is stock
    blocks = trainer.model.transformer.blocks
    assert 0 < float(spread) < len(blocks)
    trainer.gradient.zero_()
    with focus.watched_attention():
        latents, ids = measure.held_out(torch.arange(1), 16)
        focus.start(torch.rand(focus.ROWS))
        trainer.model(latents, torch.full((1,), 500.0), ids, 64)
        focus.spread().backward()
    for block in blocks:
        assert float(block.attn1.norm_q.weight.grad.abs().max()) > 0
    # the last layer's values and all that follows have no say in where attention goes
    assert float(blocks[-1].attn1.to_v.weight.grad.abs().max()) == 0


def test_a_picture_is_the_first_frame_of_its_clip() -> None:
    picture, clip = Size(16, 3, frames=1), Size(16, 3)
    index = torch.randint(1 << 40, (3,))
    (first, ids), (video, same_ids) = Batches()(picture, index), draw_batch(clip, index)
    assert torch.equal(first, video[:, :, :1])
    assert torch.equal(ids, same_ids)
    assert (picture.tokens, clip.tokens) == tuple(latents[0, 0].numel() // 4 for latents in (first, video))


@pytest.mark.gpu
def test_recorded_batches_are_what_is_drawn() -> None:
    size, batches = Size(32, 4, frames=5), Batches()
    for _ in range(3):
        index = torch.randint(1 << 40, (4,), device="cuda")
        for fast, slow in zip(batches(size, index), draw_batch(size, index), strict=True):
            assert torch.equal(fast, slow)


def test_attention_is_measured_at_the_levels_of_sampling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    levels = sampling_levels(16)
    assert levels[0] == pytest.approx(1.0)
    assert all(a > b > 0 for a, b in itertools.pairwise(levels))
    seen: list[float] = []

    def spy(model: TextToVideo, latents: Tensor, ids: Tensor, sigma: float) -> measure.Attention:
        seen.append(sigma)
        return stock(model, latents, ids, sigma, queries=8)

    stock = measure.attention
    monkeypatch.setattr(measure, "attention", spy)
    measured = shares(TextToVideo().eval(), height=16, steps=16, every=6, clips=2, device=torch.device("cpu"))
    assert seen == [levels[i] for i in (0, 0, 6, 6, 12, 12)]
    assert measured["tokens"] == 17 * 16
    assert [len(step) for step in measured["by_step"]] == [6, 6, 6]
    assert all(0 < head <= 1 for step in measured["by_step"] for layer in step for head in layer)
    real = {"models": {"wan2.1-t2v-1.3b": {"kept95_layer_head": [[0.1, 0.3]], "kept95_step": [0.3, 0.1]}}}
    assert "| wan2.1-t2v-1.3b | 0.200 | 0.110 / 0.200 / 0.290 |" in table(measured, real)
    draw(measured, real, tmp_path / "attention.png")
    assert (tmp_path / "attention.png").stat().st_size > 10_000


def test_the_rate_of_both_optimizers_falls_to_its_end() -> None:
    trainer = Trainer(ALONE)
    trainer.warm_from = -WARM_UP_STEPS
    trainer.update(progress=trainer_module.DECAY_FROM + (1 - trainer_module.DECAY_FROM) / 2)
    assert _rates(trainer) == pytest.approx([RATE / 2] * 2)
