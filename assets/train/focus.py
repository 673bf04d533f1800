"""Watch how spread the attention of a Wan transformer is while it trains, so that the loss can draw it together."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.models.transformers import transformer_wan
from torch import Tensor

ROWS = 32  # queries a clip and head: enough for a mean over a batch


class _Watched:
    """Hold what one forward adds up. Compiled blocks read and write it as inputs and outputs of their graphs."""

    spread: Tensor
    rows: Tensor


_WATCHED = _Watched()
_dispatch_stock = transformer_wan.dispatch_attention_fn


@contextmanager
def watched_attention() -> Iterator[None]:
    """Let every self-attention of Wan transformers add to `spread()` until the block ends."""
    transformer_wan.dispatch_attention_fn = _dispatch_watched
    try:
        yield
    finally:
        transformer_wan.dispatch_attention_fn = _dispatch_stock


def start(rows: Tensor) -> None:
    """Begin a forward: `rows` [ROWS] are places of the sampled queries, in [0, 1) of the sequence."""
    _WATCHED.rows = rows
    # wants gradients from the first layer on: one compiled graph serves all layers
    _WATCHED.spread = torch.zeros((), device=rows.device, requires_grad=True)


def spread() -> Tensor:
    """Return the sum over the layers since `start` of the mean entropy of attention rows over its maximum, a scalar."""
    return _WATCHED.spread


def entropy_share(query: Tensor, key: Tensor, rows: Tensor) -> Tensor:
    """Return the mean over batch, heads and sampled rows of H(softmax) / log N, in 0..1.

    query, key: [B, N, H, D]; rows: [R] in [0, 1). N to the power of (share - 1) is the share of keys that a row uses.
    """
    tokens = query.shape[1]
    picked = query[:, (rows * tokens).long()]
    logits = torch.einsum("brhd,bkhd->bhrk", picked, key).float() * query.shape[-1] ** -0.5
    log_weights = logits.log_softmax(dim=-1)
    return -(log_weights.exp() * log_weights).sum(dim=-1).mean() / math.log(tokens)


def _dispatch_watched(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    if query.shape[1] == key.shape[1]:  # the text is never as long as the video
        _WATCHED.spread = _WATCHED.spread + entropy_share(query, key, _WATCHED.rows)
    out: Tensor = _dispatch_stock(query, key, value, *args, **kwargs)
    return out
