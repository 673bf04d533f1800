"""Padded text: from a model's attention mask to the number of real keys, so that no kernel needs a mask."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dit_sparse.grid import Grid

# An additive mask hides a key with -inf, or with a number that no score survives: models write -10000, which bfloat16
# rounds to -9984.
HIDDEN = -9e3
ROWS_PER_CHUNK = 1024  # of a mask of all queries by all keys, compared at once
SOURCES_KEPT = 8  # a run needs one for each branch


@dataclass(frozen=True, eq=False)
class Padding:
    """Say how many keys of each sample are real, and which.

    lengths: Python ints, one for each sample; video tokens are all real. on_device: the same, int32 [B].
    text_order: int64 [B, text tokens], the text (prefix, suffix) with real tokens first; None where it is so already.
    bias: what the mask adds to the scores of the other keys, measured from the real ones; -inf hides them.
    own_text_rows: text queries see other keys than the video's do, or weigh them otherwise.
    """

    grid: Grid
    lengths: tuple[int, ...]
    on_device: Tensor
    text_order: Tensor | None
    bias: float = -math.inf
    own_text_rows: bool = False

    @property
    def hides(self) -> bool:
        """Say whether keys that are not real are as good as absent, for all queries that anybody reads."""
        return self.bias == -math.inf and not self.own_text_rows

    @property
    def length(self) -> int | None:
        """Return the length that all samples share, or None."""
        return self.lengths[0] if len(set(self.lengths)) == 1 else None

    def real_first(self, x: Tensor) -> Tensor:
        """Put the real ones first among keys or values [B, S, H, D] in kernel order; keys are a set."""
        if self.text_order is None:
            return x
        video = self.grid.video_tokens
        return torch.cat([x[:, :video], _gather(x[:, video:], self.text_order)], 1)

    def trimmed(self, x: Tensor, real_tokens: int) -> Tensor:
        """Return real_tokens real ones of keys or values [B, S, H, D] in the model's order; their order is free."""
        video = slice(self.grid.prefix, self.grid.prefix + self.grid.video_tokens)
        of_text = real_tokens - self.grid.video_tokens
        if self.text_order is None and of_text >= self.grid.prefix:
            return x[:, :real_tokens]
        if self.text_order is None:
            return torch.cat([x[:, :of_text], x[:, video]], 1)
        text = torch.cat([x[:, : video.start], x[:, video.stop :]], 1)
        return torch.cat([x[:, video], _gather(text, self.text_order[:, :of_text])], 1)

    def split(self) -> list[Padding]:
        """Return the padding of each sample alone."""
        orders = [None] * len(self.lengths) if self.text_order is None else self.text_order.split(1)
        parts = zip(self.lengths, self.on_device.split(1), orders, strict=True)
        return [
            replace(self, lengths=(length,), on_device=on_device, text_order=order)
            for length, on_device, order in parts
        ]


class TensorSources:
    """Tell whether tensors are those of an earlier forward, unchanged: then so is what was made of them.

    Reading values waits for the device, so one reading serves a run. Weak references: nothing is kept alive. A change
    counts where torch counts it: one through `.data` or numpy is not seen, and tensors made under
    `torch.inference_mode()` are taken for new ones each time.
    """

    def __init__(self) -> None:
        self._known: list[tuple[tuple[weakref.ref[Tensor], ...], tuple[int, ...], object]] = []

    def source(self, tensors: Iterable[Tensor]) -> object:
        """Return the object that stands for these tensors as they are now."""
        given = tuple(tensors)
        if not given or any(tensor.is_inference() for tensor in given):
            return object()  # nothing to know it by: inference tensors do not count their changes
        versions = tuple(tensor._version for tensor in given)
        for references, known_versions, source in self._known:
            same = len(references) == len(given) and all(ref() is x for ref, x in zip(references, given, strict=True))
            if same and known_versions == versions:
                return source
        made = object()
        self._known = [*self._known[1 - SOURCES_KEPT :], (tuple(map(weakref.ref, given)), versions, made)]
        return made

    def __getstate__(self) -> dict[str, object]:
        return {"_known": []}  # weak references do not pickle


