"""Attention over a pyramid in Triton: the kernel beside `attend.attend_reference`, whose result it reproduces.

One program serves one query block of one head. For every level it walks the list of the blocks that the row sees at
that level and gathers as many of them as fill a tile, so that a block of 8 pooled rows does not starve the tensor
cores (arXiv 2512.04025, section 3.5). Importing this module needs triton; `backends.py` says whether that is so.

The streaming softmax is that of `attend_tile_triton.py`: a launch with fixed references computes everything, a second
one, `CAREFUL`, the query blocks in which something overflowed.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .attend_tile_triton import careful_tile, edge_tile, fast_tile, tile_logits
from .autotune import Case, choose_tile
from .int8_triton import quantise_queries_triton
from .levels import BlockLists
from .order import TokenOrder
from .order_triton import load_rows
from .pyramid import Pyramid
from .tiles import AttendTile

_LOG2_E = 1.4426950408889634
# The power of two that the largest weight gets when the reference is set. float16 weights end at 2^16, lose digits
# below 2^-14 and are 0 below 2^-25. With a fixed reference 13 powers are left for keys above those that set it; with a
# running maximum none are needed.
_PEAK_FLOAT16, _PEAK_FLOAT16_CAREFUL = 3, 15
# The least that the weights of a row must add up to, per key row: float16 loses at most 2^-25 of each, so that at most
# 2^-11 of the sum is lost, as much as rounding the output costs. A row of less is computed again.
_LEAST_FLOAT16 = 2.0**-14


@triton.jit
def _offsets(row, stride, dims, FACTOR: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Places of rows [N] in a head: pooled ones lie close together, so that 32 bits hold them and spare registers."""
    if FACTOR == 1:
        return row[:, None].to(tl.int64) * stride + dims[None, :]
    else:
        return row[:, None] * HEAD_DIM + dims[None, :]


