"""Every backend that runs on a CPU against FP64, and the chooser that explains itself."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from dit_sparse.kernels import bench
from dit_sparse.kernels.backends import BACKENDS, Rejected, block_attention, choose, compensated_attention, explain
from dit_sparse.kernels.gate import CASES, Case, build, check
from dit_sparse.kernels.indices import BlockIndices, random_indices

# fp32 shows a wrong index, the two half types show a product or a sum kept in too few bits.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# The others have their own process (test_interpreter) and their own machine (test_gpu); flex has test_peers.
ON_CPU = ("cpu", "reference")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("backend", ON_CPU)
def test_backend_meets_fp64(backend: str, case: Case, dtype: torch.dtype) -> None:
    outcome = check(BACKENDS[backend].run, case, dtype)
    assert outcome.passed, outcome


@pytest.mark.parametrize("backend", ON_CPU)
def test_empty_rows_are_zero_and_minus_infinity(backend: str) -> None:
    q, k, v, indices, _ = build(next(case for case in CASES if case.name == "empty"), torch.float32)
    out, lse = block_attention(q, k, v, indices, backend=backend)
    assert torch.equal(out[:, :128], torch.zeros_like(out[:, :128]))
    assert torch.equal(lse[:, :128], torch.full_like(lse[:, :128], -torch.inf))


def test_the_oracle_is_dense_attention_where_everything_is_kept() -> None:
    q, k, v = (torch.randn(2, 300, 2, 64, dtype=torch.float64) for _ in range(3))
    indices = random_indices(2, 2, [300], [300], density=1.0)
    out, lse = block_attention(q, k, v, indices, backend="reference")
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    dense = torch.nn.functional.scaled_dot_product_attention(*heads_first).transpose(1, 2)
    assert torch.allclose(out, dense, atol=1e-12)
    logits = torch.einsum("bqhd,bkhd->bqhk", q, k) / 8
    assert torch.allclose(lse, logits.logsumexp(-1), atol=1e-12)


@pytest.mark.parametrize("backend", ON_CPU)
def test_rows_without_a_block_get_the_means_alone(backend: str) -> None:
    q, k, v, indices, _ = build(next(case for case in CASES if case.name == "means_alone"), torch.float32)
    out, lse, computed_lse = compensated_attention(q, k, v, indices, backend=backend)
    mean_k, mean_v = (x.unflatten(1, (-1, 128)).mean(2) for x in (k, v))
    logits = torch.einsum("bqhd,bkhd->bqhk", q[:, :128], mean_k) / 8 + math.log(128)
    assert torch.allclose(out[:, :128], torch.einsum("bqhk,bkhd->bqhd", logits.softmax(-1), mean_v), atol=1e-5)
    assert torch.allclose(lse[:, :128], logits.logsumexp(-1), atol=1e-5)
    assert bool((computed_lse[:, :128] == -torch.inf).all())
    _, plain_lse = block_attention(q, k, v, indices, backend=backend)
    assert torch.allclose(computed_lse, plain_lse, atol=1e-5)


@pytest.mark.parametrize("backend", ON_CPU)
def test_compensation_of_nothing_changes_nothing(backend: str) -> None:
    q, k, v = (torch.randn(2, 300, 2, 64) for _ in range(3))
    indices = random_indices(2, 2, [300], [300], density=1.0)
    lengths = torch.tensor([300, 140], dtype=torch.int32)
    out, lse, computed_lse = compensated_attention(q, k, v, indices, kv_lengths=lengths, backend=backend)
    plain = block_attention(q, k, v, indices, kv_lengths=lengths, backend=backend)
    assert torch.allclose(out, plain[0], atol=1e-6)
    assert torch.equal(lse, computed_lse)
    assert torch.equal(lse, plain[1])


@pytest.mark.parametrize("backend", ON_CPU)
def test_compensation_is_exact_where_the_keys_of_a_block_are_one(backend: str) -> None:
    case = Case("", "", batch=2, heads=4, q_segments=(200,), kv_segments=(300, 77), density=0.4, kv_lengths=(377, 333))
    q, _, v, indices, lengths = build(case, torch.float32, seed=int(torch.randint(1 << 30, ())))
    v = v.nan_to_num()
    key_of_block = torch.randn(2, indices.key_blocks, 2, 64)
    k = torch.cat([key_of_block[:, [i]].expand(-1, n, -1, -1) for i, n in enumerate(indices.kv_len.tolist())], 1)
    everything = replace(indices, bits=torch.full_like(indices.bits, (1 << indices.key_blocks) - 1))
    dense = block_attention(q, k, v, everything, kv_lengths=lengths, backend="reference")
    nothing = replace(indices, bits=torch.zeros_like(indices.bits))
    for some in (indices, nothing):
        out, lse, computed_lse = compensated_attention(q, k, v, some, kv_lengths=lengths, backend=backend)
        assert torch.allclose(out, dense[0], atol=1e-5)
        assert torch.allclose(lse, dense[1], atol=1e-5)
    assert bool((computed_lse == -torch.inf).all())


@pytest.mark.parametrize("backend", ON_CPU)
def test_lse_of_the_visited_blocks_survives_means_that_outweigh_them(backend: str) -> None:
    q, v = torch.ones(1, 128, 1, 64), torch.randn(1, 256, 1, 64)
    k = torch.cat((torch.full((1, 128, 1, 64), -20.0), torch.full((1, 128, 1, 64), 20.0)), 1)
    indices = random_indices(1, 1, [128], [256], density=1.0)
    indices = replace(indices, bits=torch.ones_like(indices.bits))  # the first block alone
    out, lse, computed_lse = compensated_attention(q, k, v, indices, backend=backend)
    assert torch.allclose(computed_lse, torch.full_like(lse, -160.0 + math.log(128)))
    assert torch.allclose(lse, torch.full_like(lse, 160.0 + math.log(128)))
    assert torch.allclose(out, v[:, 128:].mean(1, keepdim=True).expand_as(out), atol=1e-5)


@pytest.mark.parametrize("backend", ON_CPU)
def test_strides_and_scale_are_honoured(backend: str) -> None:
    fused = torch.randn(1, 256, 3, 2, 64)
    q, k, v = fused.unbind(2)
    indices = random_indices(1, 2, [256], [256])
    out, lse = block_attention(q, k, v, indices, backend=backend, scale=0.3)
    plain = block_attention(q.contiguous() * 0.3 * 8, k.contiguous(), v.contiguous(), indices, backend="reference")
    assert torch.allclose(out, plain[0], atol=1e-5)
    assert torch.allclose(lse, plain[1], atol=1e-5)
    last_strided = torch.randn(1, 256, 64, 2).transpose(2, 3)
    assert block_attention(last_strided, k, v, indices, backend=backend)[0].shape == q.shape


def test_auto_takes_the_cpu_and_explains_the_rest() -> None:
    q, k, v, indices, _ = build(CASES[0], torch.float32)
    assert choose("auto", q, k, v, indices).name == "cpu"
    names = ("hopper", "triton", "flex", "fa4")
    assert explain(q, k, v, indices) == [Rejected(name, "tensors must be on a GPU, got cpu") for name in names]


def test_auto_asks_the_fastest_first_and_never_a_peer() -> None:
    assert [name for name, backend in BACKENDS.items() if backend.automatic] == ["hopper", "triton", "cpu"]


@pytest.mark.parametrize("compensate", [False, True])
def test_a_backend_hears_of_lengths_and_means_before_it_runs(compensate: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    heard = []

    def refuse(*call: object) -> str:
        heard.append(call[4:])
        return "not this one"

    monkeypatch.setitem(BACKENDS, "flex", replace(BACKENDS["flex"], refusal=refuse))
    q, k, v, indices, lengths = build(next(case for case in CASES if case.name == "kv_lengths"), torch.float32)
    k, v = k.nan_to_num(), v.nan_to_num()
    attend = compensated_attention if compensate else block_attention
    with pytest.raises(ValueError, match="backend flex cannot run this call: not this one"):
        attend(q, k, v, indices, kv_lengths=lengths, backend="flex")
    assert heard == [(lengths, compensate)]
    assert Rejected("flex", "not this one") in explain(q, k, v, indices, lengths, compensate)


def test_a_named_backend_never_falls_back() -> None:
    q, k, v, indices, _ = build(CASES[0], torch.float32)
    with pytest.raises(ValueError, match="backend triton cannot run this call: tensors must be on a GPU, got cpu"):
        block_attention(q, k, v, indices, backend="triton")
    with pytest.raises(ValueError, match=r'backend must be one of auto, .*, got "fast"'):
        block_attention(q, k, v, indices, backend="fast")


def _refused(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, indices: BlockIndices, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        block_attention(q, k, v, indices)


def test_bad_tensors_are_refused_with_a_reason() -> None:
    q, k, v, indices, _ = build(CASES[0], torch.float32)
    _refused(q.double(), k.double(), v.double(), indices, "no backend .* float16, bfloat16 or float32, got float64")
    _refused(q, k.half(), v, indices, "one dtype, got q=torch.float32, k=torch.float16")
    _refused(q, k.to("meta"), v, indices, "one device, got q=cpu, k=meta")
    _refused(q[0], k, v, indices, r"q must be \[B, S, H, D\]")
    _refused(q, k[..., :32], v[..., :32], indices, "agree in batch and head_dim")
    _refused(q, k, v[:, :300], indices, "k and v must have one shape")
    _refused(q, k.repeat(1, 1, 2, 1)[:, :, :3], v.repeat(1, 1, 2, 1)[:, :, :3], indices, "multiple of heads of k")
    _refused(q.long(), k.long(), v.long(), indices, "q must be floating point")
    _refused(q.clone().requires_grad_(), k, v, indices, "forward only")
    _refused(q[:, :0], k, v, indices, "at least one element")
    with pytest.raises(ValueError, match=r"kv_lengths must be int32 \[batch=1\], got torch\.int64"):
        block_attention(q, k, v, indices, kv_lengths=torch.tensor([3]))
    with pytest.raises(ValueError, match=r"scale must be positive and finite, got -1\.0"):
        block_attention(q, k, v, indices, scale=-1.0)


def test_run_blocks_takes_lists() -> None:
    q, k, v = (torch.randn(1, 2, 500, 32) for _ in range(3))
    idx, cnt = bench.local_and_random(2, 4, 0.5, "cpu")
    cnt[:, 0] = 1  # the second entry of these rows must not count
    out = bench.run_blocks(q, k, v, idx, cnt, "cpu")
    assert out.shape == q.shape
    assert torch.allclose(out, bench.run_blocks(q, k, v, idx, cnt, "reference"), atol=1e-5)
    with pytest.raises(ValueError, match=r"B, H, Q = \(1, 2, 4\)"):
        bench.run_blocks(q, k, v, idx[:, :, :3], cnt, "cpu")
