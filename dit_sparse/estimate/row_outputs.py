"""How far the output of some rows is from exact with the blocks that they would be given."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dit_sparse.estimate.blocks import Blocks
from dit_sparse.kernels.backends import block_attention, compensated_attention
from dit_sparse.kernels.indices import BlockIndices, pack_bits


@dataclass(frozen=True, eq=False)
class RowOutputs:
    """Hold some rows of each scored query block, as query blocks of their own, and their exact output."""

    q: Tensor  # [B, Q * P, H, D]
    k: Tensor  # [B, S, Hkv, D]
    v: Tensor  # [B, S, Hkv, D]
    exact: Tensor  # [B, Q * P, H, D]
    weight: Tensor  # fp32 [Q * P]: the tokens that each row stands for
    everything: BlockIndices  # of these query blocks over all key blocks
    scored: Blocks
    compensate: bool

    def error(self, bits: Tensor) -> tuple[Tensor, Tensor]:
        """Return the relative L2 error of each head and the standard error of its square, fp32 [B, H] each.

        bits int32 [B*H, Q, W]: the key blocks of each query block. The standard error is that of a ratio of sums
        over rows drawn without replacement: 0 where all rows are there. Strata only lower it.
        """
        indices = replace(self.everything, bits=bits)
        attend = compensated_attention if self.compensate else block_attention
        out = attend(
            self.q, self.k, self.v, indices, scale=self.scored.scale, kv_lengths=self.scored.kv_lengths
        )[0]  # fmt: skip
        off = (out.float() - self.exact.float()).square().sum(-1)  # [B, R, H]
        full = self.exact.float().square().sum(-1)
        wrong, norm = (torch.einsum("r,brh->bh", self.weight, x) for x in (off, full))
        square = wrong / norm.clamp(min=torch.finfo(torch.float32).tiny)
        # one of `weight` tokens was drawn: the variance of the sum over them is that of drawing without replacement
        variance = self.weight * (self.weight - 1.0).clamp(min=0.0)
        spread = torch.einsum("r,brh->bh", variance, (off - square[:, None] * full).square()).sqrt()
        return square.sqrt(), spread / norm.clamp(min=torch.finfo(torch.float32).tiny)


def row_outputs(
    q: Tensor,  # [B, S, H, D]
    k: Tensor,  # [B, S, Hkv, D]
    v: Tensor,
    rows: Tensor,  # int64 [Q, P]: some rows of each scored query block, at most 128
    share: Tensor,  # fp32 [Q, P]: the part of its block that each of them stands for
    scored: Blocks,
    compensate: bool,
) -> RowOutputs:
    """Compute some rows exactly, to measure choices of blocks against: as many rows / N of a dense call.

    float64, which only the oracle attends to, is measured in float32.
    """
    if q.dtype == torch.float64:
        q, k, v = q.float(), k.float(), v.float()
    layout, (count, per_block), heads = scored.layout, rows.shape, q.shape[0] * q.shape[2]
    sampled, device = q[:, rows.flatten()], q.device
    everything = BlockIndices(
        pack_bits(torch.ones(heads, count, layout.blocks, dtype=torch.bool, device=device)),
        torch.arange(heads, dtype=torch.int32, device=device),
        torch.arange(count, dtype=torch.int32, device=device) * per_block,
        torch.full((count,), per_block, dtype=torch.int32, device=device),
        layout.start,
        layout.length,
    )
    exact, _ = block_attention(sampled, k, v, everything, scale=scored.scale, kv_lengths=scored.kv_lengths)
    weight = (share * scored.q_length[:, None]).flatten()
    return RowOutputs(sampled, k, v, exact, weight, everything, scored, compensate)