def read_padding(mask: Tensor, grid: Grid, batch: int) -> Padding | str:
    """Read a mask over text keys, or say why it is something else; waits for the device.

    mask: [B or 1, Sk] or [B or 1, 1, 1 or Sq, Sk], boolean (True attends) or additive; Sk may leave out tokens in
    front, which are real then. All video queries must see all video keys, and the same text keys; of the text keys
    some may be hidden, or all get one bias.
    """
    rows = mask[:, None, None] if mask.dim() == 2 else mask
    if rows.dim() == 4:  # expanded over heads or queries
        rows = rows[:, :1] if rows.stride(1) == 0 else rows
        rows = rows[:, :, :1] if rows.stride(2) == 0 else rows
    queries = (1, grid.tokens, grid.video_tokens)
    if rows.dim() != 4 or rows.shape[1] != 1 or rows.shape[0] not in (1, batch) or rows.shape[2] not in queries:
        return f"attention mask of shape {tuple(mask.shape)}"
    missing = grid.tokens - rows.shape[3]
    if missing < 0 or (missing > 0 and rows.dtype != torch.bool):
        return f"attention mask of shape {tuple(mask.shape)}"
    video = slice(grid.prefix, grid.prefix + grid.video_tokens)
    per_query = rows.shape[2] == grid.tokens
    first = rows[:, 0, video.start if per_query else 0]  # the row of a video query
    seen, bias = _seen(first, slice(video.start - missing, video.stop - missing))
    if bias is None:
        return "attention mask with several biases"
    seen = torch.nn.functional.pad(seen, (missing, 0), value=True).expand(batch, -1)
    if not bool(seen[:, video].all()):
        return "attention mask that hides or weighs video tokens"
    if rows.shape[2] > 1 and not _same_rows(rows[:, 0, video] if per_query else rows[:, 0], first):
        return "attention mask that differs between video tokens"
    own_text_rows = False
    if per_query:
        # text that nobody reads may have any row
        read = seen if bias == -math.inf else torch.ones_like(seen)
        text_rows = ((rows[:, 0, part], read[:, part]) for part in (slice(video.start), slice(video.stop, None)))
        own_text_rows = not all(_same_rows(part, first, of_part) for part, of_part in text_rows)
    text = torch.cat([seen[:, : video.start], seen[:, video.stop :]], 1)
    lengths = grid.video_tokens + text.sum(1, dtype=torch.int32)
    order = torch.argsort((~text).byte(), dim=1, stable=True)
    in_order = bool((order == torch.arange(text.shape[1], device=mask.device)).all())
    counts = tuple(int(length) for length in lengths.tolist())
    return Padding(grid, counts, lengths.to(torch.int32), None if in_order else order, bias, own_text_rows)


def _gather(x: Tensor, order: Tensor) -> Tensor:  # [B, T, H, D], int64 [B, n] -> [B, n, H, D]
    return x.gather(1, order[:, :, None, None].expand(-1, -1, *x.shape[2:]))


def _seen(row: Tensor, video: slice) -> tuple[Tensor, float | None]:
    """Return which keys a row [B, Sk] sees as it sees the video, and the bias of the others; None for several."""
    if row.dtype == torch.bool:
        return row, -math.inf
    relative = row.double() - row[:, video.start, None].double()
    seen = relative == 0
    others = relative[~seen]
    if bool((others <= HIDDEN).all()):
        return seen, -math.inf
    bias = float(others[0])
    return seen, bias if bool((others == bias).all()) else None


def _same_rows(rows: Tensor, first: Tensor, read: Tensor | None = None) -> bool:
    """Say whether all rows [B, Sq, Sk], or those to be read [B, Sq], equal the row `first` [B, Sk]."""
    for at in range(0, rows.shape[1], ROWS_PER_CHUNK):
        part = slice(at, at + ROWS_PER_CHUNK)
        same = (rows[:, part] == first[:, None]).all(-1)
        if not bool((same if read is None else same | ~read[:, part]).all()):
            return False
    return True
