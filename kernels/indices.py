"""Block indices: all that a block-sparse attention kernel is told, as raw tensors on one device.

Words used here: U unique head rows, Q query blocks, K key blocks, M distinct bit tiles, BLOCK = 128 tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

BLOCK = 128
WORD_BITS = 32
TILE_WORDS = BLOCK // WORD_BITS
MAX_KEY_BLOCKS = 32767  # block numbers travel as int16


@dataclass(frozen=True, eq=False)
class BlockIndices:
    """Hold which key blocks every query block visits, and the token masks of the blocks that are seen in part.

    Query blocks tile the query tokens: disjoint, every token in exactly one, in any order, each of 1 to 128 tokens.
    Key blocks tile the key tokens in the same way. Token numbers are in kernel order.
    """

    bits: Tensor  # int32 [U, Q, ceil(K/32)]: bit k % 32 of word k // 32 set <=> query block visits key block k
    head_of: Tensor  # int32 [B*H]: entry b*H + h names the row of U
    q_start: Tensor  # int32 [Q]
    q_len: Tensor  # int32 [Q]
    kv_start: Tensor  # int32 [K]
    kv_len: Tensor  # int32 [K]
    partial_bits: Tensor | None = None  # int32 like bits, subset of bits: these blocks carry a token mask
    mask_id: Tensor | None = None  # int16 [U, Q, K]: row of masks, valid where the partial bit is set
    masks: Tensor | None = None  # int32 [M, 128, 4]: bit j % 32 of word [m, i, j // 32] <=> query i sees key j

    def __post_init__(self) -> None:
        _check_shapes(self)

    @property
    def rows(self) -> int:
        return self.bits.shape[0]

    @property
    def query_blocks(self) -> int:
        return self.q_start.shape[0]

    @property
    def key_blocks(self) -> int:
        return self.kv_start.shape[0]

    @property
    def heads(self) -> int:
        """Count batch times heads, the length of head_of."""
        return self.head_of.shape[0]

    @property
    def device(self) -> torch.device:
        return self.bits.device

    def to(self, device: torch.device | str) -> BlockIndices:
        """Copy every tensor to a device; tensors already there are kept."""
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: tensor.to(device) for name, tensor in given.items() if tensor is not None})

    def first_queries(self, blocks: int) -> BlockIndices:
        """Keep the first query blocks only: for calls whose queries are the video tokens alone."""
        if blocks == self.query_blocks:
            return self
        rows = {name: getattr(self, name) for name in ("bits", "partial_bits", "mask_id")}
        cut = {name: rows[name][:, :blocks].contiguous() for name in rows if rows[name] is not None}
        return replace(self, q_start=self.q_start[:blocks], q_len=self.q_len[:blocks], **cut)

    def some_queries(self, blocks: Tensor) -> BlockIndices:
        """Keep the query blocks int64 [n] only, in that order; their tokens then follow each other."""
        rows = {name: getattr(self, name) for name in ("bits", "partial_bits", "mask_id")}
        cut = {name: row[:, blocks].contiguous() for name, row in rows.items() if row is not None}
        length = self.q_len[blocks]
        return replace(self, q_start=(length.cumsum(0) - length).int(), q_len=length, **cut)

    def block_mask(self) -> Tensor:
        """Expand the visited blocks: bool [U, Q, K]."""
        return unpack_bits(self.bits, self.key_blocks)

    def partial_mask(self) -> Tensor:
        """Expand the blocks that carry a token mask: bool [U, Q, K]."""
        if self.partial_bits is None:
            return torch.zeros((self.rows, self.query_blocks, self.key_blocks), dtype=torch.bool, device=self.device)
        return unpack_bits(self.partial_bits, self.key_blocks)

    def token_rows(self, row: int, query_block: int) -> Tensor:
        """Expand one query block of one row of U: bool [q_len, Sk]. For the oracle and for pictures only."""
        tiles = unpack_bits(self.bits[row, query_block], self.key_blocks)[:, None, None].expand(-1, BLOCK, BLOCK)
        if self.partial_bits is not None and self.mask_id is not None and self.masks is not None:
            partial = unpack_bits(self.partial_bits[row, query_block], self.key_blocks)
            ids = self.mask_id[row, query_block, partial].long()
            tiles = tiles.clone()
            tiles[partial] = unpack_bits(self.masks[ids], BLOCK)
        block, offset = token_owner(self.kv_start, self.kv_len)
        return tiles[block, :, offset].T[: int(self.q_len[query_block])]

    def token_mask(self, row: int) -> Tensor:
        """Expand one row of U: bool [Sq, Sk] in kernel order. For the oracle and for pictures only."""
        shape = (int(self.q_len.sum()), int(self.kv_len.sum()))
        mask = torch.zeros(shape, dtype=torch.bool, device=self.device)
        for block in range(self.query_blocks):
            start, length = int(self.q_start[block]), int(self.q_len[block])
            mask[start : start + length] = self.token_rows(row, block)
        return mask

    def validate(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Check that these indices fit q [B, Sq, H, D] and k, v [B, Sk, Hkv, D].

        What the tensors hold is checked where they lie on the CPU only: a check on a GPU would make the host wait.

        Raises: ValueError.
        """
        for name, tensor in (("q", q), ("k", k), ("v", v)):
            if tensor.device != self.device:
                raise ValueError(
                    f"indices and {name} must be on one device, got indices={self.device}, {name}={tensor.device}; "
                    "call indices.to(q.device) first"
                )
        if q.shape[0] * q.shape[2] != self.heads:
            raise ValueError(
                f"head_of must have batch * heads entries, got head_of={self.heads}, "
                f"batch={q.shape[0]}, heads={q.shape[2]}"
            )
        if self.device.type == "cpu":
            _check_tiling("query", self.q_start, self.q_len, q.shape[1])
            _check_tiling("key", self.kv_start, self.kv_len, k.shape[1])
            if int(self.head_of.min()) < 0 or int(self.head_of.max()) >= self.rows:
                raise ValueError(
                    f"head_of must name rows 0..{self.rows - 1} of bits, "
                    f"got {int(self.head_of.min())}..{int(self.head_of.max())}"
                )


