"""From the token rule of a static pattern to the blocks a kernel visits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from dit_sparse.kernels.indices import BLOCK, BlockIndices, pack_bits
from dit_sparse.order import Layout
from dit_sparse.selection import Selection

Rule = Callable[[Tensor, Tensor], Tensor]

# Token pairs evaluated at once while a static mask is built: bounds its memory at some hundred MiB.
PAIRS_PER_CHUNK = 1 << 24
MOST_MASKS = torch.iinfo(torch.int16).max


def rule_selection(rule: Rule, layout: Layout, reads_text: bool = True) -> Selection:
    """Turn a token rule (q_index, k_index) -> bool over video tokens in raster order into blocks: `U` = 1.

    Every pair of video blocks is classified as empty, full or partial by evaluating the rule, a slab of query blocks
    at a time; partial blocks keep their 128x128 bit tile, equal tiles once. Text blocks are full.

    Raises: ValueError where the partial blocks have more than 32,767 distinct bit tiles.
    """
    device, blocks, video = layout.start.device, layout.blocks, layout.video_blocks
    visited = torch.ones(blocks, blocks, dtype=torch.bool, device=device)
    partial = torch.zeros(blocks, blocks, dtype=torch.bool, device=device)
    visited[:video, video:] = reads_text
    length = layout.length[:video].long()
    tiles, kept_pairs = [], torch.zeros((), dtype=torch.float64, device=device)
    for rows, kept in _slabs(rule, layout, torch.arange(video, device=device)):
        pairs = kept.sum((2, 3))  # [slab, video]
        some = pairs > 0
        part = some & (pairs < length[rows, None] * length)
        visited[rows, :video], partial[rows, :video] = some, part
        kept_pairs += pairs.sum()
        tiles.append(pack_bits(kept[part]))
    visited_pairs = (visited[:video, :video] * (length[:, None] * length)).sum(dtype=torch.float64)
    masks, mask_id = _distinct(torch.cat(tiles), partial)
    indices = BlockIndices(
        pack_bits(visited)[None],
        torch.zeros(1, dtype=torch.int32, device=device),
        layout.start,
        layout.length,
        layout.start,
        layout.length,
        None if masks is None else pack_bits(partial)[None],
        mask_id,
        masks,
    )
    return Selection(indices, kept_pairs[None], visited_pairs[None])


def rule_densities(rule: Rule, layout: Layout, sampled_blocks: int | None = None) -> tuple[float, float]:
    """Return (density, computed density) among video tokens; of evenly spread query blocks only where told so."""
    video = layout.video_blocks
    rows = torch.arange(video, device=layout.start.device)
    if sampled_blocks is not None and sampled_blocks < video:
        # one in each stratum, at changing places, so that no period of the rule is met by a period of the sample
        rows = (torch.arange(sampled_blocks, device=rows.device) * 0.6180339887 % 1 + rows[:sampled_blocks]).double()
        rows = (rows * video / sampled_blocks).long()
    length = layout.length[:video].long()
    kept_pairs = visited_pairs = 0
    for part, kept in _slabs(rule, layout, rows):
        pairs = kept.sum((2, 3))
        kept_pairs += int(pairs.sum())
        visited_pairs += int(((pairs > 0) * (length[part, None] * length)).sum())
    everything = int(length[rows].sum()) * int(length.sum())
    return kept_pairs / everything, visited_pairs / everything


def stacked(selections: Sequence[Selection], head_of: Tensor) -> Selection:
    """Put selections of one row each into one with a row for each; head_of int32 [B*H] names the row of every head."""
    first, count = selections[0].indices, len(selections)
    if count == 1:
        indices = replace(first, head_of=head_of)
    else:
        tiled = [s.indices for s in selections if s.indices.masks is not None]
        masks = partial_bits = mask_id = None
        if tiled:
            every = torch.cat([one.masks for one in tiled if one.masks is not None])
            masks, place = torch.unique(every, dim=0, return_inverse=True)
            _check_count(masks)
            ids, partials, at = [], [], 0
            for one in (s.indices for s in selections):
                if one.masks is None or one.mask_id is None or one.partial_bits is None:
                    partials.append(torch.zeros_like(one.bits))
                    ids.append(torch.zeros(1, one.query_blocks, one.key_blocks, dtype=torch.int16, device=one.device))
                    continue
                partials.append(one.partial_bits)
                ids.append(place[at : at + len(one.masks)].to(torch.int16)[one.mask_id.long()])
                at += len(one.masks)
            partial_bits, mask_id = torch.cat(partials), torch.cat(ids)
        indices = BlockIndices(
            torch.cat([s.indices.bits for s in selections]), head_of, first.q_start, first.q_len, first.kv_start,
            first.kv_len, partial_bits, mask_id, masks,
        )  # fmt: skip
    rows = head_of.long()
    kept = torch.cat([s.kept_pairs for s in selections])[rows]
    return Selection(indices, kept, torch.cat([s.visited_pairs for s in selections])[rows])


def _slabs(rule: Rule, layout: Layout, rows: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (query blocks int64 [n], kept pairs bool [n, video blocks, 128, 128]) for the named rows of blocks."""
    index = layout.video_index()
    lanes = (index >= 0)[None, :, None, :]
    keys = index.clamp(min=0)[None, :, None, :]
    for part in rows.split(max(1, PAIRS_PER_CHUNK // (BLOCK * BLOCK * layout.video_blocks))):
        queries = index[part]
        yield part, rule(queries.clamp(min=0)[:, None, :, None], keys) & (queries >= 0)[:, None, :, None] & lanes


def _distinct(tiles: Tensor, partial: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Store equal bit tiles [P, 128, 4] once: masks [M, 128, 4] and mask_id int16 [1, Q, K], or None without any."""
    if not len(tiles):
        return None, None
    masks, inverse = torch.unique(tiles, dim=0, return_inverse=True)
    _check_count(masks)
    mask_id = torch.zeros(partial.shape, dtype=torch.int16, device=partial.device)
    mask_id[partial] = inverse.to(torch.int16)
    return masks, mask_id[None]


def _check_count(masks: Tensor) -> None:
    if len(masks) > MOST_MASKS:
        raise ValueError(
            f"the pattern needs {len(masks)} distinct 128x128 masks on this grid, at most {MOST_MASKS} fit; "
            "use a block form (kind='block') or another token order"
        )
