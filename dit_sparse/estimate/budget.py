"""How many key blocks the rows of a head keep: shared out among heads, or from a target for recall or error.

Everything stays on the device. Budgets are int32 [B*H] and count the blocks that a row keeps of the `competing` ones,
that is of all but those that are always read; forced ones among them.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from dit_sparse.kernels.indices import BLOCK
from dit_sparse.order import Layout

# Heads whose estimated recall at the common budget exceeds this can give blocks away (AdaSpa).
GENEROUS_RECALL = 0.8
# A target may be missed by so much on rows that the budget was not made from...
TOLERANCE = 0.02
# ... which is so many standard errors at least, whatever the rows look like.
RECALL_ERRORS, OUTPUT_ERRORS = 4.0, 3.0
LEAST_ROWS = 512


def ranking(score: Tensor, always: Tensor, forced: Tensor | None) -> Tensor:
    """Order the key blocks of every row as `choose_blocks` does: int64 [B, H, Q, K].

    score fp32 [B, H, Q, K]; forced blocks, bool [Q, K], come first, those that are always read, bool [K], last; ties
    go to the lower index.
    """
    ranked = score if forced is None else score.masked_fill(forced, torch.inf)
    ranked = ranked.masked_fill(always, -torch.inf)
    return ranked.argsort(dim=-1, descending=True, stable=True)


def rows_for_recall(recall: float) -> int:
    """Return how many rows of a head tell its mean recall to TOLERANCE.

    A row's recall is between 0 and 1, so with mean r its variance is at most r (1 - r): the worst case, where each
    row is read whole or not at all. Strata only lower it. RECALL_ERRORS standard errors of the mean of R rows are then
    at most TOLERANCE for R = r (1 - r) (RECALL_ERRORS / TOLERANCE)^2: 1,900 at .95, 3,600 at .9.
    """
    return max(LEAST_ROWS, math.ceil(recall * (1.0 - recall) * (RECALL_ERRORS / TOLERANCE) ** 2))


def rows_for_error(error: float) -> int:
    """Return how many rows of a head tell its relative output error to TOLERANCE, if their outputs are equally long.

    The worst case then is that a share f = error^2 of the rows errs by its whole output: the mean square over R rows
    has variance f / R at most, and may grow from error^2 to (error + TOLERANCE)^2. 3,907 rows at .05. Heads in which
    few rows are much longer than the rest need more; they are found by the standard error that was measured, see
    `error_budget`.
    """
    room = 2 * error * TOLERANCE + TOLERANCE**2
    return max(LEAST_ROWS, math.ceil((OUTPUT_ERRORS * error / room) ** 2))


def rows_per_block(layout: Layout, wanted: int) -> int:
    """Return the least number of rows per block with which the video blocks of a layout have `wanted` rows or all."""
    sizes = [positions.shape for _, positions in layout.by_length]
    found = (p for p in range(1, BLOCK) if sum(count * min(p, tokens) for count, tokens in sizes) >= wanted)
    return next(found, BLOCK)


def adaptive_budget(
    score: Tensor,  # fp32 [B, H, Q, K]
    ranked: Tensor,  # int64 [B, H, Q, K]
    always: Tensor,  # bool [K]
    weight: Tensor,  # fp32 [Q]: share of each query block in the rows of the head
    keep: int,
    competing: int,
) -> Tensor:
    """Give heads that read much with `keep` blocks half of them, and those that read little what that frees.

    Recall at `keep` is estimated from the scores. Of H heads let n exceed GENEROUS_RECALL, at most H / 2: the n best
    get half of keep, the n worst that much more, the others keep. The sum over the heads of each batch entry stays what
    it was, to the block.

    Paper: AdaSpa (arXiv 2502.21079)
    """
    batch, heads = score.shape[:2]
    share = score.masked_fill(always, -torch.inf).softmax(-1).nan_to_num()
    read = share.gather(-1, ranked[..., :keep]).sum(-1)
    recall = read @ weight  # [B, H]
    giving = (recall > GENEROUS_RECALL).sum(1, keepdim=True).clamp(max=heads // 2)
    place = recall.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    moved = min(keep // 2, competing - keep)
    level = (place >= heads - giving).int() - (place < giving).int()
    return (keep + moved * level).to(torch.int32).view(batch * heads)


def recall_budget(
    share: Tensor,  # fp32 [B, H, Q, K]: mean softmax mass of the exactly computed rows of each query block
    ranked: Tensor,  # int64 [B, H, Q, K]
    always: Tensor,  # bool [K]
    weight: Tensor,  # fp32 [Q]: share of each query block in the rows of the head
    target: float,
    competing: int,
) -> Tensor:
    """Return the least number of blocks per row with which the rows' mean recall reaches the target, int32 [B*H].

    All rows of a head keep the same number, best by score. What is always read counts as read.
    """
    outside = (share * always).sum(-1, keepdim=True)
    read = share.masked_fill(always, 0.0).gather(-1, ranked).cumsum(-1) + outside  # by number of blocks kept, from 1
    curve = torch.einsum("bhqn,q->bhn", read.double(), weight.double())
    return _first(curve >= target, competing)


def error_budget(
    error_of: Callable[[Tensor], tuple[Tensor, Tensor]], heads: int, target: float, competing: int, device: torch.device
) -> Tensor:
    """Return the least number of blocks per row with which the output error is at most the target, int32 [heads].

    error_of takes a budget, int32 [heads], and returns the relative L2 error over the rows of each head, and the
    standard error of its square. It is asked ceil(log2(competing)) times: a bisection, for more blocks err less. A
    head whose few loud rows make its error so uncertain that OUTPUT_ERRORS of them pass the target by more than
    TOLERANCE takes more blocks, until they no longer do. Loud rows that no sample holds stay unknown.
    """
    low = torch.zeros(heads, dtype=torch.int32, device=device)  # too few
    high = torch.full_like(low, competing)
    for _ in range((competing - 1).bit_length()):
        middle = (low + high) // 2
        error, spread = (x.flatten() for x in error_of(middle.clamp(min=1)))
        enough = (error <= target) & (error.square() + OUTPUT_ERRORS * spread <= (target + TOLERANCE) ** 2)
        undecided = high - low > 1
        high = torch.where(undecided & enough, middle, high)
        low = torch.where(undecided & ~enough, middle, low)
    return high


def _first(reached: Tensor, competing: int) -> Tensor:
    """Number the first place of [B, H, K] that is set, from 1; the competing blocks where none is: int32 [B*H]."""
    short = (~reached).int().cumprod(-1).sum(-1, dtype=torch.int32)
    return (short + 1).clamp(max=competing).flatten()