def pack_bits(mask: Tensor) -> Tensor:
    """Pack bool [..., K] into int32 [..., ceil(K/32)], lowest bit first; unused high bits are 0."""
    count = mask.shape[-1]
    words = -(-count // WORD_BITS)
    padded = torch.nn.functional.pad(mask.to(torch.int32), (0, words * WORD_BITS - count))
    shifts = torch.arange(WORD_BITS, dtype=torch.int32, device=mask.device)
    return (padded.unflatten(-1, (words, WORD_BITS)) << shifts).sum(-1, dtype=torch.int32)


def unpack_bits(words: Tensor, count: int) -> Tensor:
    """Unpack int32 [..., ceil(count/32)] into bool [..., count]."""
    shifts = torch.arange(WORD_BITS, dtype=torch.int32, device=words.device)
    return ((words.unsqueeze(-1) >> shifts) & 1).flatten(-2)[..., :count].bool()


def segment_blocks(lengths_tokens: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Cut each segment into blocks of 128 tokens; no block straddles two segments, the last of each may be short.

    Returns start int32 [blocks], length int32 [blocks] on the CPU. Segments of 0 tokens give no block.

    Raises: ValueError for a negative length.
    """
    starts: list[int] = []
    lengths: list[int] = []
    offset = 0
    for tokens in lengths_tokens:
        if tokens < 0:
            raise ValueError(f"segment lengths must be >= 0, got {list(lengths_tokens)}")
        for begin in range(0, tokens, BLOCK):
            starts.append(offset + begin)
            lengths.append(min(BLOCK, tokens - begin))
        offset += tokens
    return torch.tensor(starts, dtype=torch.int32), torch.tensor(lengths, dtype=torch.int32)


def token_owner(start: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
    """Name the block of every token and its place in that block, from start, length int32 [blocks].

    Returns block int64 [S], offset int64 [S].
    """
    lane = torch.arange(BLOCK, device=start.device)
    block, offset = (lane[None] < length[:, None]).nonzero(as_tuple=True)
    order = torch.argsort(start.long()[block] + offset)
    return block[order], offset[order]


def from_block_mask(
    mask: Tensor,  # bool [U, Q, K]
    head_of: Tensor,  # int [B*H]
    q_start: Tensor,
    q_len: Tensor,
    kv_start: Tensor,
    kv_len: Tensor,
) -> BlockIndices:
    """Build indices in which every visited block is seen whole."""
    head_of, q_start, q_len, kv_start, kv_len = (
        tensor.to(mask.device, torch.int32) for tensor in (head_of, q_start, q_len, kv_start, kv_len)
    )
    return BlockIndices(pack_bits(mask), head_of, q_start, q_len, kv_start, kv_len)


def from_token_mask(
    mask: Tensor,  # bool [U, Sq, Sk] in kernel order
    head_of: Tensor,  # int [B*H]
    q_start: Tensor,
    q_len: Tensor,
    kv_start: Tensor,
    kv_len: Tensor,
) -> BlockIndices:
    """Build indices from a whole token mask: tests and small grids only, since it reads Sq * Sk booleans.

    Equal bit tiles are stored once; lanes beyond a short block are 0 in its tile.
    """
    q_block, q_lane = token_owner(q_start, q_len)
    k_block, k_lane = token_owner(kv_start, kv_len)
    rows, query_blocks, key_blocks = mask.shape[0], q_start.shape[0], kv_start.shape[0]
    tiles = torch.zeros((rows, query_blocks, key_blocks, BLOCK, BLOCK), dtype=torch.bool, device=mask.device)
    tiles[:, q_block[:, None], k_block[None], q_lane[:, None], k_lane[None]] = mask
    seen = tiles.flatten(3).sum(-1)
    whole = (q_len.long()[:, None] * kv_len.long()[None]).to(mask.device)
    partial = (seen > 0) & (seen < whole)
    indices = from_block_mask(seen > 0, head_of, q_start, q_len, kv_start, kv_len)
    if not bool(partial.any()):
        return indices
    masks, inverse = torch.unique(pack_bits(tiles[partial]), dim=0, return_inverse=True)
    mask_id = torch.zeros(partial.shape, dtype=torch.int16, device=mask.device)
    mask_id[partial] = inverse.to(torch.int16)
    return BlockIndices(
        indices.bits, indices.head_of, indices.q_start, indices.q_len, indices.kv_start, indices.kv_len,
        pack_bits(partial), mask_id, masks,
    )  # fmt: skip


def random_indices(
    batch: int,
    heads: int,
    q_segments: Sequence[int],
    kv_segments: Sequence[int],
    *,
    density: float = 0.4,
    partial: float = 0.0,
    unique: int | None = None,
    empty_row: bool = False,
    shuffle: bool = False,
    distinct_masks: int = 3,
    seed: int = 0,
) -> BlockIndices:
    """Draw indices on the CPU for tests and benchmarks: block (u, i, j) is kept with probability density.

    partial is the share of kept blocks that get a random bit tile, unique the number of head rows (default B*H),
    empty_row leaves query block 0 of every row without a key block, shuffle numbers the blocks in random order.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = batch * heads if unique is None else unique
    q_start, q_len = segment_blocks(q_segments)
    kv_start, kv_len = segment_blocks(kv_segments)
    if shuffle:
        q_order = torch.randperm(len(q_start), generator=generator)
        k_order = torch.randperm(len(kv_start), generator=generator)
        q_start, q_len, kv_start, kv_len = q_start[q_order], q_len[q_order], kv_start[k_order], kv_len[k_order]
    shape = (rows, len(q_start), len(kv_start))
    kept = torch.rand(shape, generator=generator) < density
    kept[:, :, 0] |= ~kept.any(-1)
    if empty_row:
        kept[:, 0] = False
    head_of = torch.arange(batch * heads) % rows
    indices = from_block_mask(kept, head_of, q_start, q_len, kv_start, kv_len)
    if partial == 0.0:
        return indices
    chosen = kept & (torch.rand(shape, generator=generator) < partial)
    mask_id = torch.randint(0, distinct_masks, shape, generator=generator).to(torch.int16)
    masks = pack_bits(torch.rand((distinct_masks, BLOCK, BLOCK), generator=generator) < 0.5)
    return BlockIndices(
        indices.bits, indices.head_of, q_start, q_len, kv_start, kv_len, pack_bits(chosen), mask_id, masks
    )


def _check_shapes(indices: BlockIndices) -> None:
    """Raise ValueError or TypeError where shapes, dtypes or devices of the tensors disagree."""
    for field in fields(indices):
        tensor = getattr(indices, field.name)
        if tensor is None:
            continue
        expected = torch.int16 if field.name == "mask_id" else torch.int32
        if tensor.dtype != expected:
            raise TypeError(f"{field.name} must be {expected}, got {tensor.dtype}")
        if tensor.device != indices.bits.device:
            raise ValueError(
                f"all tensors of BlockIndices must be on one device, "
                f"got bits={indices.bits.device}, {field.name}={tensor.device}"
            )
    query_blocks, key_blocks = indices.q_start.shape[0], indices.kv_start.shape[0]
    if key_blocks > MAX_KEY_BLOCKS:
        raise ValueError(f"at most {MAX_KEY_BLOCKS} key blocks are supported, got {key_blocks}")
    rows = indices.bits.shape[0]
    words = -(-key_blocks // WORD_BITS)
    shapes: dict[str, tuple[int, ...]] = {
        "bits": (rows, query_blocks, words),
        "head_of": (indices.head_of.numel(),),
        "q_start": (query_blocks,),
        "q_len": (query_blocks,),
        "kv_start": (key_blocks,),
        "kv_len": (key_blocks,),
    }
    optional = (indices.partial_bits, indices.mask_id, indices.masks)
    given = [tensor is not None for tensor in optional]
    if any(given) and not all(given):
        raise ValueError(f"partial_bits, mask_id and masks must be given together or not at all, got {given}")
    if indices.masks is not None:
        shapes["partial_bits"] = (rows, query_blocks, words)
        shapes["mask_id"] = (rows, query_blocks, key_blocks)
        shapes["masks"] = (indices.masks.shape[0], BLOCK, TILE_WORDS)
    for name, shape in shapes.items():
        if tuple(getattr(indices, name).shape) != shape:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(getattr(indices, name).shape)}")


def _check_tiling(what: str, start: Tensor, length: Tensor, tokens: int) -> None:
    """Raise ValueError unless the blocks cover tokens 0..tokens-1, each once, with 1 to 128 tokens a block."""
    if start.numel() == 0:
        raise ValueError(f"{what} blocks must cover {tokens} tokens, got no block")
    if int(length.min()) < 1 or int(length.max()) > BLOCK:
        raise ValueError(f"{what} blocks must hold 1 to {BLOCK} tokens, got {int(length.min())} to {int(length.max())}")
    order = torch.argsort(start)
    ends = start[order] + length[order]
    expected = torch.cat((ends.new_zeros(1), ends[:-1]))
    if int(ends[-1]) != tokens or not bool((start[order] == expected).all()):
        raise ValueError(
            f"{what} blocks must cover every token once, got blocks ending at {int(ends[-1])}, tokens={tokens}"
        )
