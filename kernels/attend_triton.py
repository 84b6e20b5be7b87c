"""Attention over a pyramid in Triton: the kernel beside `attend.attend_reference`, whose result it reproduces.

One program serves one query block of one head. For every level it walks the list of the blocks that the row sees at
that level and gathers as many of them as fill a tile, so that a block of 8 pooled rows does not starve the tensor
cores (arXiv 2512.04025, section 3.5). Importing this module needs triton; `backends.py` says whether that is so.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .levels import group_by_level
from .pyramid import Pyramid

_LOG2_E = 1.4426950408889634


@triton.jit
def _accumulate(q, k, v, scale, bias, top, total, acc, PRECISION: tl.constexpr):
    """One tile of the streaming softmax in base 2: `scale` holds log2(e), `bias` is -inf for lanes without a row."""
    logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale + bias[None, :]
    new_top = tl.maximum(top, tl.max(logits, 1))
    # A row that has seen nothing yet has top = -inf; 0 in its place keeps -inf - -inf out.
    base = tl.where(new_top == float("-inf"), 0.0, new_top)
    weights = tl.exp2(logits - base[:, None])
    decay = tl.exp2(top - base)
    total = total * decay + tl.sum(weights, 1)
    acc = acc * decay[:, None] + tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
    return new_top, total, acc


@triton.jit
def _attend_level(
    q, k_ptr, v_ptr, stride_k, stride_v, list_ptr, start, end, length_k, scale, top, total, acc, lanes, dims,
    FACTOR: tl.constexpr, BLOCK_KV: tl.constexpr, TILE: tl.constexpr, HEAD_DIM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The rows of one level: entries start..end of the row's list, as many blocks to a tile as fill it."""
    ROWS: tl.constexpr = BLOCK_KV // FACTOR
    for first in range(start * ROWS, end * ROWS, TILE):
        entry = (first + lanes) // ROWS
        seen = entry < end
        key_block = tl.load(list_ptr + entry, mask=seen, other=0)
        row = key_block.to(tl.int64) * ROWS + (first + lanes) % ROWS
        tokens = tl.minimum(tl.maximum(length_k - row * FACTOR, 0), FACTOR)
        exists = seen & (tokens > 0)
        mask = exists[:, None] & (dims < HEAD_DIM)[None, :]
        k = tl.load(k_ptr + row[:, None] * stride_k + dims[None, :], mask=mask, other=0.0)
        v = tl.load(v_ptr + row[:, None] * stride_v + dims[None, :], mask=mask, other=0.0)
        bias = tl.where(exists, tl.log2(tl.maximum(tokens, 1).to(tl.float32)), float("-inf"))
        top, total, acc = _accumulate(q, k, v, scale, bias, top, total, acc, PRECISION)
    return top, total, acc


