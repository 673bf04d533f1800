"""Gluon kernel of the Hopper backend: warp-specialised block-sparse attention forward, one program per multiprocessor.

One warp group fetches tiles with the copy engine, two consume them, 64 query rows each. A consumer keeps two products
in flight, the logits of the next block and the output of this one, while it computes the next weights. The first logits
of the next query block start before the last output of this one is done, so that no row of blocks pays for filling or
draining the pipeline.

Weights are 2^(logit - shift) with a shift that a row keeps: the largest logit of its first block. A maximum, its
exchange between lanes and the rescaling of the output fall away from the loop. bfloat16 has the exponents of float32,
so this is as exact as a running maximum while the sum of a row stays within 2^60 of 1; a program notes its items with a
row outside, and in the end computes them again with a running maximum. float16 takes that one from the start.

Paper: FlashDecoding++ (arXiv 2311.01282), section 3: one shift for all and recomputation where it does not do
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from dit_sparse.kernels.gluon_consume import consume
from dit_sparse.kernels.gluon_produce import produce

# One build serves all sizes: what the gate has checked is what runs.
SIZES = (
    "q_rows_b", "q_rows_h", "q_columns_h", "k_rows_b", "k_rows_h", "k_columns_h", "v_rows_b", "v_rows_h", "v_columns_h",
    "total", "query_blocks", "q_tokens", "heads", "group", "list_width", "words", "mean_tiles", "scale_log2",
)  # fmt: skip


@gluon.jit(do_not_specialize=SIZES)
def forward(
    q_desc,  # [rows, columns] of q, tiles [BLOCK, D]; see hopper.Plane for how heads lie in it
    k_desc,
    v_desc,
    mean_k_desc,  # the means of key blocks, or k_desc where there are none
    mean_v_desc,
    out_desc,  # rows of out [B, Sq, H, D], contiguous, tiles [BLOCK / 2, D]
    out_ptr,
    lse_ptr,  # fp32 [B, Sq, H], contiguous
    computed_lse_ptr,  # the same
    blocks_ptr,  # int16 [R, Q, list_width]
    tiles_ptr,  # int16 [R, Q, list_width], or None
    masks_ptr,  # int32 [M, 128, 4], or None
    head_of_ptr,  # int32 [B*H]: row of U
    items_ptr,  # int32 [B*H*Q, 4]: see lists.BlockLists
    noted_ptr,  # int32 [programs, 2, items of a program]: by consumer, 1 where the shift did not suit the item
    bits_ptr,  # int32 [U, Q, ceil(K/32)]
    log_counts_ptr,  # fp32 [B, mean_tiles * BLOCK]: natural, -inf past the last block; or None
    q_start_ptr,
    q_len_ptr,
    kv_start_ptr,
    kv_len_ptr,
    kv_lengths_ptr,  # int32 [B], or None
    q_rows_b, q_rows_h, q_columns_h,  # rows and columns of q_desc from one batch entry, or head, to the next
    k_rows_b, k_rows_h, k_columns_h,
    v_rows_b, v_rows_h, v_columns_h,
    total,  # B*H * Q
    query_blocks,
    q_tokens,
    heads,
    group,  # query heads per key head
    list_width,
    words,  # of one row of bits
    mean_tiles,
    scale_log2,  # scale * log2(e): the softmax runs in powers of two
    D: gl.constexpr,
    BLOCK: gl.constexpr,
    PARTIAL: gl.constexpr,  # some list may hold partial blocks
    RAGGED: gl.constexpr,  # some of them may show fewer than BLOCK keys
    COMPENSATE: gl.constexpr,  # the means of key blocks that are not visited stand for them
    ONLINE: gl.constexpr,  # with a running maximum
    STAGES: gl.constexpr,
    TURNS: gl.constexpr,  # the consumers start their products in turn
    CONSUMER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """Compute every query block of every head: program p takes items p, p + programs, and so on."""
    q_tiles = gl.allocate_shared_memory(q_desc.dtype, [2, BLOCK, D], q_desc.layout)
    k_tiles = gl.allocate_shared_memory(k_desc.dtype, [STAGES, BLOCK, D], k_desc.layout)
    v_tiles = gl.allocate_shared_memory(v_desc.dtype, [STAGES, BLOCK, D], v_desc.layout)
    q_full = _barriers(2, 1)
    q_empty = _barriers(2, 2)
    k_full = _barriers(STAGES, 1)
    k_empty = _barriers(STAGES, 2)
    v_full = _barriers(STAGES, 1)
    v_empty = _barriers(STAGES, 2)
    # A barrier that nobody uses would share its place with a tile, and a context switch writes barriers back.
    turn = q_full
    if TURNS:
        turn = _barriers(2, 1)
    done = q_full
    if not ONLINE:
        done = _barriers(1, 2)
    out_tiles = gl.allocate_shared_memory(out_desc.dtype, [2, BLOCK // 2, D], out_desc.layout)
    if TURNS:
        mbarrier.arrive(turn.index(0), count=1)
    rings = (q_tiles, k_tiles, v_tiles, q_full, q_empty, k_full, k_empty, v_full, v_empty, turn, done)
    lists = (items_ptr, blocks_ptr, noted_ptr)
    sizes = (total, query_blocks, heads, group, list_width, mean_tiles)
    places = (q_start_ptr, kv_start_ptr)
    q_steps = (q_rows_b, q_rows_h, q_columns_h)
    k_steps = (k_rows_b, k_rows_h, k_columns_h)
    v_steps = (v_rows_b, v_rows_h, v_columns_h)
    masks = (tiles_ptr, masks_ptr, head_of_ptr, bits_ptr, log_counts_ptr, q_len_ptr, kv_len_ptr, kv_lengths_ptr)
    results = (out_desc, out_tiles, out_ptr, lse_ptr, computed_lse_ptr)
    numbers = (q_tokens, words, scale_log2)
    descs = (q_desc, k_desc, v_desc, mean_k_desc, mean_v_desc)
    gl.warp_specialize(
        [
            (
                produce,
                (
                    descs, rings, lists, sizes, places, q_steps, k_steps, v_steps,
                    COMPENSATE, ONLINE, STAGES, BLOCK,
                ),
            ),
            (
                consume,
                (
                    rings, lists, sizes, places, masks, results, numbers,
                    0, D, BLOCK, PARTIAL, RAGGED, COMPENSATE, ONLINE, STAGES, TURNS,
                ),
            ),
            (
                consume,
                (
                    rings, lists, sizes, places, masks, results, numbers,
                    1, D, BLOCK, PARTIAL, RAGGED, COMPENSATE, ONLINE, STAGES, TURNS,
                ),
            ),
        ],
        [4, 4],
        [CONSUMER_REGISTERS, CONSUMER_REGISTERS],
    )  # fmt: skip


@gluon.jit
def _barriers(number: gl.constexpr, arrivals: gl.constexpr):
    """Make barriers that so many arrivals complete."""
    barriers = gl.allocate_shared_memory(gl.int64, [number, 1], mbarrier.MBarrierLayout())
    for index in gl.static_range(number):
        mbarrier.init(barriers.index(index), count=arrivals)
    return barriers
