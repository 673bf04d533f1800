"""The training script's own parts: a resumed run goes on where the first one stopped; shards hold everything."""

from __future__ import annotations

from pathlib import Path

import torch

from dit_sparse.assets.train.judge import Crew
from dit_sparse.assets.train.parts import TextToVideo, read_shards, write_shards
from dit_sparse.assets.train.train import Size, Trainer

TINY = Size(height=16, batch=1)


def _steps(trainer: Trainer, count: int) -> None:
    for _ in range(count):
        trainer.backward(TINY, 64, trainer.clips)
        trainer.clips += TINY.batch
        trainer.update(progress=0.0)


def test_a_resumed_run_takes_the_same_steps(tmp_path: Path) -> None:
    crew = Crew(rank=0, world=1, device=torch.device("cpu"))
    straight = Trainer(crew)
    _steps(straight, 1)
    straight.save(tmp_path / "state.pt")
    _steps(straight, 1)
    resumed = Trainer(crew)
    resumed.load(tmp_path / "state.pt")
    assert (resumed.step, resumed.clips) == (1, 1)
    _steps(resumed, 1)
    for before, after in zip(straight.parameters, resumed.parameters, strict=True):
        torch.testing.assert_close(before, after)
    assert any(not torch.equal(p, average) for p, average in zip(resumed.parameters, resumed.average, strict=True))


def test_shards_hold_the_whole_model_in_bf16(tmp_path: Path) -> None:
    model = TextToVideo()
    paths = write_shards(model.state_dict(), tmp_path, shard_bytes=8 << 20)
    assert len(paths) == 4
    assert max(path.stat().st_size for path in paths) < 9 << 20
    again = read_shards(tmp_path).state_dict()
    assert all(torch.equal(value.bfloat16().float(), again[name]) for name, value in model.state_dict().items())
