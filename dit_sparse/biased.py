"""Text keys that a mask neither hides nor leaves alone: a second, small attention that is merged by its LSE."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dit_sparse.kernels.backends import block_attention
from dit_sparse.kernels.indices import BlockIndices, from_block_mask
from dit_sparse.padding import Padding
from dit_sparse.selection import Attended


@dataclass(frozen=True, eq=False)
class BiasedKeys:
    """Hold the keys of one call whose logits a mask shifts by one number."""

    keys: Tensor  # [B, T, Hkv, D], the biased ones first
    values: Tensor  # [B, T, Hkv, D]
    count: Tensor  # int32 [B]
    bias: float
    start: Tensor  # int32 [blocks of text]
    length: Tensor
    scale: float
    backend: str

    def added(self, attended: Attended, q: Tensor, indices: BlockIndices) -> Attended:
        """Let the queries [B, Sq, H, D] that read text by their indices read these keys, too."""
        reads_text = indices.block_mask()[:, :, -len(self.start) :].any(-1, keepdim=True)
        listed = from_block_mask(
            reads_text.expand(-1, -1, len(self.start)), indices.head_of, indices.q_start, indices.q_len, self.start,
            self.length,
        )  # fmt: skip
        more, lse = block_attention(
            q, self.keys, self.values, listed, scale=self.scale, kv_lengths=self.count, backend=self.backend
        )
        lse = lse + self.bias
        share = torch.sigmoid(lse - attended.lse).nan_to_num()[..., None]  # rows without any key stay 0
        out = (attended.out.float() * (1 - share) + more.float() * share).to(attended.out.dtype)
        return Attended(out, torch.logaddexp(attended.lse, lse), torch.logaddexp(attended.computed_lse, lse))


def biased_keys(
    k: Tensor,  # [B, S, Hkv, D] in kernel order, real text first
    v: Tensor,
    padding: Padding,
    text_blocks: tuple[Tensor, Tensor],
    scale: float,
    backend: str,
) -> BiasedKeys:
    """Return the keys behind the real ones of each sample, whose bias `padding` tells."""
    text = padding.grid.video_tokens
    count = (padding.grid.tokens - padding.on_device).to(torch.int32)
    start, length = text_blocks
    return BiasedKeys(k[:, text:].flip(1), v[:, text:].flip(1), count, padding.bias, start, length, scale, backend)
