"""Patterns and plans on a real GPU: against FP64 on the same blocks, without a host sync, and inside a pipeline."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import dit_sparse as ds
from dit_sparse.attention import Layer, attend, dense_attention
from dit_sparse.options import Options
from dit_sparse.schedule import Schedule
from dit_sparse.search.row_check import check_rows
from tests.core.examples import EXAMPLES

pytestmark = pytest.mark.gpu

GRID = ds.Grid(5, 12, 20, prefix=9, suffix=140)  # ragged tiles, text on both sides
PATTERNS = [pattern for patterns in EXAMPLES.values() for pattern in patterns]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])  # CogVideoX and the bundled model, Wan
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_rows_of_every_pattern_meet_float64(pattern: ds.Pattern, head_dim: int, dtype: torch.dtype) -> None:
    error, allowed = check_rows(pattern, GRID, 4, head_dim, torch.device("cuda"), dtype)
    assert error <= allowed


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_a_call_never_waits_for_the_device(pattern: ds.Pattern) -> None:
    attend = ds.SparseAttention(pattern, "triton")
    q, k, v = (torch.randn(1, GRID.tokens, 4, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    attend(q, k, v, GRID)
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        attend(q, k, v, GRID)
    finally:
        torch.cuda.set_sync_debug_mode(mode)


@pytest.mark.parametrize("options", [{"recall": 0.9}, {"residual": True}], ids=str)
def test_a_cached_run_under_monitoring_never_waits(options: dict[str, Any]) -> None:
    """Drift, renewal, residual and monitoring over a run: the device decides, the host goes on."""
    plan = ds.Plan.of(ds.Cached(ds.TopBlocks(0.3), 2, **options))
    schedule = Schedule(plan, options=Options(min_tokens=0, monitor=True))
    layer = Layer("layer", 0, schedule, dense_attention)
    steps = [torch.randn(3, 2, GRID.tokens, 4, 64, device="cuda", dtype=torch.bfloat16) for _ in range(6)]
    mode = torch.cuda.get_sync_debug_mode()
    for run in ("first", "second"):
        if run == "second":  # which compiles and builds nothing
            torch.cuda.set_sync_debug_mode("error")
        try:
            for step, (q, k, v) in enumerate(steps):
                schedule.start_forward(GRID, step=step, total_steps=len(steps), run=run)
                attend(layer, q, k, v)
        finally:
            torch.cuda.set_sync_debug_mode(mode)
    measured = schedule.summary().measured
    assert measured is not None
    assert 0.1 < measured.recall < 0.9


def test_bundled_pipeline_dense_is_bit_exact_and_everything_kept_is_close() -> None:
    from dit_sparse.pipelines.bundled import defaults, load_bundled

    pipe, size = load_bundled("cuda"), defaults("cuda")
    pipe.set_progress_bar_config(disable=True)

    def latents() -> torch.Tensor:
        return pipe(
            "a red circle bouncing on a white background", height=size.height, width=size.width,
            num_frames=size.num_frames, num_inference_steps=3, max_sequence_length=size.max_sequence_length,
            generator=torch.Generator().manual_seed(0), output_type="latent",
        ).frames  # fmt: skip

    stock = latents()
    # the text encoder's masked attention needs the second one
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]):
        other_kernel = latents()
    with ds.sparse(pipe, ds.Plan.dense()):
        assert torch.equal(latents(), stock)
    with ds.sparse(pipe, ds.TopBlocks(keep=1.0)):
        everything = latents()
        assert ds.summary(pipe).sparse_calls == 3 * 2 * len(pipe.transformer.blocks)
        fastest = "hopper" if torch.cuda.get_device_capability() == (9, 0) else "triton"
        assert ds.summary(pipe).to_dict()["backend"] == fastest
    with ds.sparse(pipe, ds.TopBlocks(keep=0.1)):
        little = latents()
    assert torch.equal(latents(), stock)
    noise, close, far = (float((x - stock).norm() / stock.norm()) for x in (other_kernel, everything, little))
    assert close < 3 * noise, f"keeping everything moved the latents {close:.1e}, another dense kernel {noise:.1e}"
    assert far > 3 * noise, "keeping a tenth must show"
