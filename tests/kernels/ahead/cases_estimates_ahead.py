"""Compile the Triton kernels of estimates for chips that are not here: four compiles beside those of cases_ahead.py.

Each stands where it is hardest; what the H200 compiles is compiled there, by the tests marked gpu.
"""

from __future__ import annotations

from typing import Any

import compiler
import torch

from dit_sparse.kernels.launch import launch_for, padded_head_dim
from dit_sparse.kernels.triton_block_scores import STEP, TILE, _scores
from dit_sparse.kernels.triton_choice import SCORES_PER_WARP, _choose
from dit_sparse.kernels.triton_mass import _masses
from dit_sparse.kernels.triton_pool import MAX_COLUMNS, ROWS, _pool_both

SHARED_KIB = {"sm80": 163, "sm86": 99, "gfx942": 64}


def _fits(built: compiler.Compiled, arch: str) -> None:
    assert built.shared_bytes <= SHARED_KIB[arch] * 1024
    assert built.spills == 0


def test_pooling_reads_16_bytes_a_lane() -> None:
    types = dict.fromkeys(("q_ptr", "k_ptr"), "*bf16") | dict.fromkeys(("mean_q_ptr", "mean_k_ptr"), "*fp32")
    constants = {"D": 128, "ROWS": ROWS, "COLUMNS": MAX_COLUMNS}
    aligned = {f"{name}_stride_{axis}" for name in "qk" for axis in "bsh"}
    built = compiler._compile(_pool_both, types, constants, aligned, "sm80", {"num_warps": 4})
    _fits(built, "sm80")
    assert built.asm["ptx"].replace(".b32", "").count("ld.global.v4") >= 2  # of queries and of keys


def test_scores_with_products_in_three_parts() -> None:
    types = dict.fromkeys(("mean_q_ptr", "mean_k_ptr", "out_ptr"), "*fp32") | {"scale": "fp32"}
    precision = launch_for(128, torch.float32, "sm86").precision
    assert precision == "tf32x3"
    constants = {"D": 128, "STEP": STEP, "TILE": TILE, "PRECISION": precision}
    _fits(compiler._compile(_scores, types, constants, set(), "sm86", {"num_warps": 4, "num_stages": 2}), "sm86")


def test_choice_by_both_bisections_in_warps_of_64_lanes() -> None:
    types = {"score_ptr": "*fp32", "pairs_ptr": "*fp64", "always_ptr": "*u8", "forced_ptr": "*u8", "level": "fp32"}
    constants = {"keep_ptr": None, "BY_MASS": True, "EVERY": False, "K_PAD": SCORES_PER_WARP}  # 720p
    _fits(compiler._compile(_choose, types, constants, set(), "gfx942", {"num_warps": 1}), "gfx942")


def test_masses_with_products_in_three_parts() -> None:
    launch = launch_for(128, torch.float32, "sm86")
    types = dict.fromkeys(("q_ptr", "k_ptr", "lse_ptr", "out_ptr"), "*fp32") | {"scale_log2": "fp32"}
    constants: dict[str, Any] = dict.fromkeys(("q_scale_ptr", "k_scale_ptr"), None) | {
        "D": 128,
        "D_PAD": padded_head_dim(128),
        "BLOCK": 128,
        "BLOCK_M": launch.block_m,
        "BLOCK_N": launch.block_n,
        "PRECISION": launch.precision,
    }
    aligned = {f"{name}_stride_{axis}" for name in "qk" for axis in "bsh"}
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    _fits(compiler._compile(_masses, types, constants, aligned, "sm86", options), "sm86")
