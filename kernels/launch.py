"""Launch choices of the Triton kernels, as data: kernel code holds none of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Launch:
    """Hold the tile and the compile options of one launch of the forward kernel."""

    block_m: int  # query tokens of one program: 16, 32, 64 or 128
    block_n: int  # key tokens of one step: 32, 64 or 128
    num_warps: int
    num_stages: int
    tma: bool  # read key and value tiles through tensor descriptors (sm90 and up)
    precision: str  # of fp32 products: "ieee" or "tf32x3"; fp16 and bf16 ignore it
    keep: bool = False  # rows keep the shift of their first tile; fp16, short of exponents, never does


@dataclass(frozen=True)
class HopperLaunch:
    """Hold the pipeline of one launch of the Hopper kernel; its tiles are 128 queries by 128 keys."""

    stages: int  # tiles of keys, and as many of values, in shared memory
    turns: bool  # the two consumers start their products in turn


def hopper_launch_for(head_dim: int, another_loop: bool) -> HopperLaunch:
    """Choose a launch of the Hopper kernel for head_dim 64 or 128.

    another_loop: many blocks may go through the loop over masked blocks, or through that over means.
    """
    if head_dim == 64:
        return HopperLaunch(stages=4, turns=True)
    return HopperLaunch(stages=2, turns=another_loop)


def launch_for(head_dim: int, dtype: torch.dtype, arch: str, compensate: bool = False, partial: bool = True) -> Launch:
    """Choose a launch for arch "sm80", "sm90", "gfx942", "interpreter"; an unknown one gets what fits everywhere.

    compensate: the launch has the loop over means too; partial: that over partial blocks.
    """
    if arch == "interpreter":
        return Launch(128, 128, 4, 1, tma=False, precision="ieee", keep=True)
    wide = padded_head_dim(head_dim) == 128
    if dtype == torch.float32:
        # Three tf32 products keep fp32's precision on NVIDIA; larger tiles spill on some chip.
        if arch.startswith("gfx"):
            return Launch(64, 32, 4, 1, tma=False, precision="ieee")
        return Launch(16 if wide else 32, 32, 4 if wide else 8, 1, tma=False, precision="tf32x3")
    if arch.startswith("gfx"):
        return Launch(128, 64, 4, 1, tma=False, precision="ieee")
    if arch == "sm90" and not partial and not compensate:  # these spill more with another loop
        return Launch(128 if wide else 64, 64 if wide else 128, 4, 2, tma=True, precision="ieee", keep=True)
    if arch == "sm90":  # the best, on the ragged blocks that real grids have, of those that never spill
        return Launch(64, 64, 4, 3 if wide or compensate else 2, tma=True, precision="ieee", keep=not compensate)
    if arch in ("sm100", "sm103"):
        return Launch(128, 64 if compensate else 128, 8, 2, tma=True, precision="ieee")
    if compensate:  # the tiles below spill with the loop over means
        return Launch(64, 32, 4, 3 if arch == "sm80" else 2, tma=False, precision="ieee")
    if wide:  # three stages spill on sm86 and sm89 with Triton 3.7
        return Launch(128, 32, 8, 3 if arch == "sm80" else 2, tma=False, precision="ieee")
    return Launch(128, 64, 4, 3, tma=False, precision="ieee")


def padded_head_dim(head_dim: int) -> int:
    """Round head_dim up to the power of two, at least 16, that a matrix product takes."""
    return max(16, 1 << (head_dim - 1).bit_length())
