"""What the peers ask of block lists: whole 128-blocks in order, and int32 lists per batch entry and head."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dit_sparse.kernels.indices import BLOCK, BlockIndices


class PeerLists(NamedTuple):
    """Hold the key blocks of every query block, ascending; entries past a count are real blocks that do not count."""

    full_count: Tensor  # int32 [B, H, Q]
    full: Tensor  # int32 [B, H, Q, K]
    masked_count: Tensor  # int32 [B, H, Q]
    masked: Tensor  # int32 [B, H, Q, K]: blocks with a bit tile


def refuse_call(indices: BlockIndices, kv_lengths: Tensor | None, compensate: bool) -> str | None:
    """Say what of this call no peer can do, or return None. The host waits for the device: block starts are read."""
    if compensate:
        return "it knows no compensation for skipped blocks"
    if kv_lengths is not None:
        return "it takes no kv_lengths beside block lists"
    for what, start in (("query", indices.q_start), ("key", indices.kv_start)):
        # Blocks tile the tokens, so with these starts only the last can be short.
        if not torch.equal(start, BLOCK * torch.arange(start.numel(), dtype=start.dtype, device=start.device)):
            return f"{what} blocks must be whole {BLOCK}-token blocks in order, only the last one shorter"
    return None


def peer_lists(indices: BlockIndices, batch: int) -> PeerLists:
    """Expand bitmaps into lists, once per mask: a peer's user keeps them."""
    rows = indices.head_of.long()
    partial = indices.partial_mask()
    counts_and_lists = []
    for chosen in (indices.block_mask() & ~partial, partial):
        blocks = torch.argsort(chosen.to(torch.int8), dim=-1, descending=True, stable=True).to(torch.int32)
        counts_and_lists += [chosen.sum(-1, dtype=torch.int32)[rows], blocks[rows]]
    return PeerLists(*(x.unflatten(0, (batch, -1)).contiguous() for x in counts_and_lists))
