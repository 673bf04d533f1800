"""Score candidate patterns beside a dense run: sampled blocks of query rows against exact attention."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dit_sparse.attention import Layer
from dit_sparse.execution import Execution, Prepared, Tensors
from dit_sparse.moment import Call, Moment
from dit_sparse.order import Layout
from dit_sparse.patterns import Pattern
from dit_sparse.record import LayerRecord
from dit_sparse.rows import recall_of
from dit_sparse.runner import attend_indices, attend_selection

MEASURED = ("recall", "error", "projected", "density")
ROWS = 1024  # sampled query tokens of a call, in whole blocks


@dataclass(frozen=True)
class Scores:
    """Hold what candidates did to one attention call, fp32 [candidates, heads] each.

    recall: exact softmax mass on the keys that were read, mean over the sampled rows. error: relative L2 of a head's
    output, squared. projected: what a head's error adds to the squared output of the layer behind its output
    projection, over that output; where a module has no plain projection, before it. density: pairs in visited blocks
    over all pairs of video tokens. calls: how many calls these are the mean of.
    """

    recall: Tensor
    error: Tensor
    projected: Tensor
    density: Tensor
    calls: int = 1

    @staticmethod
    def stack(scores: Sequence[Scores]) -> Scores:
        """Put the scores of single candidates, [heads] each, into one."""
        return _built({name: torch.stack([getattr(one, name) for one in scores]) for name in MEASURED}, 1)

    @staticmethod
    def mean(scores: Sequence[Scores]) -> Scores:
        """Return the mean over calls."""
        means = {name: torch.stack([getattr(one, name) for one in scores]).mean(0) for name in MEASURED}
        return _built(means, sum(one.calls for one in scores))

    @staticmethod
    def none() -> Scores:
        """Return what a layer gives that was never called, or never with a known grid."""
        return _built({name: torch.zeros(0, 0) for name in MEASURED}, 0)


def _built(tensors: Mapping[str, Tensor], calls: int) -> Scores:
    return Scores(tensors["recall"], tensors["error"], tensors["projected"], tensors["density"], calls)


@dataclass(frozen=True)
class Visit:
    """Ask for one candidate in one call; unmeasured ones only choose, and remember, until they are measured."""

    pattern: Pattern
    measured: bool = True


class Scoring(Execution):
    """Run every call as the model does, bit for bit, and score candidates beside it.

    visits: says what to look at in a call. heard: gets the scores of the measured visits, in their order.
    """

    def __init__(
        self,
        backend: str,
        visits: Callable[[Layer, Moment, Tensors, Call], Sequence[Visit]],
        heard: Callable[[Layer, Moment, Scores], None],
        projection: Callable[[Layer], Tensor | None],
        rows: int = ROWS,
    ) -> None:
        super().__init__(backend)
        self.visits, self.heard, self.projection, self.rows = visits, heard, projection, rows

    def sparse(self, layer: Layer, given: Tensors, call: Call, moment: Moment, record: LayerRecord) -> Tensor:
        record.sparse_calls += 1
        exacts: dict[int, Exactly] = {}
        visits = self.visits(layer, moment, given, call)
        found = [self._score(visit, layer, given, call, moment, exacts) for visit in visits]
        if scores := [one for one in found if one is not None]:
            self.heard(layer, moment, Scores.stack(scores))
        return layer.dense(
            given.q, given.k, given.v, given.mask, 0.0, False, given.scale, given.enable_gqa, given.backend
        )

    def _score(
        self, visit: Visit, layer: Layer, given: Tensors, call: Call, moment: Moment, exacts: dict[int, Exactly]
    ) -> Scores | None:
        """Let one candidate choose for all heads and, if it is measured, attend; exacts are those of this call."""
        everyone = tuple(range(given.q.shape[2]))
        ready = self.prepare(layer, visit.pattern.at_layer(layer.index), everyone, given, call, moment)
        if not visit.measured:
            return None
        layout = ready.state.layout
        if id(layout) not in exacts:
            exacts[id(layout)] = Exactly.of(ready, self._sampled(layout), self.projection(layer))
        scores = exacts[id(layout)].scores(ready, self.backend, call.video_pairs(ready.q[:1, :, :1]))
        ready.state.memory.clear()  # a plan that changes with the next step group begins anew
        return scores

    def _sampled(self, layout: Layout) -> Sampled:
        key, shared = ("sampled", id(layout), self.rows), self._shared_of(layout.grid)
        if key not in shared:
            shared[key] = Sampled.of(layout, self.rows)
        sampled: Sampled = shared[key]
        return sampled


@dataclass(frozen=True, eq=False)
class Sampled:
    """Name some video blocks of a layout and the kernel positions of their tokens."""

    blocks: Tensor  # int64 [n]
    rows: Tensor  # int64 [R]

    @staticmethod
    def of(layout: Layout, wanted_rows: int) -> Sampled:
        """Spread as many blocks over the layout as hold about so many tokens, each in a stratum of its own."""
        count = max(1, min(layout.video_blocks, round(wanted_rows * layout.video_blocks / layout.grid.video_tokens)))
        device = layout.start.device
        edges = torch.arange(count + 1, device=device) * layout.video_blocks // count
        # at changing places in the strata: no period of a pattern is met by a period of the sample
        within = torch.arange(count, device=device) * 0.6180339887 % 1
        blocks = (edges[:-1] + within * (edges[1:] - edges[:-1])).long()
        start, length = layout.start[blocks].long(), layout.length[blocks].long()
        ends = length.cumsum(0)
        rows = torch.arange(int(ends[-1]), device=device) + torch.repeat_interleave(start - ends + length, length)
        return Sampled(blocks, rows)


@dataclass(frozen=True, eq=False)
class Exactly:
    """Hold exact attention of the sampled rows of one call, and what errors are measured by."""

    sampled: Sampled
    out: Tensor  # fp32 [B, R, H, D]
    lse: Tensor  # fp32 [B, R, H]
    gram: Tensor | None  # fp32 [H, D, D]: of each head's share of the output projection; None for the identity
    layer_square: Tensor  # fp32 []: of the projected output of all heads

    @staticmethod
    def of(ready: Prepared, sampled: Sampled, weights: Tensor | None) -> Exactly:
        """Attend exactly; weights [C, H*D] are those of the output projection."""
        assert ready.state.exact is not None
        out, lse = ready.state.exact(ready.q[:, sampled.rows].contiguous())
        out = out.float()
        if weights is None:
            return Exactly(sampled, out, lse, None, out.square().sum())
        by_head = weights.to(out.device).float().unflatten(1, (out.shape[2], -1))  # [C, H, D]
        gram = torch.einsum("chd,che->hde", by_head, by_head)
        projected = torch.einsum("brhd,chd->brc", out, by_head)
        return Exactly(sampled, out, lse, gram, projected.square().sum())

    def scores(self, ready: Prepared, backend: str, pairs: float) -> Scores:
        """Compare one candidate with the exact rows; pairs are those of the video tokens of one head."""
        out, lse = self._attend(ready, backend)
        wrong = out.float() - self.out
        square = wrong.square() if self.gram is None else torch.einsum("brhd,hde->brhe", wrong, self.gram) * wrong
        tiny = torch.finfo(torch.float32).tiny
        batch = len(out)
        return Scores(
            recall_of(lse, torch.arange(lse.shape[1], device=lse.device), self.lse).mean(0),
            wrong.square().sum((0, 1, 3)) / self.out.square().sum((0, 1, 3)).clamp(min=tiny),
            square.sum((0, 1, 3)).clamp(min=0.0) / self.layer_square.clamp(min=tiny),
            ready.selection.visited_pairs.view(batch, -1).mean(0).float() / pairs,
        )

    def _attend(self, ready: Prepared, backend: str) -> tuple[Tensor, Tensor]:
        """Return the candidate's output [B, R, H, D] of the sampled rows and the LSE over what it read, [B, R, H]."""
        state, selection, rows = ready.state, ready.selection, self.sampled.rows
        where = (state.scale, state.kv_lengths, backend, ready.biased)
        if selection.head_order is not None:  # the blocks of each head hold other rows: all of them are needed
            attended = attend_selection(selection, ready.q, ready.k, ready.v, state.layout, *where)
            return attended.out[:, rows], attended.computed_lse[:, rows]
        indices, q = selection.indices.some_queries(self.sampled.blocks), ready.q[:, rows].contiguous()
        attended = attend_indices(q, ready.k, ready.v, indices, selection.compensate, *where)
        return attended.out, attended.computed_lse
