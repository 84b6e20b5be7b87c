"""One tile of keys in the attention kernel in Triton: products and streaming softmax, in base 2.

The running maximum of the streaming softmax moves only in the first tile. The other tiles subtract the value from
there: any reference gives the same softmax as long as nothing overflows, and bfloat16 weights span as many powers of
two as float32. If something did overflow, the result of the query block shows it, and a second launch computes the
block again with a running maximum in every tile (`CAREFUL`). float16 weights span only 40 powers of two. There the
reference also comes from the keys that are likely to have the largest logits. A row whose weights add up to so little
that rounding errors would matter is computed again too.

On compute capability 9.0 a query block is computed in two halves (`HALVES`): while the tensor cores multiply the
weights of one half with the values, the exponentials of the other half are computed. J. Shah et al. (FlashAttention-3,
arXiv 2407.08608, section 3.1) do this with two warp groups; here one warp group serves both halves.
"""

from __future__ import annotations

import triton
import triton.language as tl

# 3 * 2^22 as float32: an integer below 2^22 added to its bits is added to its value.
_MAGIC_BITS, _MAGIC = tl.constexpr(0x4B400000), tl.constexpr(12582912.0)


@triton.jit
def tile_logits(q, k, INT8: tl.constexpr):
    """q [M, D] times the transpose of k [N, D]: float32 [M, N], not yet scaled."""
    if INT8:
        return tl.dot(q, tl.trans(k)).to(tl.float32)
    else:
        return tl.dot(q, tl.trans(k), input_precision="ieee")


@triton.jit
def _raw_logits(q, k, INT8: tl.constexpr):
    """`tile_logits` for a full tile; with INT8 too large by _MAGIC.

    Sums that start at the magic number are floats when they are done; converting them would take as long as a quarter
    of the exponentials. The reference absorbs the excess.
    """
    if INT8:
        start = tl.full([q.shape[0], k.shape[0]], _MAGIC_BITS, tl.int32)
        return tl.dot(q, tl.trans(k), start, out_dtype=tl.int32).to(tl.float32, bitcast=True)
    else:
        return tile_logits(q, k, False)


@triton.jit
def careful_tile(q, k, v, scale, bias, half, PEAK: tl.constexpr, INT8: tl.constexpr):
    """One tile of the streaming softmax in base 2; `bias` is -inf for lanes without a row.

    half: what has been summed for the rows of q so far. The reference [M], which is subtracted from the logits so that
    the largest weight is 2^PEAK; the sum of the weights [M]; and the sum of the weighted values [M, D].
    """
    top, total, acc = half
    logits = tile_logits(q, k, INT8) * scale + bias[None, :]
    new_top = tl.maximum(top, tl.max(logits, 1) - PEAK)
    # A row that has seen nothing yet has top = -inf; using 0 instead avoids -inf - -inf.
    base = tl.where(new_top == float("-inf"), 0.0, new_top)
    weights = tl.exp2(logits - base[:, None])
    decay = tl.exp2(top - base)
    total = total * decay + tl.sum(weights, 1)
    acc = tl.dot(weights.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")
    return new_top, total, acc


@triton.jit
def edge_tile(q, k, v, scale, tokens, half, INT8: tl.constexpr):
    """One tile with a fixed reference; its rows stand for `tokens` tokens each, 0 if there is no row."""
    top, total, acc = half
    weights = tl.exp2(tile_logits(q, k, INT8) * scale - top[:, None]) * tokens[None, :].to(tl.float32)
    total += tl.sum(weights, 1)
    acc = tl.dot(weights.to(v.dtype), v, acc, input_precision="ieee")
    return top, total, acc


@triton.jit
def fast_tile(q, k, v, scale, shifts, a, b, INT8: tl.constexpr, WAIT: tl.constexpr, HALVES: tl.constexpr):
    """One full tile with fixed references: the weights are 2^(logit - shift). q, shifts: those of both halves."""
    q_a, q_b = q
    shift_a, shift_b = shifts
    top_a, total_a, acc_a = a
    top_b, total_b, acc_b = b
    reference_a, reference_b = shift_a[:, None], shift_b[:, None]
    if INT8:
        reference_a += _MAGIC * scale
        reference_b += _MAGIC * scale
    logits_a = _raw_logits(q_a, k, INT8)
    if HALVES:
        logits_b = _raw_logits(q_b, k, INT8)
    weights = tl.exp2(logits_a * scale - reference_a)
    total_a += tl.sum(weights, 1)
    acc_a = tl.dot(weights.to(v.dtype), v, acc_a, input_precision="ieee")
    if HALVES:
        weights = tl.exp2(logits_b * scale - reference_b)
        total_b += tl.sum(weights, 1)
        acc_b = tl.dot(weights.to(v.dtype), v, acc_b, input_precision="ieee")
    # Products must finish within the iteration: if one is still running when the next iteration starts, the loops
    # spill. In other versions of this kernel ptxas then ran all products in sequence (its notes C7514 and C7515).
    if WAIT and HALVES:
        wait: tl.constexpr = "wgmma.wait_group.sync.aligned 0;"
        total_b = tl.inline_asm_elementwise(wait, "=f,0", [total_b], dtype=tl.float32, is_pure=False, pack=1)
    elif WAIT:
        # This adds no instruction: it is enough that the result is used.
        acc_a = tl.inline_asm_elementwise("", "=f,0", [acc_a], dtype=tl.float32, is_pure=True, pack=1)
    return (top_a, total_a, acc_a), (top_b, total_b, acc_b)


@triton.jit
def is_right(half, least, LEAST: tl.constexpr):
    """1 if all sums of a row's weights and weighted values are finite and no sum of weights is below `least`, otherwise
    0: [1].

    Not a scalar: on compute capability 10.0 Triton 3.6 fails to compile a scalar that is made of an accumulator.
    """
    _, total, acc = half
    summed = total < float("inf")
    if LEAST > 0:
        summed &= total >= least
    right = (tl.abs(acc) < float("inf")) & summed[:, None]
    return tl.min(tl.min(right.to(tl.int32), 1)[:, None], 0)
