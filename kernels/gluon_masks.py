"""Parts of the Hopper kernel that hide keys: list entries, bit tiles and the words that logits are hidden by."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def entry_mask(
    place, full, count, batch, lists, places, masks,
    PARTIAL: gl.constexpr, RAGGED: gl.constexpr, BLOCK: gl.constexpr,
):  # fmt: skip
    """Read the bit tile, -1 for none, and the number of visible keys of the list entry at place.

    full, count: how many of the entries from place on are full, and how many there are; past them no key is visible.
    """
    tiles_ptr, _, _, _, _, _, kv_len_ptr, kv_lengths_ptr = masks
    tile = count * 0 - 1
    left = gl.where(count > 0, BLOCK, 0)
    if PARTIAL:
        partial = (full <= 0) & (count > 0)
        if tiles_ptr is not None:
            tile = gl.load(tiles_ptr + place, mask=partial, other=-1).to(gl.int32)
        if RAGGED:
            block = gl.load(lists[1] + place, mask=partial, other=0).to(gl.int32)
            shown = gl.load(kv_len_ptr + block)
            if kv_lengths_ptr is not None:
                shown = gl.minimum(shown, gl.load(kv_lengths_ptr + batch) - gl.load(places[1] + block))
            left = gl.where(partial, shown, left)
    return tile, left


@gluon.jit
def tile_words(tile, left, row, masks, PARTIAL: gl.constexpr):
    """Read which keys every query row sees, as four words of 32; tile -1: all of the first `left`."""
    tiles_ptr, masks_ptr, _, _, _, _, _, _ = masks
    every = row * 0 - 1
    w0 = every & _first_bits(left)
    w1 = every & _first_bits(left - 32)
    w2 = every & _first_bits(left - 64)
    w3 = every & _first_bits(left - 96)
    if PARTIAL and tiles_ptr is not None:
        pointer = masks_ptr + gl.maximum(tile, 0) * 512 + row * 4
        tiled = row * 0 + tile >= 0
        w0 &= gl.load(pointer, mask=tiled, other=-1)
        w1 &= gl.load(pointer + 1, mask=tiled, other=-1)
        w2 &= gl.load(pointer + 2, mask=tiled, other=-1)
        w3 &= gl.load(pointer + 3, mask=tiled, other=-1)
    return w0, w1, w2, w3


@gluon.jit
def unvisited_words(bits_row, first, words):
    """Read which of 128 key blocks a query block does not visit, as four words of 32."""
    w0 = ~gl.load(bits_row + first, mask=first < words, other=-1)
    w1 = ~gl.load(bits_row + first + 1, mask=first + 1 < words, other=-1)
    w2 = ~gl.load(bits_row + first + 2, mask=first + 2 < words, other=-1)
    w3 = ~gl.load(bits_row + first + 3, mask=first + 3 < words, other=-1)
    return w0, w1, w2, w3


@gluon.jit
def hidden(logits, seen):
    """Set logits [rows, 128] to -inf where the bit of the key is 0; seen: four words, of every row or of all rows."""
    w0, w1, w2, w3 = seen
    if w0.type.is_block():
        w0 = gl.expand_dims(w0, 1)
        w1 = gl.expand_dims(w1, 1)
        w2 = gl.expand_dims(w2, 1)
        w3 = gl.expand_dims(w3, 1)
    column = gl.expand_dims(gl.arange(0, 128, layout=gl.SliceLayout(0, logits.type.layout)), 0)
    word = gl.where(column < 64, gl.where(column < 32, w0, w1), gl.where(column < 96, w2, w3))
    # The columns of a thread differ from its neighbour's in bits 1 and 2 alone: one shift a word, then constants. The
    # test and the choice are one piece of assembly: apart, the compiler moves all tests ahead of the product and packs
    # their results, at twice the instructions.
    return gl.inline_asm_elementwise(
        """{
        .reg .pred seen;
        .reg .b32 bit;
        and.b32 bit, $2, $3;
        setp.ne.b32 seen, bit, 0;
        selp.f32 $0, $1, 0fFF800000, seen;
        }""",
        "=f,f,r,r", [logits, word >> (column & 6), 1 << (column & 25)], dtype=gl.float32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def _first_bits(number):
    """Set the lowest bits of a word: none for a number <= 0, all from 32 on."""
    inside = gl.minimum(gl.maximum(number, 0), 32)
    return gl.where(inside == 32, -1, (1 << (inside & 31)) - 1)