@triton.jit
def _attend_level(
    q_a, q_b, k_desc, v_desc, k_ptr, v_ptr, stride_k, stride_v, b, h, list_ptr, scale_ptr, start, end, length_k, scale,
    top_a, total_a, acc_a, top_b, total_b, acc_b,
    FACTOR: tl.constexpr, BLOCK_KV: tl.constexpr, TILE: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr,
    BULK: tl.constexpr, INT8: tl.constexpr, CAREFUL: tl.constexpr, PEAK: tl.constexpr, STAGES: tl.constexpr,
    WAIT: tl.constexpr, HALVES: tl.constexpr, SETS_TOP: tl.constexpr,
):  # fmt: skip
    """The rows of one level: entries start..end of the row's list, as many blocks to a tile as fill it.

    Blocks are listed in ascending order, so that only the last one can be short: the tiles that hold it, at least one,
    go the careful way and come first; all others are full.
    """
    ROWS: tl.constexpr = BLOCK_KV // FACTOR
    lanes = tl.arange(0, TILE)
    dims = tl.arange(0, DIM)
    rows = (end - start) * ROWS
    full = 0
    if not CAREFUL:
        full = tl.maximum(rows - ROWS, 0) // TILE * TILE

    for first in tl.range(full, rows, TILE, num_stages=1):
        position = first + lanes
        seen = position < rows
        block = tl.load(list_ptr + start + position // ROWS, mask=seen, other=0)
        row = block * ROWS + position % ROWS
        tokens = tl.minimum(tl.maximum(length_k - row * FACTOR, 0), FACTOR)
        tokens = tl.where(seen, tokens, 0)
        mask = (tokens > 0)[:, None] & (dims < HEAD_DIM)[None, :]
        k = tl.load(k_ptr + _offsets(row, stride_k, dims, FACTOR, HEAD_DIM), mask=mask, other=0)
        v = tl.load(v_ptr + _offsets(row, stride_v, dims, FACTOR, HEAD_DIM), mask=mask, other=0)
        tile_scale = scale
        if INT8:
            tile_scale = scale * tl.load(scale_ptr + block, mask=seen, other=0)[None, :]
        if SETS_TOP:
            bias = tl.where(tokens > 0, 0.0, float("-inf"))
            if FACTOR > 1:
                bias += tl.log2(tl.maximum(tokens, 1).to(tl.float32))
            top_a, total_a, acc_a = careful_tile(
                q_a, k, v, tile_scale, bias, top_a, total_a, acc_a, PEAK, INT8
            )  # fmt: skip
            if HALVES:
                top_b, total_b, acc_b = careful_tile(
                    q_b, k, v, tile_scale, bias, top_b, total_b, acc_b, PEAK, INT8
                )  # fmt: skip
        else:
            total_a, acc_a = edge_tile(q_a, k, v, tile_scale, tokens, top_a, total_a, acc_a, INT8)
            if HALVES:
                total_b, acc_b = edge_tile(q_b, k, v, tile_scale, tokens, top_b, total_b, acc_b, INT8)

    if not CAREFUL:
        # Every row of a full block stands for FACTOR tokens: the bias becomes part of the reference.
        shift_a = tl.where(top_a == float("-inf"), 0.0, top_a) - tl.log2(FACTOR * 1.0)
        shift_b = shift_a
        if HALVES:
            shift_b = tl.where(top_b == float("-inf"), 0.0, top_b) - tl.log2(FACTOR * 1.0)
        for first in tl.range(0, full, TILE, num_stages=STAGES):
            tile_scale = scale
            if BULK:
                block = tl.load(list_ptr + start + first // ROWS)
                k = k_desc.load([b, h, block * ROWS + first % ROWS, 0]).reshape(TILE, DIM)
                v = v_desc.load([b, h, block * ROWS + first % ROWS, 0]).reshape(TILE, DIM)
                if INT8:
                    tile_scale = scale * tl.load(scale_ptr + block)
            else:
                position = first + lanes
                block = tl.load(list_ptr + start + position // ROWS)
                row = block * ROWS + position % ROWS
                k_address = k_ptr + _offsets(row, stride_k, dims, FACTOR, HEAD_DIM)
                v_address = v_ptr + _offsets(row, stride_v, dims, FACTOR, HEAD_DIM)
                if DIM == HEAD_DIM:
                    k = tl.load(k_address)
                    v = tl.load(v_address)
                else:
                    mask = (dims < HEAD_DIM)[None, :]
                    k = tl.load(k_address, mask=mask, other=0)
                    v = tl.load(v_address, mask=mask, other=0)
                if INT8 and ROWS >= TILE:
                    tile_scale = scale * tl.load(scale_ptr + tl.load(list_ptr + start + first // ROWS))
                elif INT8:
                    tile_scale = scale * tl.load(scale_ptr + block)[None, :]
            if HALVES:
                total_a, acc_a, total_b, acc_b = fast_tile(
                    q_a, q_b, k, v, tile_scale, shift_a, shift_b, total_a, acc_a, total_b, acc_b, INT8, WAIT, True
                )  # fmt: skip
            else:
                total_a, acc_a, _, _ = fast_tile(
                    q_a, q_a, k, v, tile_scale, shift_a, shift_a, total_a, acc_a, total_a, acc_a, INT8, WAIT, False
                )  # fmt: skip
    return top_a, total_a, acc_a, top_b, total_b, acc_b


@triton.jit
def _store_output(
    acc, total, base_ptr, to_ptr, first, length_q, stride, write, HEAD_DIM: tl.constexpr, ORDERED: tl.constexpr
):
    """Write acc / total [ROWS, DIM] to the places of the queries first..first + ROWS of a head."""
    position = first + tl.arange(0, acc.shape[0])
    dims = tl.arange(0, acc.shape[1])
    exists = position < length_q
    place = position.to(tl.int64)
    if ORDERED:
        place = tl.load(to_ptr + position, mask=exists, other=0)
    rows = acc / tl.where(total > 0, total, 1.0)[:, None]
    mask = (exists & write)[:, None] & (dims < HEAD_DIM)[None, :]
    tl.store(base_ptr + place[:, None] * stride + dims[None, :], rows.to(base_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _is_right(acc, total, least, LEAST: tl.constexpr):
    """1 where all of acc [ROWS, DIM] is finite and total [ROWS] finite and no less than `least`, else 0: a scalar."""
    summed = total < float("inf")
    if LEAST > 0:
        summed &= total >= least
    right = (tl.abs(acc) < float("inf")) & summed[:, None]
    return tl.min(tl.min(right.to(tl.int32), 1), 0)


@triton.jit
def _first_total(q, INT8: tl.constexpr):
    """The sum that a softmax row begins with: NaN where eight bits cannot say that the query is not finite."""
    total = tl.zeros([q.shape[0]], tl.float32)
    if INT8:
        finite = tl.abs(q.to(tl.float32)) < float("inf")
        total = tl.where(tl.min(finite.to(tl.int32), 1) > 0, total, float("nan"))
    return total


@triton.jit(do_not_specialize=["heads", "length_q", "length_k", "length_order", "extra", "n_q", "n_k"])
def _attend(
    q_ptr, q8_ptr, q_scales_ptr, k_desc, v_desc, k_ptr, v_ptr, coarse_k_ptr, coarse_v_ptr, extra_k_ptr, extra_v_ptr,
    scales_ptr, blocks_ptr, best_ptr, ends_ptr, rows_ptr, overflow_ptr, out_ptr, from_ptr, to_ptr,
    stride_qb, stride_qh, stride_ql, stride_kb, stride_kh, stride_kl, stride_vb, stride_vh, stride_vl,
    stride_cb, stride_ch, stride_cl, stride_eb, stride_eh, stride_el, stride_ob, stride_oh, stride_ol,
    heads, length_q, length_k, length_order, extra, n_q, n_k, scale,
    FACTORS: tl.constexpr, LEVELS: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr, TILE: tl.constexpr,
    HEAD_DIM: tl.constexpr, DIM: tl.constexpr, ORDERED: tl.constexpr, SORTED: tl.constexpr, BULK: tl.constexpr,
    INT8: tl.constexpr, HAS_EXTRA: tl.constexpr, CAREFUL: tl.constexpr, PEAK: tl.constexpr, LEAST: tl.constexpr,
    STAGES: tl.constexpr, WAIT: tl.constexpr, HALVES: tl.constexpr,
):  # fmt: skip
    """Query block `program_id(0)` of head `program_id(1)`; its rows are a, or the first half of them a and the rest b.

    q8: int8 queries [B, H, Lq, D] in block order with a scale for each block, used at level 1 alone.
    from_ptr, to_ptr: the index of the queries' order, twice: the places that queries are read from, were they known to
    be those that the output goes to, would be kept through the loops, whose own values then do not fit the registers.
    length_order: entries of the index before those of the next head; 0 where all share one.
    """
    head_index = tl.program_id(1)
    block = tl.program_id(0)
    if SORTED:
        block = tl.load(rows_ptr + head_index * n_q + block)
    row = head_index.to(tl.int64) * n_q + block
    if CAREFUL and tl.load(overflow_ptr + row) == 0:
        return
    b, h = head_index // heads, head_index % heads
    ROWS: tl.constexpr = BLOCK_Q // 2 if HALVES else BLOCK_Q
    first_a = block * BLOCK_Q
    first_b = first_a + ROWS
    dims = tl.arange(0, DIM)
    lanes = tl.arange(0, TILE)
    q_base = q_ptr + b.to(tl.int64) * stride_qb + h.to(tl.int64) * stride_qh
    from_ptr += head_index * length_order
    q_a = load_rows(q_base, from_ptr, first_a, length_q, stride_ql, ROWS, HEAD_DIM, DIM, ORDERED)
    top_a = tl.full([ROWS], float("-inf"), tl.float32)
    total_a = _first_total(q_a, INT8)
    acc_a = tl.zeros([ROWS, DIM], tl.float32)
    q_b, top_b, total_b, acc_b = q_a, top_a, total_a, acc_a
    if HALVES:
        q_b = load_rows(q_base, from_ptr, first_b, length_q, stride_ql, ROWS, HEAD_DIM, DIM, ORDERED)
        total_b = _first_total(q_b, INT8)
    fine_a, fine_b, fine_scale = q_a, q_b, scale
    if INT8:
        base = q8_ptr + head_index.to(tl.int64) * length_q * HEAD_DIM
        fine_a = load_rows(base, from_ptr, first_a, length_q, HEAD_DIM, ROWS, HEAD_DIM, DIM, False)
        if HALVES:
            fine_b = load_rows(base, from_ptr, first_b, length_q, HEAD_DIM, ROWS, HEAD_DIM, DIM, False)
        fine_scale = scale * tl.load(q_scales_ptr + row)

    if PEAK > 0 and not CAREFUL and FACTORS[0] == 1:
        # float16 has no room for a reference far below the maximum, which is likely to lie at the query's own place or
        # in its most important block.
        own: tl.constexpr = BLOCK_Q // TILE
        best = tl.load(best_ptr + row) * BLOCK_KV
        for tile in tl.range(0, own + tl.cdiv(BLOCK_KV, TILE), num_stages=STAGES):
            keys = tl.where(tile < own, first_a + tile * TILE, best + (tile - own) * TILE) + lanes
            there = keys < length_k
            address = k_ptr + b.to(tl.int64) * stride_kb + h.to(tl.int64) * stride_kh
            address += _offsets(keys, stride_kl, dims, 1, HEAD_DIM)
            k = tl.load(address, mask=there[:, None] & (dims < HEAD_DIM)[None, :], other=0)
            tile_scale = fine_scale
            if INT8:
                scale_ptr = scales_ptr + head_index.to(tl.int64) * n_k + keys // BLOCK_KV
                tile_scale = fine_scale * tl.load(scale_ptr, mask=there, other=0)[None, :]
            bias = tl.where(there, 0.0, float("-inf"))[None, :]
            top_a = tl.maximum(top_a, tl.max(tile_logits(fine_a, k, INT8) * tile_scale + bias, 1) - PEAK)
            if HALVES:
                top_b = tl.maximum(top_b, tl.max(tile_logits(fine_b, k, INT8) * tile_scale + bias, 1) - PEAK)

    if HAS_EXTRA:
        extra_base = b.to(tl.int64) * stride_eb + h.to(tl.int64) * stride_eh
        for first in tl.range(0, extra, TILE, num_stages=1):
            there = first + lanes < extra
            address = extra_base + (first + lanes)[:, None].to(tl.int64) * stride_el + dims[None, :]
            mask = there[:, None] & (dims < HEAD_DIM)[None, :]
            k = tl.load(extra_k_ptr + address, mask=mask, other=0)
            v = tl.load(extra_v_ptr + address, mask=mask, other=0)
            bias = tl.where(there, 0.0, float("-inf"))
            top_a, total_a, acc_a = careful_tile(q_a, k, v, scale, bias, top_a, total_a, acc_a, PEAK, False)
            if HALVES:
                top_b, total_b, acc_b = careful_tile(q_b, k, v, scale, bias, top_b, total_b, acc_b, PEAK, False)

    # Addresses are made where they are needed: kept through the loops, they would push the loops' own values out of the
    # registers.
    start, coarse_row = 0, 0
    least = extra * LEAST if LEAST > 0 else 0.0
    for level in tl.static_range(LEVELS):
        end = tl.load(ends_ptr + row * LEVELS + level)
        list_ptr = blocks_ptr + row * n_k
        scale_ptr = scales_ptr + head_index.to(tl.int64) * n_k
        if FACTORS[level] == 1:
            top_a, total_a, acc_a, top_b, total_b, acc_b = _attend_level(
                fine_a, fine_b, k_desc, v_desc, k_ptr + b.to(tl.int64) * stride_kb + h.to(tl.int64) * stride_kh,
                v_ptr + b.to(tl.int64) * stride_vb + h.to(tl.int64) * stride_vh, stride_kl, stride_vl,
                b, h, list_ptr, scale_ptr, start, end, length_k, fine_scale,
                top_a, total_a, acc_a, top_b, total_b, acc_b,
                1, BLOCK_KV, TILE, HEAD_DIM, DIM, BULK, INT8, CAREFUL, PEAK, STAGES, WAIT, HALVES,
                CAREFUL or level == 0,
            )  # fmt: skip
        else:
            first = b.to(tl.int64) * stride_cb + h.to(tl.int64) * stride_ch
            first += coarse_row * n_k.to(tl.int64) * stride_cl
            top_a, total_a, acc_a, top_b, total_b, acc_b = _attend_level(
                q_a, q_b, None, None, coarse_k_ptr + first, coarse_v_ptr + first, stride_cl, stride_cl,
                b, h, list_ptr, scale_ptr, start, end, length_k, scale,
                top_a, total_a, acc_a, top_b, total_b, acc_b,
                FACTORS[level], BLOCK_KV, TILE, HEAD_DIM, DIM, False, False, CAREFUL, PEAK, STAGES, WAIT, HALVES,
                CAREFUL or level == 0,
            )  # fmt: skip
            coarse_row += BLOCK_KV // FACTORS[level]
        if LEAST > 0:
            least += (end - start) * (BLOCK_KV // FACTORS[level]) * LEAST
        start = end

    write = 1
    if not CAREFUL:
        # A block that must be computed again is not written: its output may take the place of its queries.
        write = _is_right(acc_a, total_a, least, LEAST)
        if HALVES:
            write = tl.minimum(write, _is_right(acc_b, total_b, least, LEAST))
        tl.store(overflow_ptr + row, 1 - write)
    out_base = out_ptr + b.to(tl.int64) * stride_ob + h.to(tl.int64) * stride_oh
    to_ptr += head_index * length_order
    _store_output(acc_a, total_a, out_base, to_ptr, first_a, length_q, stride_ol, write > 0, HEAD_DIM, ORDERED)
    if HALVES:
        _store_output(acc_b, total_b, out_base, to_ptr, first_b, length_q, stride_ol, write > 0, HEAD_DIM, ORDERED)


def attend_triton(
    q: torch.Tensor,
    pyramid: Pyramid,
    lists: BlockLists,
    block_q: int,
    scale: float,
    extra_k: torch.Tensor | None,
    extra_v: torch.Tensor | None,
    out: torch.Tensor,
    *,
    order: TokenOrder | None = None,
    uneven: bool = False,
    tile: AttendTile | None = None,
) -> None:
    """As `attend.attend_reference`, written to `out` [B, H, Lq, D], which may be q itself.

    q: [B, H, Lq, D], float16, bfloat16 or float32. Sums are float32. extra_k: without the mean key where the
    pyramid's keys are. order: that of the query blocks, where q and `out` themselves are in raster order (with heads of
    128 the kernel then lacks registers and loses more than `order_triton` takes). uneven: rows differ in cost; the
    longest of each head then start first. tile: by default that of the GPU.
    """
    batch, heads, length_q, dim = q.shape
    n_q, n_k = lists.blocks.shape[-2:]
    int8 = pyramid.scales is not None and 1 in pyramid.keys
    q = _unit_stride(q)
    order = order or TokenOrder(None, None)
    q8, q_scales = quantise_queries_triton(q, block_q, order) if int8 else (q, q)
    rows = lists.density.argsort(-1, descending=True).to(torch.int32) if uneven else None
    overflow = torch.empty(batch, heads, n_q, dtype=torch.int32, device=q.device)
    padded = max(32 if int8 else 16, triton.next_power_of_2(dim))
    tile = tile or choose_tile(q.device, Case(padded, block_q, pyramid.block_kv, q.dtype, int8))
    coarse = [factor for factor in pyramid.keys if factor > 1]
    # A tensor that is not there is never touched; any may stand in its place.
    keys, values = (_unit_stride(level.get(1, q)) for level in (pyramid.keys, pyramid.values))
    # The coarse levels share one storage, in which the coarsest begin where the finest of them end.
    coarse_keys, coarse_values = (level[coarse[0] if coarse else 1] for level in (pyramid.keys, pyramid.values))
    has_extra = extra_k is not None and extra_k.shape[2] > 0
    extra_k, extra_v = (x.contiguous() if has_extra else q for x in (extra_k, extra_v))
    scales = pyramid.scales if int8 else q
    index = q if order.index is None else order.index.contiguous()
    length_order = length_q if index is not q and index.ndim > 1 else 0
    half = q.dtype == torch.float16
    best = lists.blocks[..., 0].contiguous() if lists.best is None and half else lists.best
    best = lists.ends if best is None else best
    peaks, least = (_PEAK_FLOAT16, _PEAK_FLOAT16_CAREFUL) if half else (0, 0), _LEAST_FLOAT16 if half else 0.0
    for careful in (False, True):
        bulk = tile.bulk and not careful and pyramid.block_kv >= tile.rows and 1 in pyramid.keys
        descriptors = [_descriptor(x, tile.rows, padded) if bulk else None for x in (keys, values)]
        bulk = bulk and None not in descriptors
        _attend[(n_q, batch * heads)](
            q, q8, q_scales, *(descriptors if bulk else (None, None)),
            keys, values, coarse_keys, coarse_values, extra_k, extra_v, scales, lists.blocks, best, lists.ends,
            lists.ends if rows is None else rows, overflow, out, index, index,
            *q.stride()[:3], *keys.stride()[:3], *values.stride()[:3], *coarse_keys.stride()[:3],
            *extra_k.stride()[:3], *out.stride()[:3],
            heads, length_q, pyramid.length, length_order, extra_k.shape[2], n_q, n_k, scale * _LOG2_E,
            FACTORS=lists.levels, LEVELS=len(lists.levels), BLOCK_Q=block_q, BLOCK_KV=pyramid.block_kv,
            TILE=tile.rows, HEAD_DIM=dim, DIM=padded, ORDERED=index is not q, SORTED=uneven, BULK=bulk,
            INT8=int8, HAS_EXTRA=has_extra, CAREFUL=careful,
            PEAK=peaks[careful], LEAST=least, STAGES=tile.stages,
            WAIT=tile.wait, HALVES=tile.halves and block_q >= 128,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip


def _descriptor(x: torch.Tensor, rows: int, columns: int) -> object | None:
    """A descriptor for bulk copies of `rows` rows of x [B, H, L, D]; None where x is not aligned as they ask."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    if x.data_ptr() % 16 or any(stride * x.element_size() % 16 for stride in x.stride()[:3]):
        return None
    return TensorDescriptor.from_tensor(x, [1, 1, rows, columns])


def _unit_stride(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()
