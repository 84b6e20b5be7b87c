"""Attention over a pyramid in Triton: the kernel for `attend.attend_reference`, whose result it reproduces.

One program serves one query block of one head. For every level it walks the list of blocks that the row sees at that
level and gathers enough of them to fill a tile, so that a block of 8 pooled rows does not starve the tensor cores
(arXiv 2512.04025, section 3.5). Importing this module needs triton; `backends.py` checks whether it is there.

The streaming softmax is in `attend_tile.py`. A first launch with fixed references computes everything; a second one,
`CAREFUL`, repeats the query blocks in which something overflowed.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..delta import Delta
from ..levels import BlockLists
from ..order import TokenOrder
from ..pyramid import Pyramid
from .attend_tile import careful_tile, edge_tile, fast_tile, is_right, tile_logits
from .delta import lost_rows, passed
from .int8 import quantise_queries_triton
from .order import load_rows
from .tiles import AttendTile, attend_tile, gpu_of, padded_dim

_LOG2_E = 1.4426950408889634
# The power of two that the largest weight gets when the reference is set. float16 weights end at 2^16, lose digits
# below 2^-14 and are 0 below 2^-25. A fixed reference leaves 13 powers for keys above the ones that set it; a running
# maximum needs none.
_PEAK, _PEAK_CAREFUL = tl.constexpr(3), tl.constexpr(15)
# The least that the weights of a row must add up to, per key row: float16 loses at most 2^-25 of each, so at most 2^-11
# of the sum is lost, as much as rounding the output costs. A row with less is computed again.
_LEAST = tl.constexpr(2.0**-14)


@triton.jit
def _offsets(row, stride, dims, FACTOR: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Offsets of rows [N] in a head: pooled rows lie close together, so 32 bits are enough and save registers."""
    if FACTOR == 1:
        return row[:, None].to(tl.int64) * stride + dims[None, :]
    else:
        return row[:, None] * HEAD_DIM + dims[None, :]


