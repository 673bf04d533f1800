"""Parts of the Hopper kernel that turn logits into weights: exponentials, sums and operands in half precision."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma_wait

from dit_sparse.kernels.gluon_masks import hidden


@gluon.jit
def first_weights(logits, seen, scale_log2, HIDE: gl.constexpr, ONLINE: gl.constexpr):
    """Turn the first logits of a row into weights; returns them and the shift, in powers of two.

    A shift that is kept may be any finite number; one near the largest logit is best, and a hidden one does not matter.
    """
    if not ONLINE:
        top = gl.max(logits, axis=1) * scale_log2
        if HIDE:  # hidden keys may hold anything
            top = gl.where(gl.abs(top) < float("inf"), top, 0.0)
    if HIDE:
        logits = hidden(logits, seen)
    if ONLINE:
        top = gl.max(logits, axis=1) * scale_log2
    return gl.exp2(logits * scale_log2 - gl.expand_dims(_finite(top), 1)), top


@gluon.jit
def _finite(top):
    """Replace the -inf of a row that has seen no key yet: -inf - -inf would be NaN."""
    return gl.where(top == float("-inf"), 0.0, top)


@gluon.jit
def weigh(logits, scale_log2, p, acc, top, sums, ONLINE: gl.constexpr):
    """Turn logits into the next operand, while the product of p with its values comes in."""
    if ONLINE:
        new_top = gl.maximum(top, gl.max(logits, axis=1) * scale_log2)
        shift = _finite(new_top)
        rescale = gl.exp2(top - shift)
        SUMS: gl.constexpr = gl.SliceLayout(1, sums.type.layout)
        sums = sums * gl.expand_dims(gl.convert_layout(rescale, SUMS), 1)
        top = new_top
    else:
        shift = top
    weights = gl.exp2(logits * scale_log2 - gl.expand_dims(shift, 1))
    sums += quad_sums(weights)
    OPERAND: gl.constexpr = p.type.layout
    following = operand(weights, p.dtype, OPERAND)
    acc = finished(p, acc)
    if ONLINE:
        acc = acc * gl.expand_dims(gl.convert_layout(rescale, gl.SliceLayout(1, acc.type.layout)), 1)
    return following, acc, top, sums


@gluon.jit
def finished(p, acc):
    """Wait for all products; until then the registers of p stay as they are, which the compiler has to be told."""
    acc = warpgroup_mma_wait(0, deps=(acc,))
    gl.inline_asm_elementwise("", "=r,0", [p], dtype=p.dtype, is_pure=False, pack=2)
    return acc


@gluon.jit
def quad_sums(weights):
    """Sum what each of the four lanes of a row holds: [rows, 4], without an exchange between lanes."""
    parts = gl.reshape(weights, [weights.shape[0], weights.shape[1] // 8, 4, 2])
    return gl.sum(gl.sum(parts, axis=3), axis=1)


@gluon.jit
def row_sums(sums, LAYOUT: gl.constexpr):
    """Add up the four lanes of every row: [rows] in LAYOUT."""
    return gl.convert_layout(gl.sum(sums, axis=1), LAYOUT)


@gluon.jit
def operand(weights, DTYPE: gl.constexpr, LAYOUT: gl.constexpr):
    """Round weights to half precision, as the left operand of a product."""
    return gl.convert_layout(half(weights, DTYPE), LAYOUT)


@gluon.jit
def half(x, DTYPE: gl.constexpr):
    """Round fp32 to half precision, two neighbours to a register."""
    if DTYPE == gl.bfloat16:
        rounded = gl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [x], dtype=gl.bfloat16, is_pure=True, pack=2
        )
    else:
        rounded = gl.inline_asm_elementwise(
            "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,r,r", [x], dtype=gl.float16, is_pure=True, pack=2
        )
    return rounded


@gluon.jit
def natural_lse(top, sums):
    """Give the natural-log LSE of a softmax in powers of two, -inf where nothing was added."""
    empty = sums == 0.0
    return gl.where(empty, float("-inf"), (top + gl.log2(gl.where(empty, 1.0, sums))) * 0.6931471805599453)
