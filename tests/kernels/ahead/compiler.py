"""Compile the Triton and Gluon kernels for chips that are not here, and read off what the compilers made of them."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

from dit_sparse.kernels import gluon_forward
from dit_sparse.kernels.hopper import CONSUMER_REGISTERS, ENTRY_REGISTERS, GL_DTYPES
from dit_sparse.kernels.indices import BLOCK
from dit_sparse.kernels.launch import Launch, hopper_launch_for, launch_for, padded_head_dim
from dit_sparse.kernels.triton_forward import _forward
from dit_sparse.kernels.triton_lists import _compact, _write_items

TYPE_NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
ALIGNED = [["tt.divisibility", 16]]
STEP_INSTRUCTIONS = 1000  # a step over one block takes 300 to 750


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
        "ONLINE": dtype == torch.float16 or not launch.keep,
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


def compile_write_items(arch: str) -> Compiled:
    """Compile the kernel that orders the items."""
    return _compile(_write_items, {}, {"HEADS": 64, "CHUNK": 32}, set(), arch, {"num_warps": 4})


@dataclass(frozen=True)
class HopperBuild:
    shared_bytes: int
    warnings: str  # what the assembler said
    products: int  # HGMMA instructions
    local_in_loops: tuple[str, ...]  # accesses to spilled registers in loops that multiply
    tile_bytes: int  # of shared memory, from its beginning
    barriers: tuple[int, ...]  # where in shared memory
    expected_barriers: int


def compile_hopper(
    dtype: torch.dtype, head_dim: int, *, tiles: bool = False, ragged: bool = False, compensate: bool = False
) -> HopperBuild:
    """Compile the Gluon kernel as hopper.attention() would launch it; ragged has lengths too."""
    kernel, name = gluon_forward.forward, TYPE_NAMES[dtype]
    launch = hopper_launch_for(head_dim, tiles or compensate)

    def described(rows: int) -> str:
        layout = gl.NVMMASharedLayout.get_default_for([rows, head_dim], GL_DTYPES[dtype])
        return f"tensordesc<{name}[{rows}, {head_dim}],{layout}>"

    types = {arg: "*i32" if arg.endswith("_ptr") else "i32" for arg in kernel.arg_names}
    types |= {arg: described(BLOCK) for arg in kernel.arg_names if arg.endswith("_desc")}
    types |= {"out_desc": described(BLOCK // 2), "out_ptr": f"*{name}", "blocks_ptr": "*i16", "tiles_ptr": "*i16"}
    types |= dict.fromkeys(("lse_ptr", "computed_lse_ptr", "log_counts_ptr"), "*fp32") | {"scale_log2": "fp32"}
    constants: dict[str, Any] = {
        "D": head_dim,
        "BLOCK": BLOCK,
        "PARTIAL": tiles or ragged,
        "RAGGED": ragged,
        "COMPENSATE": compensate,
        "ONLINE": dtype == torch.float16,
        "STAGES": launch.stages,
        "TURNS": launch.turns,
        "CONSUMER_REGISTERS": CONSUMER_REGISTERS,
    }
    constants |= {} if tiles else {"tiles_ptr": None, "masks_ptr": None}
    constants |= {} if ragged else {"kv_lengths_ptr": None}
    constants |= {} if compensate else {"log_counts_ptr": None}
    signature = {arg: "constexpr" if arg in constants else types[arg] for arg in kernel.arg_names}
    aligned = {
        (place,): ALIGNED
        for place, arg in enumerate(kernel.arg_names)
        if arg.endswith("_ptr") and signature[arg] != "constexpr"
    }
    source = GluonASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    options = {"num_warps": 4, "maxnreg": ENTRY_REGISTERS, "enable_fp_fusion": True}
    built = triton.compile(source, target=target("sm90"), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as binary:
        said = _assemble(built.asm["ptx"], "sm90", binary.name)
        command = [triton.knobs.nvidia.cuobjdump.path, "-sass", binary.name]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    warnings = "\n".join(line for line in said.splitlines() if "warning" in line.lower() or "loss" in line.lower())
    barriers = tuple(
        int(place or "0", 16) for place in re.findall(r"SYNCS\.EXCH\.64 URZ, \[U?R\d+\+?(0x[0-9a-f]+)?\]", listing)
    )
    expected = 4 + 4 * launch.stages + 2 * launch.turns + (dtype != torch.float16)
    tile_bytes = (
        (2 * BLOCK + 2 * launch.stages * BLOCK + BLOCK) * head_dim * dtype.itemsize
    )  # queries, keys, values, output
    return HopperBuild(
        built.metadata.shared,
        warnings,
        listing.count("HGMMA"),
        _local_in_loops(listing),
        tile_bytes,
        barriers,
        expected,
    )


def _local_in_loops(listing: str) -> tuple[str, ...]:
    """Return what reads or writes local memory inside the loops over blocks."""
    lines = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,6})\*/\s+([^;]*);", listing)]
    place = {at: number for number, (at, _) in enumerate(lines)}
    loops = []
    for number, (at, text) in enumerate(lines):
        jump = re.search(r"BRA\S* .*?(0x[0-9a-f]+)", text)
        if jump is not None and int(jump[1], 16) < at and int(jump[1], 16) in place:
            loops.append((place[int(jump[1], 16)], number))
    # Waits that last jump out of line and back: such a path spans far more than the one step of a loop of blocks.
    steps = [(a, b) for a, b in loops if b - a < STEP_INSTRUCTIONS and any("HGMMA" in text for _, text in lines[a:b])]
    assert steps, "the listing has no loop that multiplies"
    return tuple(text for first, last in steps for _, text in lines[first:last] if re.search(r"\b(LDL|STL)", text))


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
    said = _assemble(ptx, arch, "/dev/null")
    return sum(int(count) for count in re.findall(r"(\d+) bytes spill stores", said))


def _assemble(ptx: str, arch: str, output: str) -> str:
    """Assemble with -v to a file and return what the assembler says."""
    machine = re.search(r"^\.target (\w+)", ptx, re.MULTILINE)
    assert machine is not None
    command = [get_ptxas(int(arch.removeprefix("sm"))).path, "-v", f"--gpu-name={machine[1]}", "-", "-o", output]
    run = subprocess.run(command, input=ptx, text=True, capture_output=True)
    if run.returncode:
        raise RuntimeError(f"ptxas failed for {arch}: {run.stderr}")
    return run.stderr
