"""What a pattern chose for one attention call, and what the kernel made of it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from dit_sparse.kernels.indices import BlockIndices, pack_bits, unpack_bits
from dit_sparse.order import Layout


class Attended(NamedTuple):
    """Hold one attention result in kernel order."""

    out: Tensor  # [B, Sq, H, D]
    lse: Tensor  # fp32 [B, Sq, H], natural log of the denominator that normalised out
    computed_lse: Tensor  # the same over the visited blocks alone; differs from lse where skipped blocks are stood for


class Exact(Protocol):
    """Attend some query rows exactly."""

    def __call__(self, rows: Tensor, seen: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Attend rows [B, R, H, D] to all visible keys, or to those in seen, bool [R, S] in kernel order.

        Returns out [B, R, H, D] and the natural-log LSE, fp32 [B, R, H].
        """


@dataclass(frozen=True, eq=False)
class HeadOrder:
    """Permute the video tokens of each head anew: entry i names the kernel position whose token comes i-th."""

    q: Tensor  # int64 [B, H, V]
    k: Tensor  # int64 [B, Hkv, V]

    @staticmethod
    def to_kernel(x: Tensor, order: Tensor) -> Tensor:
        """Reorder the video tokens of x [B, S, H, D]; the text behind them stays."""
        video = order.shape[2]
        moved = x[:, :video].gather(1, _spread(order, x))
        return moved if x.shape[1] == video else torch.cat([moved, x[:, video:]], 1)

    @staticmethod
    def from_kernel(x: Tensor, order: Tensor) -> Tensor:
        """Undo `to_kernel` for x [B, S, H, D] or [B, S, H]."""
        video = order.shape[2]
        back = x.clone()
        back[:, :video].scatter_(1, _spread(order, x), x[:, :video])
        return back


@dataclass(frozen=True, eq=False)
class Selection:
    """Hold what a pattern chose for one call, and how much that is.

    `kept_pairs` and `visited_pairs` count query-key pairs among video tokens for each entry of batch and heads: those
    attended, and those in blocks that the kernel reads. They are float64 [B*H] on the device, so that nothing waits.
    """

    indices: BlockIndices
    kept_pairs: Tensor
    visited_pairs: Tensor
    compensate: bool = False  # let the means of skipped blocks stand for them
    head_order: HeadOrder | None = None

    def video_queries(self, layout: Layout) -> BlockIndices:
        """Return the indices of a call whose queries are the video tokens alone: their blocks come first."""
        return self.indices.first_queries(layout.video_blocks)

    def renewed(self, fresh: Selection, stale: Tensor) -> Selection:
        """Take the heads of `fresh` where stale, bool [B*H], is set, and keep the others; the host reads nothing.

        Heads that share keys are stale together.
        """
        mine, other = self.indices, fresh.indices
        order = self.head_order
        if order is not None and fresh.head_order is not None:
            batch, kv_heads = order.k.shape[:2]
            of_keys = stale.view(batch, kv_heads, -1)[..., :1]
            order = HeadOrder(
                torch.where(stale.view(batch, -1, 1), fresh.head_order.q, order.q),
                torch.where(of_keys, fresh.head_order.k, order.k),
            )
        if mine.rows != mine.heads or mine.partial_bits is not None:  # a choice among rows that never change
            indices = replace(mine, head_of=torch.where(stale, other.head_of, mine.head_of))
        else:
            assert other.rows == other.heads, "selections from the content have a row for each head"
            indices = replace(mine, bits=torch.where(stale[:, None, None], other.bits, mine.bits))
        return replace(
            self,
            indices=indices,
            kept_pairs=torch.where(stale, fresh.kept_pairs, self.kept_pairs),
            visited_pairs=torch.where(stale, fresh.visited_pairs, self.visited_pairs),
            head_order=order,
        )


def block_selection(kept: Tensor, layout: Layout) -> Selection:
    """Turn chosen video blocks, bool [B, H, Q, K], into indices; text blocks are added whole on both sides."""
    batch, heads, video, _ = kept.shape
    mask = torch.ones(batch * heads, layout.blocks, layout.blocks, dtype=torch.bool, device=kept.device)
    mask[:, :video, :video] = kept.flatten(0, 1)
    keys_of_row = (kept.flatten(0, 1).float() @ layout.video_length).double()  # exact: a row has fewer than 2^24 keys
    pairs = keys_of_row @ layout.video_length.double()
    head_of = torch.arange(batch * heads, dtype=torch.int32, device=kept.device)
    indices = BlockIndices(pack_bits(mask), head_of, layout.start, layout.length, layout.start, layout.length)
    return Selection(indices, pairs, pairs)


def video_blocks_of(indices: BlockIndices, layout: Layout) -> Tensor:
    """Return which video blocks each row of U visits, bool [U, Q, K]: what pictures and statistics read."""
    video = layout.video_blocks
    return unpack_bits(indices.bits, indices.key_blocks)[:, :video, :video]


def _spread(order: Tensor, x: Tensor) -> Tensor:
    """Shape an order [B, H, V] as an index over the tokens of x [B, S, H, ...]."""
    index = order.transpose(1, 2)
    return index if x.dim() == 3 else index[..., None].expand(-1, -1, -1, x.shape[3])
