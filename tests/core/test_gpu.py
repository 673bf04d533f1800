"""Patterns and plans on a real GPU: against FP64 on the same blocks, without a host sync, and inside a pipeline."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import dit_sparse as ds
from dit_sparse.kernels import reference
from dit_sparse.kernels.backends import block_attention
from dit_sparse.patterns import PatternState

pytestmark = pytest.mark.gpu

GRID = ds.Grid(5, 12, 20, prefix=9, suffix=140)  # ragged tiles, text on both sides
PATTERNS = [
    ds.Dense(),
    ds.Skip(),
    ds.Neighborhood(window=(3, 5, 7)),
    ds.Neighborhood(window=0.5, stride=2, dilation=(1, 2, 1), order="morton"),
    ds.Radial(),
    ds.Radial(kind="block"),
    ds.TopBlocks(keep=0.3),
    ds.Cached(ds.TopBlocks(keep=0.3)),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head_dim", [64, 72, 128])  # CogVideoX and the bundled model, PixArt, Wan
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_pattern_meets_fp64_on_the_same_blocks(pattern: ds.Pattern, head_dim: int, dtype: torch.dtype) -> None:
    q, k, v = (torch.randn(2, GRID.tokens, 4, head_dim, device="cuda", dtype=dtype) for _ in range(3))
    scale, layout = head_dim**-0.5, pattern.token_order().layout(GRID, "cuda")
    q, k, v = (layout.to_kernel(x) for x in (q, k, v))
    indices = pattern.select(q, k, GRID, PatternState(layout, scale)).indices
    out, lse = block_attention(q, k, v, indices, backend="triton")
    exact, exact_lse = reference.attention(q.double(), k.double(), v.double(), indices, scale, None)
    rounded, _ = reference.attention(q, k, v, indices, scale, None, round_weights=True)
    bound = 1.5 * float((rounded.double() - exact).norm())
    assert float((out.double() - exact).norm()) <= bound
    torch.testing.assert_close(lse, exact_lse.float(), atol=2e-3, rtol=1e-3)


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
        assert ds.summary(pipe).to_dict()["backend"] == "triton"
    with ds.sparse(pipe, ds.TopBlocks(keep=0.1)):
        little = latents()
    assert torch.equal(latents(), stock)
    noise, close, far = (float((x - stock).norm() / stock.norm()) for x in (other_kernel, everything, little))
    assert close < 3 * noise, f"keeping everything moved the latents {close:.1e}, another dense kernel {noise:.1e}"
    assert far > 3 * noise, "keeping a tenth must show"
