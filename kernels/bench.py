"""Benchmark of the kernels: gate first, then interleaved timings beside dense cuDNN and FlexAttention.

Run: python -m dit_sparse.kernels.bench --json results.json [--variants]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_sparse.kernels.backends import BACKENDS, block_attention
from dit_sparse.kernels.gate import CASES, Outcome, check
from dit_sparse.kernels.indices import BLOCK, BlockIndices, from_block_mask, segment_blocks
from dit_sparse.kernels.launch import Launch, launch_for

Call = Callable[[], Any]

ROUNDS = 7
ROUND_MS = 15.0  # time of one contender in one round
SPOT_ERROR = 0.01  # relative L2 of bf16 output rows at the timed shape; a wrong block gives about 1


@dataclass(frozen=True)
class Shape:
    name: str
    heads: int
    tokens: int
    head_dim: int
    densities: tuple[float, ...]


SHAPES = (
    Shape("wan_480p", 12, 32768, 128, (0.25, 0.10, 0.05)),
    Shape("cogvideox", 48, 17792, 64, (0.25,)),
)

VARIANT_CASES = ("full", "masks", "ragged_masks", "d128", "masks_d128", "kv_lengths_masks")

# Beside the heuristic's own choice; each was a plausible winner on paper.
VARIANTS = {
    128: (
        Launch(128, 128, 8, 2, True, "ieee"),
        Launch(128, 128, 8, 2, False, "ieee"),
        Launch(128, 64, 4, 2, True, "ieee"),
        Launch(128, 64, 4, 4, True, "ieee"),
        Launch(128, 64, 4, 3, True, "ieee"),
    ),
    64: (
        Launch(128, 128, 8, 2, True, "ieee"),
        Launch(64, 128, 4, 3, True, "ieee"),
        Launch(64, 128, 4, 2, True, "ieee"),
        Launch(128, 64, 4, 3, True, "ieee"),
    ),
}


@dataclass
class Report:
    """Collect everything one run found; to_json writes it as it stands."""

    environment: dict[str, str] = field(default_factory=dict)
    gate: list[dict[str, Any]] = field(default_factory=list)
    timings: list[dict[str, Any]] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)


def run_blocks(q: Tensor, k: Tensor, v: Tensor, idx: Tensor, cnt: Tensor, backend: str = "auto") -> Tensor:
    """Attend over given lists of 128-blocks: the entry for benchmarks of other projects.

    q [B, H, N, D]; k, v [B, H, M, D]; idx int32 [B, H, Q, MAX], of which the first cnt int32 [B, H, Q] entries of a row
    count; entries of a row are distinct. Returns out [B, H, N, D].

    Raises: ValueError for lists of another shape, and what block_attention raises.
    """
    blocks_shape = (*q.shape[:2], -(-q.shape[2] // BLOCK))
    if idx.dim() != 4 or tuple(idx.shape[:3]) != blocks_shape or tuple(cnt.shape) != blocks_shape:
        raise ValueError(
            f"idx must be [B, H, Q, MAX] and cnt [B, H, Q] with B, H, Q = {blocks_shape}, "
            f"got idx={tuple(idx.shape)}, cnt={tuple(cnt.shape)}"
        )
    indices = _indices_from_lists(idx, cnt, q.shape[2], k.shape[2])
    out, _ = block_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), indices, backend=backend)
    return out.transpose(1, 2)


def local_and_random(heads: int, blocks: int, density: float, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Draw lists with a local band and random blocks, equally many a row: idx int32 [1, H, Q, count], cnt [1, H, Q]."""
    count = max(1, round(blocks * density))
    place = torch.arange(blocks, device=device)
    band = (place[:, None] - place).abs() < max(1, count // 2) // 2
    score = torch.rand((1, heads, blocks, blocks), device=device) + 2.0 * band
    idx = score.topk(count, -1).indices.sort(-1).values.to(torch.int32)
    return idx, torch.full((1, heads, blocks), count, dtype=torch.int32, device=device)


def gate(
    backend: str, dtypes: Sequence[torch.dtype], device: str, report: Report, launch: Launch | None = None
) -> bool:
    """Run every case through a backend, or through the Triton kernel with one launch; True if all passed."""
    run = BACKENDS[backend].run if launch is None else partial(_triton_attention, launch=launch)
    passed = True
    for dtype in dtypes:
        for case in CASES:
            try:
                outcome = check(run, case, dtype, device)
            except Exception:
                report.errors.append(f"gate {backend} {launch} {case.name} {dtype}: {traceback.format_exc(limit=-3)}")
                passed = False
                continue
            passed = passed and outcome.passed
            report.gate.append(_gate_row(backend, launch, outcome))
    return passed


def bench_kernels(report: Report, *, variants: bool = False, shapes: Sequence[Shape] = SHAPES) -> None:
    """Gate the Triton backend on this GPU, then time it; a failure of one contender is recorded and spares the rest."""
    report.environment.update(_environment())
    gate("triton", (torch.bfloat16, torch.float16, torch.float32), "cuda", report)
    print(f"gate: {sum(row['passed'] for row in report.gate)}/{len(report.gate)} passed", flush=True)
    failed = any("bfloat16" in error for error in report.errors)
    usable = not failed and all(row["passed"] for row in report.gate if row["dtype"] == "bfloat16")
    if not usable:
        report.errors.append("the gate failed in bfloat16, so no figure of the triton backend is given")
    for shape in shapes:
        try:
            _bench_shape(shape, usable, variants, report)
        except Exception:
            report.errors.append(f"{shape.name}: {traceback.format_exc(limit=-3)}")
        torch.cuda.empty_cache()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark and print a short table last; 0 if the gate passed and nothing failed, else 1."""
    parser = argparse.ArgumentParser(prog="python -m dit_sparse.kernels.bench", description=__doc__)
    parser.add_argument("--json", type=Path, help="write everything found to this file")
    parser.add_argument("--variants", action="store_true", help="also time the launch configurations one by one")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("bench needs a GPU: torch.cuda.is_available() is False", file=sys.stderr)
        return 1
    torch.manual_seed(0)
    report = Report()
    begin = time.perf_counter()
    try:
        bench_kernels(report, variants=options.variants)
    except Exception:
        report.errors.append(traceback.format_exc())
    report.environment["wall_seconds"] = f"{time.perf_counter() - begin:.0f}"
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(report.to_json())
    _print(report)
    return 0 if not report.errors and all(row["passed"] for row in report.gate) else 1


def _bench_shape(shape: Shape, usable: bool, variants: bool, report: Report) -> None:
    size = (1, shape.tokens, shape.heads, shape.head_dim)
    q, k, v = (torch.randn(size, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    launches = _gated_launches(shape.head_dim, report) if variants and usable else {}
    blocks = shape.tokens // BLOCK
    for density in shape.densities:
        idx, cnt = local_and_random(shape.heads, blocks, density, "cuda")
        indices = _indices_from_lists(idx, cnt, shape.tokens, shape.tokens)
        contenders: dict[str, Call] = {}
        _add(contenders, "cudnn_dense", partial(_cudnn, q, k, v), report)
        _add(contenders, "flex", partial(_flex, q, k, v, idx, cnt), report)
        if usable:
            _add(contenders, "triton", partial(_spot_checked, q, k, v, indices, None), report)
        for name, launch in launches.items():
            _add(contenders, name, partial(_spot_checked, q, k, v, indices, launch), report)
        _time(shape, idx.shape[-1] / blocks, contenders, report)


def _triton_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: BlockIndices,
    scale: float,
    kv_lengths: Tensor | None,
    compensate: bool,
    *,
    launch: Launch,
) -> tuple[Tensor, Tensor, Tensor]:
    from dit_sparse.kernels import triton_forward  # triton is not there on every system

    return triton_forward.attention(q, k, v, indices, scale, kv_lengths, compensate, launch)


def _indices_from_lists(idx: Tensor, cnt: Tensor, q_tokens: int, kv_tokens: int) -> BlockIndices:
    q_start, q_len = segment_blocks([q_tokens])
    kv_start, kv_len = segment_blocks([kv_tokens])
    batch, heads, query_blocks, width = idx.shape
    listed = torch.arange(width, device=idx.device) < cnt[..., None]
    # One column too many takes the entries that do not count.
    mask = torch.zeros((batch * heads, query_blocks, len(kv_start) + 1), dtype=torch.bool, device=idx.device)
    mask.scatter_(-1, idx.masked_fill(~listed, len(kv_start)).long().flatten(0, 1), True)
    head_of = torch.arange(batch * heads, dtype=torch.int32)
    return from_block_mask(mask[..., :-1], head_of, q_start, q_len, kv_start, kv_len)


def _gate_row(backend: str, launch: Launch | None, outcome: Outcome) -> dict[str, Any]:
    return {"backend": backend, "launch": _label(launch), "passed": outcome.passed, **asdict(outcome)}


def _label(launch: Launch | None) -> str:
    if launch is None:
        return "heuristic"
    memory = "tma" if launch.tma else "ptr"
    return f"{launch.block_m}x{launch.block_n} w{launch.num_warps} s{launch.num_stages} {memory}"


def _gated_launches(head_dim: int, report: Report) -> dict[str, Launch]:
    """Return the variants that pass a short gate in bf16, at head_dim only."""
    passed = {}
    for launch in VARIANTS[head_dim]:
        try:
            cases = [case for case in CASES if case.head_dim == head_dim and case.name in VARIANT_CASES]
            run = partial(_triton_attention, launch=launch)
            outcomes = [check(run, case, torch.bfloat16, "cuda") for case in cases]
            if all(outcome.passed for outcome in outcomes):
                passed[_label(launch)] = launch
            else:
                report.errors.append(f"variant {launch} failed {[o.name for o in outcomes if not o.passed]}")
        except Exception:
            report.errors.append(f"variant {launch}: {traceback.format_exc(limit=-2)}")
    return passed


def _add(contenders: dict[str, Call], name: str, make: Callable[[], Call], report: Report) -> None:
    """Make a contender and run it twice, or record why it cannot run."""
    try:
        contender = make()
        for _ in range(2):
            contender()
        torch.cuda.synchronize()
        contenders[name] = contender
    except Exception:
        report.errors.append(f"{name}: {traceback.format_exc(limit=-3)}")


def _cudnn(q: Tensor, k: Tensor, v: Tensor) -> Call:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))

    def dense() -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return F.scaled_dot_product_attention(q, k, v)

    return dense


def _flex(q: Tensor, k: Tensor, v: Tensor, idx: Tensor, cnt: Tensor) -> Call:
    """Compile FlexAttention over the same lists, all of them full blocks."""
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    blocks = q.shape[1] // BLOCK
    padded = F.pad(idx, (0, blocks - idx.shape[-1])).contiguous()
    none = torch.zeros_like(cnt)
    mask = BlockMask.from_kv_blocks(none, torch.zeros_like(padded), cnt, padded, BLOCK_SIZE=BLOCK)
    q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda: compiled(q, k, v, block_mask=mask)


def _spot_checked(q: Tensor, k: Tensor, v: Tensor, indices: BlockIndices, launch: Launch | None) -> Call:
    """Return the sparse call after comparing some of its rows with an FP64 computation.

    Raises: ValueError if they disagree.
    """
    scale = q.shape[-1] ** -0.5
    call: Callable[[], tuple[Tensor, ...]] = partial(block_attention, q, k, v, indices, backend="triton")
    if launch is not None:
        call = partial(_triton_attention, q, k, v, indices, scale, None, False, launch=launch)
    out = call()[0]
    kept = indices.block_mask()
    heads, blocks = q.shape[2], indices.query_blocks
    for head, block in ((0, 0), (heads - 1, blocks - 1), (heads // 2, blocks // 3)):
        tokens = slice(block * BLOCK, (block + 1) * BLOCK)
        columns = kept[head, block].repeat_interleave(BLOCK).nonzero().flatten()
        weights = (q[0, tokens, head].double() @ k[0, columns, head].double().T * scale).softmax(-1)
        exact = weights @ v[0, columns, head].double()
        error = float((out[0, tokens, head].double() - exact).norm() / exact.norm())
        if not error < SPOT_ERROR:
            raise ValueError(f"output at the timed shape is wrong: relative L2 {error:.3g}, bound {SPOT_ERROR}")
    return call


def _time(shape: Shape, density: float, contenders: dict[str, Call], report: Report) -> None:
    """Time the contenders in turn, round by round, so that heat and clocks meet all of them alike."""
    repeats = {name: max(1, int(ROUND_MS / _milliseconds(call, 1))) for name, call in contenders.items()}
    times: dict[str, list[float]] = {name: [] for name in contenders}
    clocks = []
    for _ in range(ROUNDS):
        for name, call in contenders.items():
            times[name].append(_milliseconds(call, repeats[name]))
        clocks.append(_clocks())
    dense_ms = statistics.median(times.get("cudnn_dense", [float("nan")]))
    work = 4.0 * shape.tokens**2 * shape.head_dim * shape.heads
    for name, measured in times.items():
        ms = statistics.median(measured)
        own = 1.0 if name == "cudnn_dense" else density
        report.timings.append(
            {
                "shape": shape.name, "density": density, "contender": name, "ms": ms, "ms_low": min(measured),
                "ms_high": max(measured), "tflops_kept": work * own / ms / 1e9, "realised": dense_ms * own / ms,
                "rounds": ROUNDS, "clocks": clocks,
            }
        )  # fmt: skip


def _milliseconds(call: Call, repeats: int) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    call()
    begin.record()
    for _ in range(repeats):
        call()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / repeats


def _clocks() -> str:
    query = "clocks.sm,clocks.mem,temperature.gpu,power.draw"
    return _nvidia_smi(query) or "unknown"


def _nvidia_smi(query: str) -> str:
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader", "-i", str(torch.cuda.current_device())]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _environment() -> dict[str, str]:
    import triton

    return {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "driver": _nvidia_smi("driver_version"),
        "launch_d128": str(launch_for(128, torch.bfloat16, _arch_name())),
        "launch_d64": str(launch_for(64, torch.bfloat16, _arch_name())),
    }


def _arch_name() -> str:
    major, minor = torch.cuda.get_device_capability()
    return f"sm{major}{minor}"


def _print(report: Report) -> None:
    for error in report.errors:
        print(f"error: {error}", file=sys.stderr)
    for row in report.gate:
        if not row["passed"]:
            print(f"gate failed: {row}")
    print("  ".join(f"{name}={value}" for name, value in report.environment.items()))
    print(f"{'shape':<10} {'density':>7} {'contender':<22} {'ms':>8} {'TFLOP/s':>8} {'realised':>8}")
    for row in report.timings:
        print(
            f"{row['shape']:<10} {row['density']:>7.3f} {row['contender']:<22} {row['ms']:>8.3f} "
            f"{row['tflops_kept']:>8.0f} {row['realised']:>8.2f}"
        )


if __name__ == "__main__":
    sys.exit(main())
