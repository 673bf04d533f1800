"""Compile the kernels for six chips: they must fit in shared memory and must not spill. At most 60 compiles."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import compiler
import pytest
import torch

from dit_sparse.kernels.launch import Launch, launch_for

SHARED_KIB = {"sm80": 163, "sm86": 99, "sm89": 99, "sm90": 227, "sm100": 227, "gfx942": 64}


@dataclass(frozen=True)
class Build:
    reason: str
    dtype: torch.dtype
    head_dim: int
    masked: bool = False
    ragged: bool = False
    compensate: bool = False


BUILDS = (
    Build("the hot loop and the means at the usual head", torch.bfloat16, 128, compensate=True),
    Build("bit tiles, short blocks and lengths", torch.bfloat16, 128, masked=True, ragged=True),
    Build("CogVideoX and the bundled model with everything on", torch.bfloat16, 64, masked=True, ragged=True),
    Build("the same with means, a launch of its own", torch.bfloat16, 64, masked=True, ragged=True, compensate=True),
    Build(
        "padded head, the other half type, everything on", torch.float16, 72, masked=True, ragged=True, compensate=True
    ),
    Build("fp32 products at the widest head", torch.float32, 128, masked=True, ragged=True, compensate=True),
    Build("fp32 products at half that", torch.float32, 64, masked=True, ragged=True, compensate=True),
)
HOPPER_ONLY = Build("bit tiles in the descriptor loop, where a grid tiles exactly", torch.bfloat16, 128, masked=True)
TABLE = [(arch, build) for arch in SHARED_KIB for build in BUILDS] + [("sm90", HOPPER_ONLY)]
HOPPER_BUILDS: tuple[dict[str, Any], ...] = (
    {"dtype": torch.bfloat16, "head_dim": 128},
    {"dtype": torch.bfloat16, "head_dim": 128, "tiles": True, "ragged": True, "compensate": True},
    {"dtype": torch.bfloat16, "head_dim": 64},
    {"dtype": torch.bfloat16, "head_dim": 64, "tiles": True, "ragged": True, "compensate": True},
    {"dtype": torch.bfloat16, "head_dim": 128, "ragged": True},
    {"dtype": torch.float16, "head_dim": 128, "tiles": True, "ragged": True},
    {"dtype": torch.float16, "head_dim": 128},
)
# compaction on every chip, one launch without descriptors, the items; the other file of this folder has four
assert len(TABLE) + len(SHARED_KIB) + len(HOPPER_BUILDS) + 4 <= 60


def _fits(built: compiler.Compiled, arch: str) -> None:
    assert built.shared_bytes <= SHARED_KIB[arch] * 1024
    assert built.spills == 0


@pytest.mark.parametrize(("arch", "build"), TABLE, ids=lambda x: x if isinstance(x, str) else x.reason)
def test_forward(arch: str, build: Build) -> None:
    built = compiler.compile_forward(
        arch, build.dtype, build.head_dim, masked=build.masked, ragged=build.ragged, compensate=build.compensate
    )
    _fits(built, arch)


@pytest.mark.parametrize("arch", SHARED_KIB)
def test_compaction(arch: str) -> None:
    _fits(compiler.compile_compact(arch, masked=True, ragged=True), arch)


def test_forward_on_hopper_where_tensors_do_not_suit_descriptors() -> None:
    launch: Launch = replace(launch_for(128, torch.bfloat16, "sm90"), tma=False)
    built = compiler.compile_forward("sm90", torch.bfloat16, 128, masked=True, ragged=True, launch=launch)
    _fits(built, "sm90")


def test_items_on_a_small_chip() -> None:
    _fits(compiler.compile_write_items("sm86"), "sm86")


@pytest.mark.parametrize(("head_dim", "spilled_bytes"), [(128, 220), (64, 0)])
def test_full_blocks_alone_on_hopper(head_dim: int, spilled_bytes: int) -> None:
    """The launch of the fastest figures: its second loop, for rows that the shift does not suit, costs registers."""
    built = compiler.compile_forward("sm90", torch.bfloat16, head_dim, masked=False, ragged=False)
    assert built.shared_bytes <= SHARED_KIB["sm90"] * 1024
    assert built.spills <= spilled_bytes


@pytest.mark.parametrize("build", HOPPER_BUILDS, ids=lambda build: " ".join(map(str, build.values())))
def test_hopper(build: dict[str, Any]) -> None:
    """Registers may spill between items, not in the loops; products are not serialised; barriers lie outside of tiles.

    (What was a barrier once is written back when the GPU goes from one process to another.)
    """
    built = compiler.compile_hopper(**build)
    assert built.shared_bytes <= SHARED_KIB["sm90"] * 1024
    assert built.products > 0
    assert not built.warnings
    assert not built.local_in_loops
    assert len(built.barriers) == built.expected_barriers
    assert min(built.barriers) >= built.tile_bytes
