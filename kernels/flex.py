"""Peer backend: torch's FlexAttention, compiled, over the same blocks; its mask rule reads our bit tiles."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention, noop_mask

from dit_sparse.kernels.device import on_device
from dit_sparse.kernels.indices import BLOCK, WORD_BITS, BlockIndices
from dit_sparse.kernels.peer_lists import peer_lists, refuse_call

Rule = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

# Every shape is a program of its own; torch's usual limit is 8.
MOST_PROGRAMS = 1024


def refusal(
    q: Tensor, k: Tensor, v: Tensor, indices: BlockIndices, kv_lengths: Tensor | None, compensate: bool
) -> str | None:
    """Say why FlexAttention cannot run this call, or return None."""
    if q.device.type != "cuda":
        return f"tensors must be on a GPU, got {q.device}"
    if q.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"dtype must be float16, bfloat16 or float32, got {str(q.dtype).removeprefix('torch.')}"
    if q.shape[-1] < 16:
        return f"head_dim must be at least 16, got {q.shape[-1]}"
    return refuse_call(indices, kv_lengths, compensate)


def attention(
    q: Tensor,  # [B, Sq, H, D]
    k: Tensor,  # [B, Sk, Hkv, D]
    v: Tensor,  # [B, Sk, Hkv, D]
    indices: BlockIndices,
    scale: float,
    kv_lengths: Tensor | None = None,  # must be None, see refusal
    compensate: bool = False,  # must be False
    compiled: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute out [B, Sq, H, D] in q.dtype and the LSE twice, fp32 [B, Sq, H].

    Not compiled, FlexAttention reads no lists but every pair's mask: the slow twin, for small shapes on any device.
    """
    assert kv_lengths is None, "refusal names it"
    assert not compensate, "refusal names it"
    return attend_blocks(q, k, v, block_mask(q, k, indices, compiled), scale, compiled)


def block_mask(q: Tensor, k: Tensor, indices: BlockIndices, compiled: bool = True) -> BlockMask:
    """Make what FlexAttention's user makes once per mask; the mask rule of the slow twin knows the blocks too."""
    lists = peer_lists(indices, q.shape[0])
    tiles = _tile_rule(indices, q.shape[2]) if indices.mask_id is not None else None
    return BlockMask.from_kv_blocks(
        lists.masked_count,
        lists.masked,
        lists.full_count,
        lists.full,
        BLOCK_SIZE=BLOCK,
        mask_mod=tiles if compiled else _whole_rule(indices, q.shape[2], tiles),
        seq_lengths=(q.shape[1], k.shape[1]),
        compute_q_blocks=False,
    )


def attend_blocks(
    q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, scale: float, compiled: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """Do what attention() does, from a mask that exists already."""
    run: Any = _program() if compiled else flex_attention
    by_head = (x.transpose(1, 2) for x in (q, k, v))
    limits = {"recompile_limit": MOST_PROGRAMS, "accumulated_recompile_limit": MOST_PROGRAMS}
    # Up to head_dim 64 torch 2.11 takes 128x128 tiles in three stages, and the words of a mask want 64 KiB in each.
    crowded = mask.mask_mod is not noop_mask and q.shape[-1] <= 64
    with on_device(q), torch._dynamo.config.patch(limits):
        out, aux = run(
            *by_head, block_mask=mask, scale=scale, enable_gqa=q.shape[2] != k.shape[2],
            kernel_options={"num_stages": 2} if crowded and compiled else None, return_aux=AuxRequest(lse=True),
        )  # fmt: skip
    lse = aux.lse.transpose(1, 2)
    return out.transpose(1, 2), lse, lse


@functools.cache
def _program() -> Callable[..., Any]:
    # fullgraph: a call that cannot be compiled must fail and not run uncompiled
    program: Callable[..., Any] = torch.compile(flex_attention, dynamic=False, fullgraph=True)
    return program


def _tile_rule(indices: BlockIndices, heads: int) -> Rule:
    """Return the rule of blocks that carry a bit tile: is this pair's bit set?"""
    head_of, mask_id, masks = indices.head_of, indices.mask_id, indices.masks
    assert mask_id is not None
    assert masks is not None

    def seen(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        tile = mask_id[head_of[batch * heads + head], query // BLOCK, key // BLOCK].to(torch.int32)
        word = masks[tile, query % BLOCK, key % BLOCK // WORD_BITS]
        return (word >> (key % WORD_BITS)) & 1 == 1

    return seen


def _whole_rule(indices: BlockIndices, heads: int, tiles: Rule | None) -> Rule:
    """Return the rule of all blocks: visited, and if it carries a bit tile, the pair's bit set."""
    visited, partial, head_of = indices.block_mask(), indices.partial_mask(), indices.head_of

    def seen(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        place = (head_of[batch * heads + head], query // BLOCK, key // BLOCK)
        if tiles is None:
            return visited[place]
        return visited[place] & (~partial[place] | tiles(batch, head, query, key))

    return seen
