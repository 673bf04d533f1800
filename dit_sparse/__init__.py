"""Sparse attention for Hugging Face diffusers' video and image diffusion transformers.

import dit_sparse as ds
ds.enable(pipe, "balanced")
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch  # noqa: F401  the one package that is always there; the rest loads when it is used

__version__ = "0.1.0"

if TYPE_CHECKING:
    from dit_sparse.attention import SparseAttention, sparse_attention
    from dit_sparse.grid import Grid
    from dit_sparse.order import TokenOrder
    from dit_sparse.patterns import (
        PATTERNS,
        AutoFrames,
        Cached,
        Dense,
        Frames,
        Neighborhood,
        Pattern,
        Powers,
        Radial,
        Skip,
        Strided,
        Stripes,
        TopBlocks,
    )
    from dit_sparse.pipelines.enable import attach, disable, enable, processors, sparse, summary
    from dit_sparse.plan import Plan, Rule
    from dit_sparse.schedule import Schedule
    from dit_sparse.search.planner.run import find_plan
    from dit_sparse.spec import PRESETS, parse_spec

_HOME = {
    "attention": ("SparseAttention", "sparse_attention"),
    "grid": ("Grid",),
    "order": ("TokenOrder",),
    "patterns": (
        "PATTERNS", "AutoFrames", "Cached", "Dense", "Frames", "Neighborhood", "Pattern", "Powers", "Radial", "Skip",
        "Strided", "Stripes", "TopBlocks",
    ),
    "pipelines.enable": ("attach", "disable", "enable", "processors", "sparse", "summary"),
    "plan": ("Plan", "Rule"),
    "schedule": ("Schedule",),
    "search.planner.run": ("find_plan",),
    "spec": ("PRESETS", "parse_spec"),
}  # fmt: skip
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = [
    "PATTERNS", "PRESETS", "AutoFrames", "Cached", "Dense", "Frames", "Grid", "Neighborhood", "Pattern", "Plan",
    "Powers", "Radial", "Rule", "Schedule", "Skip", "SparseAttention", "Strided", "Stripes", "TokenOrder", "TopBlocks",
    "__version__", "attach", "disable", "enable", "find_plan", "parse_spec", "processors", "sparse", "sparse_attention",
    "summary",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'dit_sparse' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"dit_sparse.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


# In a checkout the parts are links to the top-level folders; a copy without symbolic links has files in their place.
_PARTS = ("kernels", "pipelines", "search", "app", "assets")
if _broken := [part for part in _PARTS if not (Path(__file__).parent / part).is_dir()]:
    raise ImportError(
        f"dit_sparse is incomplete: {', '.join(_broken)} must be folders or links to them in {Path(__file__).parent}. "
        "This checkout was made without symbolic links: clone with `git clone -c core.symlinks=true`, or "
        "`pip install dit-sparse`"
    )
