"""Compile the Triton kernels of estimates for chips that are not here: ten compiles beside those of cases_ahead.py."""

from __future__ import annotations

from typing import Any

import compiler
import pytest
import torch

from dit_sparse.kernels.launch import launch_for, padded_head_dim
from dit_sparse.kernels.triton_choice import MAX_WARPS, SCORES_PER_WARP, _choose
from dit_sparse.kernels.triton_mass import MIN_INT8_DIM, _masses
from dit_sparse.kernels.triton_pool import MAX_COLUMNS, ROWS, _pool

SHARED_KIB = {"sm80": 163, "sm86": 99, "sm89": 99, "sm90": 227, "sm100": 227, "gfx942": 64}
TYPE_NAMES = compiler.TYPE_NAMES | {torch.int8: "i8"}


def _fits(built: compiler.Compiled, arch: str, may_spill: bool = False) -> None:
    assert built.shared_bytes <= SHARED_KIB[arch] * 1024
    assert may_spill or built.spills == 0


@pytest.mark.parametrize("arch", ["sm80", "gfx942"])  # warps of 32 and of 64 lanes
def test_pooling(arch: str) -> None:
    types = {"x_ptr": "*bf16", "out_ptr": "*fp32"}
    constants = {"D": 128, "ROWS": ROWS, "COLUMNS": MAX_COLUMNS}
    aligned = {"x_stride_b", "x_stride_s", "x_stride_h", "width"}
    built = compiler._compile(_pool, types, constants, aligned, arch, {"num_warps": 4})
    _fits(built, arch)
    if arch == "sm80":
        assert "ld.global.v4" in built.asm["ptx"].replace(".b32", "")  # 16 bytes a lane


@pytest.mark.parametrize(
    ("arch", "padded", "by_mass"),
    [
        ("sm90", 1024, True),  # the largest form at 720p: two bisections
        ("gfx942", 1024, True),  # the same in warps of 64 lanes
        ("sm80", 32768, False),  # as many blocks as int16 numbers can name; such a row may spill
    ],
)
def test_choice(arch: str, padded: int, by_mass: bool) -> None:
    bytes_ = dict.fromkeys(("always_ptr", "forced_ptr", "wanted_ptr"), "*u8")
    types = {"score_ptr": "*fp32", "level": "fp32"} | bytes_
    constants: dict[str, Any] = {"BY_KEEP": not by_mass, "BY_MASS": by_mass, "EVERY": False, "K_PAD": padded}
    constants |= {"keep_ptr": None} if by_mass else {}
    warps = min(MAX_WARPS, max(1, padded // SCORES_PER_WARP))
    built = compiler._compile(_choose, types, constants, set(), arch, {"num_warps": warps})
    _fits(built, arch, may_spill=padded > MAX_WARPS * SCORES_PER_WARP)


@pytest.mark.parametrize(
    ("arch", "dtype", "head_dim", "of_rows"),
    [
        ("sm90", torch.bfloat16, 128, True),  # sampled rows on the chip that counts
        ("sm90", torch.bfloat16, 128, False),  # whole query blocks
        ("sm80", torch.int8, 64, True),  # the narrow product of integers
        ("gfx942", torch.int8, 128, False),  # the least shared memory
        ("sm86", torch.float32, 128, False),  # products in three parts
    ],
    ids=str,
)
def test_masses(arch: str, dtype: torch.dtype, head_dim: int, of_rows: bool) -> None:
    launch = launch_for(head_dim, dtype, arch)
    types = dict.fromkeys(("q_ptr", "k_ptr"), f"*{TYPE_NAMES[dtype]}")
    types |= dict.fromkeys(("q_scale_ptr", "k_scale_ptr", "lse_ptr", "out_ptr"), "*fp32") | {"scale_log2": "fp32"}
    absent = {"q_start_ptr", "q_len_ptr", "lse_ptr"} if of_rows else set()
    absent |= set() if dtype == torch.int8 else {"q_scale_ptr", "k_scale_ptr"}
    padded = padded_head_dim(head_dim)
    constants: dict[str, Any] = dict.fromkeys(absent, None) | {
        "D": head_dim,
        "D_PAD": max(padded, MIN_INT8_DIM) if dtype == torch.int8 else padded,
        "BLOCK": 128,
        "BLOCK_M": launch.block_m,
        "BLOCK_N": launch.block_n,
        "PRECISION": launch.precision,
    }
    aligned = {f"{name}_stride_{axis}" for name in "qk" for axis in "bsh"}
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    _fits(compiler._compile(_masses, types, constants, aligned, arch, options), arch)
