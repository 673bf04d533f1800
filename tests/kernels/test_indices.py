"""BlockIndices: packing, tiling, compaction and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_sparse.kernels.indices import (
    BLOCK,
    BlockIndices,
    from_block_mask,
    from_token_mask,
    pack_bits,
    random_indices,
    segment_blocks,
    token_owner,
    unpack_bits,
)
from dit_sparse.kernels.lists import NO_TILE, compact, tile_masks

# Lengths around the block and the word: nothing, one, a word's edge, a block's edge, several blocks.
LENGTHS = st.lists(st.sampled_from([0, 1, 31, 32, 77, 127, 128, 129, 256, 300]), min_size=1, max_size=4).filter(any)


@settings(max_examples=60, deadline=None)
@given(count=st.integers(1, 140), seed=st.integers(0, 1000))
def test_pack_and_unpack_are_inverse(count: int, seed: int) -> None:
    mask = torch.rand((2, 3, count), generator=torch.Generator().manual_seed(seed)) < 0.5
    words = pack_bits(mask)
    assert words.shape == (2, 3, -(-count // 32))
    assert words.dtype == torch.int32
    assert torch.equal(unpack_bits(words, count), mask)
    assert not unpack_bits(words, words.shape[-1] * 32)[..., count:].any()


def test_bit_order_is_the_documented_one() -> None:
    mask = torch.zeros(40, dtype=torch.bool)
    mask[[0, 5, 31, 33]] = True
    assert pack_bits(mask).tolist() == [1 + 32 - 2**31, 2]


@settings(max_examples=60, deadline=None)
@given(lengths=LENGTHS)
def test_segments_are_tiled_and_never_straddled(lengths: list[int]) -> None:
    start, length = segment_blocks(lengths)
    tokens = [token for s, n in zip(start.tolist(), length.tolist(), strict=True) for token in range(s, s + n)]
    assert tokens == list(range(sum(lengths)))
    edges = torch.tensor(lengths).cumsum(0).tolist()
    for s, n in zip(start.tolist(), length.tolist(), strict=True):
        assert 1 <= n <= BLOCK
        assert not any(s < edge < s + n for edge in edges)


def test_segment_blocks_refuses_negative_lengths() -> None:
    with pytest.raises(ValueError, match=r"must be >= 0, got \[3, -1\]"):
        segment_blocks([3, -1])


@settings(max_examples=30, deadline=None)
@given(lengths=LENGTHS, seed=st.integers(0, 100))
def test_token_owner_finds_every_token(lengths: list[int], seed: int) -> None:
    start, length = segment_blocks(lengths)
    order = torch.randperm(len(start), generator=torch.Generator().manual_seed(seed))
    block, offset = token_owner(start[order], length[order])
    assert torch.equal(start[order].long()[block] + offset, torch.arange(sum(lengths)))


@settings(max_examples=25, deadline=None)
@given(q=LENGTHS, kv=LENGTHS, partial=st.sampled_from([0.0, 0.5, 1.0]), shuffle=st.booleans(), seed=st.integers(0, 99))
def test_token_mask_round_trip(q: list[int], kv: list[int], partial: float, shuffle: bool, seed: int) -> None:
    indices = random_indices(1, 2, q, kv, partial=partial, shuffle=shuffle, seed=seed)
    mask = torch.stack([indices.token_mask(row) for row in range(indices.rows)])
    again = from_token_mask(mask, indices.head_of, indices.q_start, indices.q_len, indices.kv_start, indices.kv_len)
    assert torch.equal(torch.stack([again.token_mask(row) for row in range(again.rows)]), mask)
    assert not (again.block_mask() & ~indices.block_mask()).any()


def test_equal_tiles_are_stored_once() -> None:
    lower = torch.ones(512, 512, dtype=torch.bool).tril()[None]
    start, length = segment_blocks([512])
    indices = from_token_mask(lower, torch.zeros(1), start, length, start, length)
    assert indices.masks is not None
    assert indices.masks.shape[0] == 1
    assert int(indices.partial_mask().sum()) == 4
    assert int(indices.block_mask().sum()) == 10


@settings(max_examples=40, deadline=None)
@given(
    kv=LENGTHS,
    partial=st.sampled_from([0.0, 0.5]),
    shuffle=st.booleans(),
    lengths=st.none() | st.tuples(st.integers(0, 900), st.integers(0, 900)),
    seed=st.integers(0, 99),
)
def test_compact_says_what_the_definition_says(
    kv: list[int], partial: float, shuffle: bool, lengths: tuple[int, int] | None, seed: int
) -> None:
    indices = random_indices(2, 2, [200], kv, unique=3, partial=partial, shuffle=shuffle, seed=seed)
    kv_lengths = None if lengths is None else torch.tensor(lengths, dtype=torch.int32)
    lists = compact(indices, kv_lengths)
    visited, tiled = indices.block_mask(), indices.partial_mask()
    for head in range(indices.heads):
        row, source = int(lists.row_of[head]), int(indices.head_of[head])
        limit = 2**31 if lengths is None else lengths[head // 2]
        for block in range(indices.query_blocks):
            full, part = [], []
            for key in range(indices.key_blocks):
                start, count = int(indices.kv_start[key]), int(indices.kv_len[key])
                if not visited[source, block, key] or start >= limit:
                    continue
                has_tile = bool(tiled[source, block, key])
                whole = not has_tile and count == BLOCK and start + count <= limit
                (full if whole else part).append(key)
            n_full, n_part = int(lists.full_count[row, block]), int(lists.partial_count[row, block])
            assert lists.blocks[row, block, : n_full + n_part].tolist() == full + part
            assert (n_full, n_part) == (len(full), len(part))
            if lists.tiles is None or indices.mask_id is None:
                continue
            ids = [int(indices.mask_id[source, block, key]) if tiled[source, block, key] else NO_TILE for key in part]
            assert lists.tiles[row, block, n_full : n_full + n_part].tolist() == ids


def test_items_name_every_query_block_once_and_busy_heads_first() -> None:
    indices = random_indices(2, 3, [640], [900], density=0.3, partial=0.5, unique=4, seed=int(torch.randint(99, ())))
    lists = compact(indices)
    head, entry, full, count = lists.items.T.long()
    blocks = indices.query_blocks
    assert torch.equal(entry, lists.row_of[head].long() * blocks + torch.arange(blocks).repeat(6))
    assert torch.equal(head.view(6, blocks), head[::blocks, None].expand(-1, blocks))
    assert sorted(head[::blocks].tolist()) == list(range(6))
    assert torch.equal(full, lists.full_count.flatten()[entry].long())
    assert torch.equal(count, (lists.full_count + lists.partial_count).flatten()[entry].long())
    of_heads = count.view(6, blocks).sum(-1).tolist()
    assert of_heads == sorted(of_heads, reverse=True)


def test_tile_of_minus_one_is_all_ones() -> None:
    indices = random_indices(1, 1, [128], [128], partial=1.0)
    assert tile_masks(indices)[NO_TILE].all()


def _example() -> BlockIndices:
    return random_indices(1, 2, [300], [200, 77], partial=0.5)


def test_indices_refuse_wrong_shapes_dtypes_and_halves() -> None:
    indices = _example()
    with pytest.raises(ValueError, match=r"bits must have shape \(2, 3, 1\)"):
        replace(indices, bits=indices.bits[:, :2])
    with pytest.raises(TypeError, match=r"head_of must be torch.int32, got torch.int64"):
        replace(indices, head_of=indices.head_of.long())
    with pytest.raises(ValueError, match="must be given together"):
        replace(indices, masks=None)
    with pytest.raises(ValueError, match="one device"):
        replace(indices, q_start=indices.q_start.to("meta"))


def test_validate_explains_what_does_not_fit() -> None:
    indices = _example()
    q, k = torch.zeros(1, 300, 2, 32), torch.zeros(1, 277, 2, 32)
    indices.validate(q, k, k)
    with pytest.raises(ValueError, match=r"head_of must have batch \* heads entries, got head_of=2, batch=2, heads=2"):
        indices.validate(q.expand(2, -1, -1, -1), k.expand(2, -1, -1, -1), k.expand(2, -1, -1, -1))
    with pytest.raises(ValueError, match=r"query blocks must cover every token once, .* tokens=299"):
        indices.validate(q[:, :299], k, k)
    with pytest.raises(ValueError, match=r"key blocks must cover every token once, .* tokens=276"):
        indices.validate(q, k[:, :276], k[:, :276])
    with pytest.raises(ValueError, match="must be on one device"):
        indices.validate(q.to("meta"), k, k)
    overlapping = replace(indices, q_start=torch.tensor([0, 100, 228], dtype=torch.int32))
    with pytest.raises(ValueError, match="cover every token once"):
        overlapping.validate(q, k, k)
    with pytest.raises(ValueError, match=r"head_of must name rows 0\.\.1"):
        replace(indices, head_of=indices.head_of + 1).validate(q, k, k)


def test_from_block_mask_and_to() -> None:
    start, length = segment_blocks([256])
    mask = torch.eye(2, dtype=torch.bool)[None]
    indices = from_block_mask(mask, torch.zeros(3), start, length, start, length)
    assert indices.heads == 3
    assert torch.equal(indices.to("cpu").block_mask(), mask)