@triton.jit
def _attend(
    q_ptr, k_ptr, v_ptr, coarse_k_ptr, coarse_v_ptr, extra_k_ptr, extra_v_ptr, blocks_ptr, ends_ptr, out_ptr,
    stride_qb, stride_qh, stride_ql, stride_kb, stride_kh, stride_kl,
    stride_vb, stride_vh, stride_vl, stride_cb, stride_ch, stride_cl, stride_eb, stride_eh, stride_el,
    stride_ob, stride_oh, stride_ol,
    heads, length_q, length_k, extra, n_q, n_k, scale,
    FACTORS: tl.constexpr, LEVELS: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr,
    TILE: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr, HAS_EXTRA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    head_index = tl.program_id(1).to(tl.int64)
    b, h = head_index // heads, head_index % heads
    row = head_index * n_q + block
    queries = block * BLOCK_Q + tl.arange(0, BLOCK_Q)
    dims = tl.arange(0, DIM)
    lanes = tl.arange(0, TILE)
    dim_exists = dims < HEAD_DIM

    q_base = q_ptr + b * stride_qb + h * stride_qh
    q_mask = (queries < length_q)[:, None] & dim_exists[None, :]
    q = tl.load(q_base + queries[:, None].to(tl.int64) * stride_ql + dims[None, :], mask=q_mask, other=0.0)

    top = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    acc = tl.zeros([BLOCK_Q, DIM], tl.float32)

    list_ptr = blocks_ptr + row * n_k
    start = 0
    coarse = b * stride_cb + h * stride_ch  # first row of the level in the storage of the coarse levels
    for level in tl.static_range(LEVELS):
        end = tl.load(ends_ptr + row * LEVELS + level)
        if FACTORS[level] == 1:
            top, total, acc = _attend_level(
                q, k_ptr + b * stride_kb + h * stride_kh, v_ptr + b * stride_vb + h * stride_vh, stride_kl, stride_vl,
                list_ptr, start, end, length_k, scale, top, total, acc, lanes, dims,
                FACTORS[level], BLOCK_KV, TILE, HEAD_DIM, PRECISION,
            )  # fmt: skip
        else:
            top, total, acc = _attend_level(
                q, coarse_k_ptr + coarse, coarse_v_ptr + coarse, stride_cl, stride_cl,
                list_ptr, start, end, length_k, scale, top, total, acc, lanes, dims,
                FACTORS[level], BLOCK_KV, TILE, HEAD_DIM, PRECISION,
            )  # fmt: skip
            coarse += n_k * (BLOCK_KV // FACTORS[level]) * stride_cl
        start = end

    if HAS_EXTRA:
        extra_base = b * stride_eb + h * stride_eh
        for first in range(0, extra, TILE):
            exists = first + lanes < extra
            address = extra_base + (first + lanes)[:, None].to(tl.int64) * stride_el + dims[None, :]
            mask = exists[:, None] & dim_exists[None, :]
            k = tl.load(extra_k_ptr + address, mask=mask, other=0.0)
            v = tl.load(extra_v_ptr + address, mask=mask, other=0.0)
            bias = tl.where(exists, 0.0, float("-inf"))
            top, total, acc = _accumulate(q, k, v, scale, bias, top, total, acc, PRECISION)

    acc = acc / tl.where(total > 0, total, 1.0)[:, None]
    out_base = out_ptr + b * stride_ob + h * stride_oh
    tl.store(
        out_base + queries[:, None].to(tl.int64) * stride_ol + dims[None, :],
        acc.to(out_ptr.dtype.element_ty),
        mask=q_mask,
    )


def attend_triton(
    q: torch.Tensor,
    pyramid: Pyramid,
    factors: torch.Tensor,
    block_q: int,
    scale: float,
    extra_k: torch.Tensor | None = None,
    extra_v: torch.Tensor | None = None,
) -> torch.Tensor:
    """As `attend.attend_reference`, on the device of q. Inputs float16, bfloat16 or float32; sums in float32."""
    batch, heads, length_q, dim = q.shape
    n_q, n_k = factors.shape[-2:]
    blocks, ends = group_by_level(factors, tuple(pyramid.keys))
    out = torch.empty((batch, heads, length_q, dim), dtype=q.dtype, device=q.device)
    q = _unit_stride(q)
    coarse = [factor for factor in pyramid.keys if factor > 1]
    # A level that is not there is never read; any tensor may stand in its place.
    keys, values = (_unit_stride(level.get(1, q)) for level in (pyramid.keys, pyramid.values))
    # The coarse levels share one storage, in which the coarsest begin where the finest of them end.
    coarse_keys, coarse_values = (level[coarse[0]] if coarse else q for level in (pyramid.keys, pyramid.values))
    has_extra = extra_k is not None and extra_k.shape[2] > 0
    extra_k = extra_k.contiguous() if has_extra else q
    extra_v = extra_v.contiguous() if has_extra else q
    _attend[(n_q, batch * heads)](
        q, keys, values, coarse_keys, coarse_values, extra_k, extra_v, blocks, ends, out,
        *q.stride()[:3], *keys.stride()[:3], *values.stride()[:3], *coarse_keys.stride()[:3],
        *extra_k.stride()[:3], *out.stride()[:3],
        heads, length_q, pyramid.length, extra_k.shape[2], n_q, n_k, scale * _LOG2_E,
        FACTORS=tuple(pyramid.keys), LEVELS=len(pyramid.keys), BLOCK_Q=block_q, BLOCK_KV=pyramid.block_kv,
        TILE=64 if q.element_size() == 2 else 32, HEAD_DIM=dim, DIM=max(16, triton.next_power_of_2(dim)),
        HAS_EXTRA=has_extra, PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
        num_warps=4 if block_q <= 64 or q.element_size() == 2 else 8, num_stages=2 if q.element_size() == 2 else 1,
    )  # fmt: skip
    return out


def _unit_stride(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()
