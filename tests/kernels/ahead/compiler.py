"""Compile the Triton kernels for chips that are not here, and read shared memory and spills off the result."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from dit_sparse.kernels.launch import Launch, launch_for, padded_head_dim
from dit_sparse.kernels.triton_forward import _forward
from dit_sparse.kernels.triton_lists import _compact

TYPE_NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
ALIGNED = [["tt.divisibility", 16]]


@dataclass(frozen=True)
class Compiled:
    shared_bytes: int
    spills: int
    asm: dict[str, Any]


def target(arch: str) -> GPUTarget:
    """Turn sm90 or gfx942 into a compile target."""
    if arch.startswith("gfx"):
        return GPUTarget("hip", arch, 64)
    return GPUTarget("cuda", int(arch.removeprefix("sm")), 32)


def compile_forward(
    arch: str,
    dtype: torch.dtype,
    head_dim: int,
    *,
    masked: bool,
    ragged: bool,
    compensate: bool = False,
    launch: Launch | None = None,
) -> Compiled:
    """Compile the forward kernel as attention() would launch it on that chip."""
    launch = launch_for(head_dim, dtype, arch, compensate, masked or ragged) if launch is None else launch
    padded = padded_head_dim(head_dim)
    name = TYPE_NAMES[dtype]
    tensor = f"tensordesc<{name}[1, 1, {launch.block_n}, {padded}]>"
    types = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "out_ptr"), f"*{name}")
    types |= {"lse_ptr": "*fp32", "computed_lse_ptr": "*fp32", "blocks_ptr": "*i16", "scale_log2": "fp32"}
    means = {"mean_k_ptr": f"*{name}", "mean_v_ptr": f"*{name}", "log_counts_ptr": "*fp32"}
    types |= means if compensate else {}
    types |= {"k_desc": tensor, "v_desc": tensor} if launch.tma else {}
    types |= {"tiles_ptr": "*i16", "masks_ptr": "*i32"} if masked else {}
    types |= {"kv_lengths_ptr": "*i32"} if ragged else {}
    absent = {"k_desc", "v_desc", "tiles_ptr", "masks_ptr", "kv_lengths_ptr", *means} - types.keys()
    constants: dict[str, Any] = dict.fromkeys(absent, None) | {
        "D": head_dim,
        "D_PAD": padded,
        "BLOCK": 128,
        "BLOCK_M": launch.block_m,
        "BLOCK_N": launch.block_n,
        "PARTIAL": masked or ragged,
        "RAGGED": ragged,
        "COMPENSATE": compensate,
        "PRECISION": launch.precision,
    }
    aligned = {name_ for name_ in _forward.arg_names if name_.endswith(("_stride_s", "_stride_b", "_stride_h"))}
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    return _compile(_forward, types, constants, aligned - {"lse_stride_s", "lse_stride_b"}, arch, options)


def compile_compact(arch: str, *, masked: bool, ragged: bool) -> Compiled:
    """Compile the compaction kernel."""
    types = {"mask_id_ptr": "*i16", "tiles_ptr": "*i16", "partial_ptr": "*i32"} if masked else {}
    types |= {"kv_lengths_ptr": "*i32"} if ragged else {}
    absent = {"mask_id_ptr", "tiles_ptr", "partial_ptr", "kv_lengths_ptr"} - types.keys()
    constants: dict[str, Any] = dict.fromkeys(absent, None) | {"BLOCK": 128, "CHUNK": 512}
    return _compile(_compact, types | {"blocks_ptr": "*i16"}, constants, set(), arch, {"num_warps": 4})


def _compile(
    kernel: Any, types: dict[str, str], constants: dict[str, Any], aligned: set[str], arch: str, options: dict[str, int]
) -> Compiled:
    signature = {}
    attributes = {}
    for place, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        signature[name] = types.get(name, "*i32" if name.endswith("_ptr") else "i32")
        if name.endswith("_ptr") or name in aligned:
            attributes[(place,)] = ALIGNED
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    built = triton.compile(source, target=target(arch), options=options)
    spills = _amd_spills(built.asm["amdgcn"]) if arch.startswith("gfx") else _ptxas_spills(built.asm["ptx"], arch)
    return Compiled(built.metadata.shared, spills, built.asm)


def _amd_spills(listing: str) -> int:
    return sum(int(count) for count in re.findall(r"\.vgpr_spill_count:\s*(\d+)", listing))


def _ptxas_spills(ptx: str, arch: str) -> int:
    """Assemble once more with -v, which prints what the first time did not: bytes stored by register spills."""
    machine = re.search(r"^\.target (\w+)", ptx, re.MULTILINE)
    assert machine is not None
    command = [get_ptxas(int(arch.removeprefix("sm"))).path, "-v", f"--gpu-name={machine[1]}", "-", "-o", "/dev/null"]
    run = subprocess.run(command, input=ptx, text=True, capture_output=True)
    if run.returncode:
        raise RuntimeError(f"ptxas failed for {arch}: {run.stderr}")
    return sum(int(count) for count in re.findall(r"(\d+) bytes spill stores", run.stderr))