@triton.jit
def _attend_level(
    q, k_desc, v_desc, pointers, strides, place, blocks_ptr, scales_ptr, start, end, length_k, scale, a, b,
    FACTOR: tl.constexpr, BLOCK_KV: tl.constexpr, TILE: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr,
    CAREFUL: tl.constexpr, PEAK: tl.constexpr, STAGES: tl.constexpr, WAIT: tl.constexpr, HALVES: tl.constexpr,
    SETS_TOP: tl.constexpr,
):  # fmt: skip
    """The rows of one level: entries start..end of the row's list, with enough blocks per tile to fill it.

    q: queries of both halves [ROWS, DIM]; pointers, strides: of the head's keys and values at the level; place: batch
    entry and head; a, b: what both halves have summed so far, as in `careful_tile`.

    Blocks are listed in ascending order, so only the last one can be short. The tiles that hold it (at least one) come
    first and go through `careful_tile`; all others are full.
    """
    k_ptr, v_ptr = pointers
    stride_k, stride_v = strides
    INT8: tl.constexpr = scales_ptr is not None
    ROWS: tl.constexpr = BLOCK_KV // FACTOR
    lanes = tl.arange(0, TILE)
    dims = tl.arange(0, DIM)
    rows = (end - start) * ROWS
    full = 0
    if not CAREFUL:
        full = tl.maximum(rows - ROWS, 0) // TILE * TILE

    for first in tl.range(full, rows, TILE, num_stages=1):
        position = first + lanes  # [TILE], of the rows that the list names
        seen = position < rows
        block = tl.load(blocks_ptr + start + position // ROWS, mask=seen, other=0).to(tl.int32)
        row = block * ROWS + position % ROWS
        tokens = tl.minimum(tl.maximum(length_k - row * FACTOR, 0), FACTOR)
        tokens = tl.where(seen, tokens, 0)
        mask = (tokens > 0)[:, None] & (dims < HEAD_DIM)[None, :]
        k = tl.load(k_ptr + _offsets(row, stride_k, dims, FACTOR, HEAD_DIM), mask=mask, other=0)  # [TILE, DIM]
        v = tl.load(v_ptr + _offsets(row, stride_v, dims, FACTOR, HEAD_DIM), mask=mask, other=0)  # [TILE, DIM]
        tile_scale = scale
        if INT8:
            tile_scale = scale * tl.load(scales_ptr + block, mask=seen, other=0)[None, :]
        if SETS_TOP:
            bias = tl.where(tokens > 0, 0.0, float("-inf"))
            if FACTOR > 1:
                bias += tl.log2(tl.maximum(tokens, 1).to(tl.float32))
            a = careful_tile(q[0], k, v, tile_scale, bias, a, PEAK, INT8)
            if HALVES:
                b = careful_tile(q[1], k, v, tile_scale, bias, b, PEAK, INT8)
        else:
            a = edge_tile(q[0], k, v, tile_scale, tokens, a, INT8)
            if HALVES:
                b = edge_tile(q[1], k, v, tile_scale, tokens, b, INT8)

    if not CAREFUL:
        # Every row of a full block stands for FACTOR tokens: the bias becomes part of the reference.
        shift_a = tl.where(a[0] == float("-inf"), 0.0, a[0]) - tl.log2(FACTOR * 1.0)
        shift_b = shift_a
        if HALVES:
            shift_b = tl.where(b[0] == float("-inf"), 0.0, b[0]) - tl.log2(FACTOR * 1.0)
        for first in tl.range(0, full, TILE, num_stages=STAGES):
            tile_scale = scale
            if k_desc is not None:
                block = tl.load(blocks_ptr + start + first // ROWS).to(tl.int32)
                k = k_desc.load([place[0], place[1], block * ROWS + first % ROWS, 0]).reshape(TILE, DIM)
                v = v_desc.load([place[0], place[1], block * ROWS + first % ROWS, 0]).reshape(TILE, DIM)
                if INT8:
                    tile_scale = scale * tl.load(scales_ptr + block)
            else:
                position = first + lanes
                block = tl.load(blocks_ptr + start + position // ROWS).to(tl.int32)
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
                    tile_scale = scale * tl.load(scales_ptr + tl.load(blocks_ptr + start + first // ROWS))
                elif INT8:
                    tile_scale = scale * tl.load(scales_ptr + block)[None, :]
            a, b = fast_tile(q, k, v, tile_scale, (shift_a, shift_b), a, b, INT8, WAIT, HALVES)
    return a, b


@triton.jit
def _store_output(half, base_ptr, to_ptr, delta, head, first, length_q, stride, write, HEAD_DIM: tl.constexpr):
    """Write weighted values / weights [ROWS, DIM] to the rows of queries first..first + ROWS of a head.

    to_ptr: the head's index of output rows, None if queries are in order. delta: added to the rows, None for nothing.
    write: [1], whether to write at all.
    """
    _, total, acc = half
    position = first + tl.arange(0, acc.shape[0])
    dims = tl.arange(0, acc.shape[1])
    exists = position < length_q
    place = position.to(tl.int64)
    if to_ptr is not None:
        place = tl.load(to_ptr + position, mask=exists, other=0)
    rows = acc / tl.where(total > 0, total, 1.0)[:, None]
    if delta is not None:
        rows += lost_rows(delta, head, position, exists, dims, length_q, HEAD_DIM)
    mask = exists[:, None] & write[:, None] & (dims < HEAD_DIM)[None, :]
    tl.store(base_ptr + place[:, None] * stride + dims[None, :], rows.to(base_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _first_total(q, q8):
    """The sum that a softmax row starts with: NaN if the query is not finite, which eight bits cannot express."""
    total = tl.zeros([q.shape[0]], tl.float32)
    if q8 is not None:
        finite = tl.abs(q.to(tl.float32)) < float("inf")
        total = tl.where(tl.min(finite.to(tl.int32), 1) > 0, total, float("nan"))
    return total


@triton.jit
def _head_of(pointer, strides, b, h):
    """Where head h of batch entry b starts."""
    return pointer + b.to(tl.int64) * strides[0] + h.to(tl.int64) * strides[1]


@triton.jit(do_not_specialize=["heads", "length_q", "length_k", "length_order", "length_extra", "n_listed"])
def _attend(
    k_desc, v_desc, q_ptr, q8, fine, coarse, extra, lists, again_ptr, out_ptr, order, delta,
    stride_q, stride_k, stride_v, stride_coarse, stride_extra, stride_out,
    heads, length_q, length_k, length_order, length_extra, n_listed, scale,
    FACTORS: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr, TILE: tl.constexpr, HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr, CAREFUL: tl.constexpr, STAGES: tl.constexpr, WAIT: tl.constexpr, HALVES: tl.constexpr,
):  # fmt: skip
    """Query block `program_id(0)` of head `program_id(1)`; a is all of its rows, or the first half, and b the rest.

    Strides are those of batch entry, head and token; a missing tensor is None.

    q_ptr: queries [B, H, Lq, D]. q8: the queries in int8, in block order, with one scale per block, for level 1 only.
    fine: keys and values [B, H, Lk, D] at level 1, and one scale per block of int8 keys; k_desc, v_desc: for bulk
    copies of them. coarse: keys and values of all other levels. extra: those outside the blocks [B, H, E, D].
    lists: `BlockLists.blocks`, `best` and `ends`, and the rows of a head, the longest first.
    again_ptr: int32 [B, H, n_q], blocks that the careful launch computes again.
    order: the index of the queries' order, passed twice. If the compiler knew that queries are read from the same rows
    that the output goes to, it would keep them through the loops, whose own values would then not fit the registers.
    delta: values, as bytes, and scales of a `Delta`, and its group.
    length_order: entries of the index from one head to the next; 0 if all heads share one. n_listed: entries of a list.
    """
    n_q, n_k = tl.num_programs(0), tl.cdiv(length_k, BLOCK_KV)
    blocks_ptr, best_ptr, ends_ptr, rows_ptr = lists
    LEVELS: tl.constexpr = len(FACTORS)
    HALF: tl.constexpr = q_ptr.dtype.element_ty == tl.float16
    PEAK: tl.constexpr = (_PEAK_CAREFUL if CAREFUL else _PEAK) if HALF else 0
    LEAST: tl.constexpr = _LEAST if HALF and not CAREFUL else 0.0
    head_index = tl.program_id(1)
    block = tl.program_id(0)
    if rows_ptr is not None:
        block = tl.load(rows_ptr + head_index * n_q + block)
    row = head_index.to(tl.int64) * n_q + block
    if CAREFUL and tl.load(again_ptr + row) == 0:
        return
    b, h = head_index // heads, head_index % heads
    ROWS: tl.constexpr = BLOCK_Q // 2 if HALVES else BLOCK_Q
    first_a = block * BLOCK_Q
    first_b = first_a + ROWS
    dims = tl.arange(0, DIM)
    lanes = tl.arange(0, TILE)
    from_ptr, to_ptr = None, None
    if order is not None:
        from_ptr = order[0] + head_index * length_order
    q_base = _head_of(q_ptr, stride_q, b, h)
    q_a = load_rows(q_base, from_ptr, first_a, length_q, stride_q[2], ROWS, HEAD_DIM, DIM)  # [ROWS, DIM]
    half_a = tl.full([ROWS], float("-inf"), tl.float32), _first_total(q_a, q8), tl.zeros([ROWS, DIM], tl.float32)
    q_b, half_b = q_a, half_a
    if HALVES:
        q_b = load_rows(q_base, from_ptr, first_b, length_q, stride_q[2], ROWS, HEAD_DIM, DIM)
        half_b = half_a[0], _first_total(q_b, q8), half_a[2]
    fine_a, fine_b, fine_scale = q_a, q_b, scale
    if q8 is not None:
        base = q8[0] + head_index.to(tl.int64) * length_q * HEAD_DIM
        fine_a = load_rows(base, None, first_a, length_q, HEAD_DIM, ROWS, HEAD_DIM, DIM)
        if HALVES:
            fine_b = load_rows(base, None, first_b, length_q, HEAD_DIM, ROWS, HEAD_DIM, DIM)
        fine_scale = scale * tl.load(q8[1] + row)

    if HALF and not CAREFUL and FACTORS[0] == 1:
        # float16 has no room for a reference far below the maximum. The maximum is likely to be at the query's own
        # position or in its most important block.
        INT8: tl.constexpr = q8 is not None
        own: tl.constexpr = (BLOCK_Q + TILE - 1) // TILE
        best = tl.load(best_ptr + row).to(tl.int32) * BLOCK_KV
        top_a, top_b = half_a[0], half_b[0]
        for tile in tl.range(0, own + tl.cdiv(BLOCK_KV, TILE), num_stages=STAGES):
            keys = tl.where(tile < own, first_a + tile * TILE, best + (tile - own) * TILE) + lanes
            there = keys < length_k
            address = _head_of(fine[0], stride_k, b, h) + _offsets(keys, stride_k[2], dims, 1, HEAD_DIM)
            k = tl.load(address, mask=there[:, None] & (dims < HEAD_DIM)[None, :], other=0)  # [TILE, DIM]
            tile_scale = fine_scale
            if INT8:
                scale_ptr = fine[2] + head_index.to(tl.int64) * n_k + keys // BLOCK_KV
                tile_scale = fine_scale * tl.load(scale_ptr, mask=there, other=0)[None, :]
            bias = tl.where(there, 0.0, float("-inf"))[None, :]
            top_a = tl.maximum(top_a, tl.max(tile_logits(fine_a, k, INT8) * tile_scale + bias, 1) - PEAK)
            if HALVES:
                top_b = tl.maximum(top_b, tl.max(tile_logits(fine_b, k, INT8) * tile_scale + bias, 1) - PEAK)
        half_a = top_a, half_a[1], half_a[2]
        half_b = top_b, half_b[1], half_b[2]

    if extra is not None:
        for first in tl.range(0, length_extra, TILE, num_stages=1):
            there = first + lanes < length_extra
            offsets = (first + lanes)[:, None].to(tl.int64) * stride_extra[2] + dims[None, :]
            mask = there[:, None] & (dims < HEAD_DIM)[None, :]
            k = tl.load(_head_of(extra[0], stride_extra, b, h) + offsets, mask=mask, other=0)  # [TILE, DIM]
            v = tl.load(_head_of(extra[1], stride_extra, b, h) + offsets, mask=mask, other=0)  # [TILE, DIM]
            bias = tl.where(there, 0.0, float("-inf"))
            half_a = careful_tile(q_a, k, v, scale, bias, half_a, PEAK, False)
            if HALVES:
                half_b = careful_tile(q_b, k, v, scale, bias, half_b, PEAK, False)

    # Addresses are made where they are needed: kept through the loops, they would push the loops' own values out of the
    # registers.
    start, coarse_row = 0, 0
    least = 0.0
    if LEAST > 0 and extra is not None:
        least += length_extra * LEAST
    for level in tl.static_range(LEVELS):
        end = tl.load(ends_ptr + row * LEVELS + level)
        list_ptr = blocks_ptr + row * n_listed
        if FACTORS[level] == 1:
            scales_ptr = None
            if q8 is not None:
                scales_ptr = fine[2] + head_index.to(tl.int64) * n_k
            half_a, half_b = _attend_level(
                (fine_a, fine_b), k_desc, v_desc,
                (_head_of(fine[0], stride_k, b, h), _head_of(fine[1], stride_v, b, h)), (stride_k[2], stride_v[2]),
                (b, h), list_ptr, scales_ptr, start, end, length_k, fine_scale, half_a, half_b,
                1, BLOCK_KV, TILE, HEAD_DIM, DIM, CAREFUL, PEAK, STAGES, WAIT, HALVES, CAREFUL or level == 0,
            )  # fmt: skip
        else:
            offset = coarse_row * n_k.to(tl.int64) * stride_coarse[2]
            k_ptr, v_ptr = _head_of(coarse[0], stride_coarse, b, h), _head_of(coarse[1], stride_coarse, b, h)
            half_a, half_b = _attend_level(
                (q_a, q_b), None, None, (k_ptr + offset, v_ptr + offset), (stride_coarse[2], stride_coarse[2]),
                (b, h), list_ptr, None, start, end, length_k, scale, half_a, half_b,
                FACTORS[level], BLOCK_KV, TILE, HEAD_DIM, DIM, CAREFUL, PEAK, STAGES, WAIT, HALVES,
                CAREFUL or level == 0,
            )  # fmt: skip
            coarse_row += BLOCK_KV // FACTORS[level]
        if LEAST > 0:
            least += (end - start) * (BLOCK_KV // FACTORS[level]) * LEAST
        start = end

    write = tl.full([1], 1, tl.int32)
    if not CAREFUL:
        # A block that must be computed again is not written: its output could overwrite its queries.
        write = is_right(half_a, least, LEAST)
        if HALVES:
            write = tl.minimum(write, is_right(half_b, least, LEAST))
        tl.store(again_ptr + row + tl.arange(0, 1), 1 - write)
    if order is not None:
        to_ptr = order[1] + head_index * length_order
    out_base = _head_of(out_ptr, stride_out, b, h)
    _store_output(half_a, out_base, to_ptr, delta, head_index, first_a, length_q, stride_out[2], write > 0, HEAD_DIM)
    if HALVES:
        stride = stride_out[2]
        _store_output(half_b, out_base, to_ptr, delta, head_index, first_b, length_q, stride, write > 0, HEAD_DIM)


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
    delta: Delta | None = None,
    uneven: bool = False,
    tile: AttendTile | None = None,
) -> None:
    """As `attend.attend_reference`, written to `out` [B, H, Lq, D], which may be q itself.

    q: [B, H, Lq, D], float16, bfloat16 or float32. Sums are float32. extra_k: without the mean key if the pyramid's
    keys are without it. order: the order of the query blocks, if q and `out` themselves are in raster order (with heads
    of 128 the kernel then runs out of registers and loses more time than moving the queries first would take). delta:
    added to the output. uneven: rows differ in cost, so the longest rows of each head start first. tile: by default the
    built-in one.
    """
    batch, heads, length_q, dim = q.shape
    n_q, n_listed = lists.blocks.shape[-2:]
    q = _unit_stride(q)
    order = order or TokenOrder(None, None)
    q8 = quantise_queries_triton(q, block_q, order) if pyramid.int8 else None
    rows = lists.density.argsort(-1, descending=True).to(torch.int32) if uneven else None
    again = torch.empty(batch, heads, n_q, dtype=torch.int32, device=q.device)
    padded = padded_dim(dim, pyramid.int8)
    tile = tile or attend_tile(gpu_of(q.device), padded)
    keys, values = (_unit_stride(level[1]) if 1 in level else None for level in (pyramid.keys, pyramid.values))
    # The coarse levels share one storage, in which each level starts where the next finer one ends.
    first = next((factor for factor in pyramid.keys if factor > 1), None)
    coarse = None if first is None else (pyramid.keys[first], pyramid.values[first])
    extra = None
    if extra_k is not None and extra_k.shape[2]:
        assert extra_v is not None  # they come together
        extra = extra_k.contiguous(), extra_v.contiguous()
    index = None if order.index is None else order.index.contiguous()
    best = lists.best
    if best is None:  # the levels were given: any block of the finest level will do
        best = lists.blocks[..., 0].contiguous()
    descriptors: tuple[object | None, object | None] = (None, None)
    if tile.bulk and keys is not None and values is not None and pyramid.block_kv >= tile.rows:
        descriptors = _descriptors(keys, values, tile.rows, padded)
    given = (
        q, q8, None if keys is None else (keys, values, pyramid.scales), coarse, extra,
        (lists.blocks, best, lists.ends, rows), again, out, None if index is None else (index, index), passed(delta),
        _strides(q), _strides(keys), _strides(values), _strides(coarse and coarse[0]), _strides(extra and extra[0]),
        _strides(out),
        heads, length_q, pyramid.length, length_q if index is not None and index.ndim > 1 else 0,
        extra[0].shape[2] if extra else 0, n_listed, scale * _LOG2_E,
    )  # fmt: skip
    constants = {
        "FACTORS": lists.levels, "BLOCK_Q": block_q, "BLOCK_KV": pyramid.block_kv, "TILE": tile.rows, "HEAD_DIM": dim,
        "DIM": padded, "STAGES": tile.stages, "WAIT": tile.wait, "HALVES": tile.halves and block_q >= 128,
        "num_warps": tile.warps, "num_stages": tile.stages,
    }  # fmt: skip
    launch = _attend[n_q, batch * heads]
    launch(*descriptors, *given, CAREFUL=False, **constants)
    launch(None, None, *given, CAREFUL=True, **constants)


def _strides(x: torch.Tensor | None) -> tuple[int, ...] | None:
    """Of batch entry, head and token."""
    return None if x is None else x.stride()[:3]


def _descriptors(
    keys: torch.Tensor, values: torch.Tensor, rows: int, columns: int
) -> tuple[object, object] | tuple[None, None]:
    """Descriptors for bulk copies of `rows` rows of keys and values [B, H, L, D]; None if one of them is not aligned as
    they require."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    for x in (keys, values):
        if x.data_ptr() % 16 or any(stride * x.element_size() % 16 for stride in x.stride()[:3]):
            return None, None
    block = [1, 1, rows, columns]
    return TensorDescriptor.from_tensor(keys, block), TensorDescriptor.from_tensor(values, block)


def _unit_stride(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()
