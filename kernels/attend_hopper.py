"""Attention over a pyramid for compute capability 9.0, in Gluon: two warpgroups that take turns with the tensor cores.

The kernel beside `attend_triton.py` where GPU and Triton allow it; it walks the same lists and gives the same result.
Each warpgroup serves 64 of the 128 queries. Keys and values come through a ring of tiles in shared memory, filled by
bulk copies: whole blocks at level 1, eight rows at a time above. The first warpgroup asks for keys, the second for
values, some tiles ahead; while one takes its softmax the other has the tensor cores. As in `attend_triton.py` the
softmax reference is fixed, here by the first tile; a query block that overflows is left to the careful launch there.

The level that pools whole blocks (the tail) is not gathered: all its rows pass, those of blocks seen at a finer level
with weight zero. At one row a block that costs one part in block_kv of dense attention, and no list.
"""

from __future__ import annotations

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .int8 import quantise
from .levels import BlockLists
from .order import TokenOrder
from .pyramid import Pyramid

BLOCK_Q = 128
_LOG2_E = 1.4426950408889634
_EXTRA_BLOCK = 64
_TYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16, torch.int8: gl.int8}


@gluon.constexpr_function
def _log2(number):
    """Of a power of two."""
    return number.bit_length() - 1


@gluon.jit
def _copy_tile(
    desc, full, ring, stage, b, h, list_ptr, base, first, last, rows_log2,
    BOX: gl.constexpr, LISTED: gl.constexpr, COLUMNS: gl.constexpr, TILE: gl.constexpr, DIM: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """Copy the tile that begins at row `first` of a level to place `stage` of the ring.

    desc: copies BOX rows of COLUMNS. LISTED: the rows are those of the blocks in the list, 2^rows_log2 each; behind its
    entry `last` that block comes again, because even a weight of zero asks for values that are numbers.
    """
    HALVES: gl.constexpr = DIM // COLUMNS
    BOXES: gl.constexpr = TILE // BOX
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BOX, COLUMNS], ring.dtype)
    boxes = ring._reinterpret(ring.dtype, [STAGES * HALVES * BOXES, BOX, COLUMNS], layout)
    mbarrier.expect(full.index(stage), TILE * DIM * ring.dtype.primitive_bitwidth // 8)
    for box in range(BOXES):
        row = first + box * BOX
        if LISTED:
            block = gl.load(list_ptr + gl.minimum(row >> rows_log2, last))
            row = (block << rows_log2) + (row & ((1 << rows_log2) - 1))
        for half in gl.static_range(HALVES):
            tma.async_copy_global_to_shared(
                desc,
                [b, h, base + row, half * COLUMNS],
                full.index(stage),
                boxes.index((stage * HALVES + half) * BOXES + box),
            )


@gluon.jit
def _ask(
    number, fine, eight, tail, more, full, ring, b, h, list_ptr, ends, n_k, extra,
    FACTORS: gl.constexpr, LEVELS: gl.constexpr, TAIL: gl.constexpr, BLOCK_KV: gl.constexpr, BOX: gl.constexpr,
    COLUMNS: gl.constexpr, TILE: gl.constexpr, DIM: gl.constexpr, STAGES: gl.constexpr, HAS_EXTRA: gl.constexpr,
):  # fmt: skip
    """Copy the keys or the values of tile `number` to their place in the ring.

    Tiles are counted through the extra tokens and then through the levels in their order.
    """
    stage = number % STAGES
    if HAS_EXTRA:
        tiles = (extra + TILE - 1) // TILE
        if number >= 0 and number < tiles:
            _copy_tile(more, full, ring, stage, b, h, list_ptr, 0, number * TILE, 0, 0,
                       TILE, False, COLUMNS, TILE, DIM, STAGES)  # fmt: skip
        number -= tiles
    start = 0
    base = 0  # first row of the level in the storage of the coarse levels
    # Which of the pooled levels it is, is only a matter of numbers; they share one copy below.
    pooled_first = -1
    pooled_base = 0
    pooled_start = 0
    pooled_last = 0
    pooled_log2 = 0
    for level in gl.static_range(LEVELS):
        end = ends[level]
        if TAIL and level == LEVELS - 1:
            tiles = gl.where(end > start, (n_k + TILE - 1) // TILE, 0)
            if number >= 0 and number < tiles:
                _copy_tile(tail, full, ring, stage, b, h, list_ptr, base, number * TILE, 0, 0,
                           TILE, False, COLUMNS, TILE, DIM, STAGES)  # fmt: skip
        elif FACTORS[level] == 1:
            tiles = ((end - start) * BLOCK_KV + TILE - 1) // TILE
            if number >= 0 and number < tiles:
                _copy_tile(fine, full, ring, stage, b, h, list_ptr, 0, number * TILE, end - 1, _log2(BLOCK_KV),
                           BOX, True, COLUMNS, TILE, DIM, STAGES)  # fmt: skip
        else:
            tiles = ((end - start) * (BLOCK_KV // FACTORS[level]) + TILE - 1) // TILE
            here = (number >= 0) & (number < tiles)
            pooled_first = gl.where(here, number * TILE, pooled_first)
            pooled_base = gl.where(here, base, pooled_base)
            pooled_start = gl.where(here, start, pooled_start)
            pooled_last = gl.where(here, end - start - 1, pooled_last)
            pooled_log2 = gl.where(here, _log2(BLOCK_KV // FACTORS[level]), pooled_log2)
        number -= tiles
        if FACTORS[level] > 1:
            base += n_k * (BLOCK_KV // FACTORS[level])
        start = end
    if pooled_first >= 0:
        _copy_tile(eight, full, ring, stage, b, h, list_ptr + pooled_start, pooled_base, pooled_first, pooled_last,
                   pooled_log2, 8, True, COLUMNS, TILE, DIM, STAGES)  # fmt: skip


@gluon.jit
def _attend_level(
    q, acc, top, total, ring_k, ring_v, full_k, full_v, empty_k, empty_v, number, tiles_in_all,
    fine, eight, tail, more, b, h, list_ptr, ends, n_k, extra,
    entries_ptr, rest_ptr, scales_ptr, rows, last, last_token, length, scale,
    FACTOR: gl.constexpr, ROWS: gl.constexpr, LISTED: gl.constexpr, RESTRICTED: gl.constexpr, PART: gl.constexpr,
    FACTORS: gl.constexpr, LEVELS: gl.constexpr, TAIL: gl.constexpr, BLOCK_KV: gl.constexpr, BOX: gl.constexpr,
    COLUMNS: gl.constexpr, TILE: gl.constexpr, DIM: gl.constexpr, STAGES: gl.constexpr, HAS_EXTRA: gl.constexpr,
    INT8: gl.constexpr, HEADROOM: gl.constexpr,
):  # fmt: skip
    """All tiles of a level: `rows` rows of FACTOR tokens, ROWS to a block.

    The last block begins with token `last_token`; rows beyond `length` stand for nothing. RESTRICTED: only the rows
    that `rest_ptr` marks count. PART 0 asks for keys, PART 1 for values.
    """
    of_keys: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE, 32 if INT8 else 16])
    column = gl.arange(0, TILE, gl.SliceLayout(0, of_keys))
    for first in range(0, rows, TILE):
        stage = number % STAGES
        phase = number // STAGES & 1
        seen = first + column < rows
        if RESTRICTED:
            seen = gl.load(rest_ptr + first + column, mask=seen, other=0) > 0
        key_scale = scale
        if INT8:
            block = gl.minimum((first + column) // ROWS, last)
            if LISTED:
                block = gl.load(entries_ptr + block)
            key_scale = gl.load(scales_ptr + block)[None, :] * scale

        mbarrier.wait(full_k.index(stage), phase)
        empty = gl.zeros([64, TILE], gl.int32 if INT8 else gl.float32, of_keys)
        products = warpgroup_mma(q, ring_k.index(stage).permute((1, 0)), empty, use_acc=False, is_async=True)
        # Meanwhile ask for the tile that takes the place of one that both warpgroups have left behind.
        if PART == 0:
            left = number - 1
            if left >= 0 and left + STAGES < tiles_in_all:
                mbarrier.wait(empty_k.index(left % STAGES), left // STAGES & 1)
                _ask(left + STAGES, fine, eight, tail, more, full_k, ring_k, b, h, list_ptr, ends, n_k, extra,
                     FACTORS, LEVELS, TAIL, BLOCK_KV, BOX, COLUMNS, TILE, DIM, STAGES, HAS_EXTRA)  # fmt: skip
        else:
            left = number - 1
            if left >= 0 and left + STAGES < tiles_in_all:
                mbarrier.wait(empty_v.index(left % STAGES), left // STAGES & 1)
                _ask(left + STAGES, fine, eight, tail, more, full_v, ring_v, b, h, list_ptr, ends, n_k, extra,
                     FACTORS, LEVELS, TAIL, BLOCK_KV, BOX, COLUMNS, TILE, DIM, STAGES, HAS_EXTRA)  # fmt: skip
        products = warpgroup_mma_wait(0, deps=(products,))
        mbarrier.arrive(empty_k.index(stage), count=1)

        logits = products.to(gl.float32) * key_scale
        if RESTRICTED or first + TILE > rows - ROWS:
            # Here are rows of the last block, which may stand for fewer tokens, and lanes without a row.
            held = length - last_token - (first + column) % ROWS * FACTOR
            held = gl.where((first + column) // ROWS == last, gl.minimum(gl.maximum(held, 0), FACTOR), FACTOR)
            bias = gl.where(seen & (held > 0), gl.log2(gl.maximum(held, 1).to(gl.float32)), float("-inf"))
            if number == 0:
                top = gl.max(logits + bias[None, :], 1) + HEADROOM
            weights = gl.exp2(logits + bias[None, :] - top[:, None])
        else:
            # Every row stands for FACTOR tokens: the bias is part of the reference.
            if number == 0:
                top = gl.max(logits, 1) + (gl.log2(FACTOR * 1.0) + HEADROOM)
            weights = gl.exp2(logits - (top - gl.log2(FACTOR * 1.0))[:, None])
        total += gl.sum(weights, 1)
        weights = gl.convert_layout(weights.to(ring_v.dtype), gl.DotOperandLayout(0, acc.type.layout, 2))
        mbarrier.wait(full_v.index(stage), phase)
        acc = warpgroup_mma(weights, ring_v.index(stage), acc, is_async=True)
        # Nothing may be under way where the next products are cleared, or ptxas makes each one wait for the last. The
        # other warpgroup has the tensor cores in between.
        acc = warpgroup_mma_wait(0, deps=(acc,))
        mbarrier.arrive(empty_v.index(stage), count=1)
        number += 1
    return acc, top, total, number


@gluon.jit
def _attend_half(
    PART: gl.constexpr, fine, eight, tail, more, ring_k, ring_v, full_k, full_v, empty_k, empty_v, b, h,
    q_ptr, index_ptr, scales_ptr, extra_scales_ptr, list_ptr, ends_ptr, rest_ptr, overflow_ptr, out_ptr,
    stride_ql, stride_ol, first_query, length_q, length_k, extra, n_k, scale,
    FACTORS: gl.constexpr, LEVELS: gl.constexpr, TAIL: gl.constexpr, BLOCK_KV: gl.constexpr, BOX: gl.constexpr,
    COLUMNS: gl.constexpr, TILE: gl.constexpr, HEAD_DIM: gl.constexpr, DIM: gl.constexpr, STAGES: gl.constexpr,
    ORDERED: gl.constexpr, HAS_EXTRA: gl.constexpr, INT8: gl.constexpr, HEADROOM: gl.constexpr,
):  # fmt: skip
    """A warpgroup: the queries first_query + 64 * PART and 63 more; it asks for the keys (0) or the values (1)."""
    of_keys: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE, 32 if INT8 else 16])
    of_values: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DIM, 16])
    in_memory: gl.constexpr = gl.BlockedLayout([1, 8], [256 // DIM, DIM // 8], [4, 1], [1, 0])

    ends = ()
    tiles = 0
    if HAS_EXTRA:
        tiles = (extra + TILE - 1) // TILE
    start = 0
    for level in gl.static_range(LEVELS):
        end = gl.load(ends_ptr + level)
        ends = ends + (end,)
        if TAIL and level == LEVELS - 1:
            tiles += gl.where(end > start, (n_k + TILE - 1) // TILE, 0)
        else:
            tiles += ((end - start) * (BLOCK_KV // FACTORS[level]) + TILE - 1) // TILE
        start = end
    for number in range(0, gl.minimum(tiles, STAGES)):
        if PART == 0:
            _ask(number, fine, eight, tail, more, full_k, ring_k, b, h, list_ptr, ends, n_k, extra,
                 FACTORS, LEVELS, TAIL, BLOCK_KV, BOX, COLUMNS, TILE, DIM, STAGES, HAS_EXTRA)  # fmt: skip
        else:
            _ask(number, fine, eight, tail, more, full_v, ring_v, b, h, list_ptr, ends, n_k, extra,
                 FACTORS, LEVELS, TAIL, BLOCK_KV, BOX, COLUMNS, TILE, DIM, STAGES, HAS_EXTRA)  # fmt: skip

    position = first_query + 64 * PART + gl.arange(0, 64, gl.SliceLayout(1, in_memory))
    exists = position < length_q
    queries = position
    if ORDERED:
        queries = gl.load(index_ptr + position, mask=exists, other=0)
    queries = queries.to(gl.int64)[:, None]
    dims = gl.arange(0, DIM, gl.SliceLayout(0, in_memory))
    mask = exists[:, None] & (dims < HEAD_DIM)[None, :]
    q = gl.load(q_ptr + queries * stride_ql + dims[None, :], mask=mask, other=0)
    if INT8:
        # One scale for the 64 queries; rounded half away from zero.
        wide = q.to(gl.float32)
        largest = gl.maximum(gl.max(gl.max(gl.abs(wide), 1), 0), 1e-20)
        wide *= 127.0 / largest
        q = (wide + gl.where(wide >= 0, 0.5, -0.5)).to(gl.int8)
        scale *= largest / 127.0
    q = gl.convert_layout(q, gl.DotOperandLayout(0, of_keys, 4 if INT8 else 2))

    acc = gl.zeros([64, DIM], gl.float32, of_values)
    top = gl.full([64], float("-inf"), gl.float32, gl.SliceLayout(1, of_keys))
    total = gl.zeros([64], gl.float32, gl.SliceLayout(1, of_keys))
    number = 0
    if HAS_EXTRA:
        acc, top, total, number = _attend_level(
            q, acc, top, total, ring_k, ring_v, full_k, full_v, empty_k, empty_v, number, tiles,
            fine, eight, tail, more, b, h, list_ptr, ends, n_k, extra, list_ptr, rest_ptr, extra_scales_ptr,
            extra, (extra - 1) // 64, (extra - 1) // 64 * 64, extra, scale, 1, 64, False, False, PART,
            FACTORS, LEVELS, TAIL, BLOCK_KV, BOX, COLUMNS, TILE, DIM, STAGES, HAS_EXTRA, INT8, HEADROOM,
        )  # fmt: skip
    start = 0
    for level in gl.static_range(LEVELS):
        end = ends[level]
        if TAIL and level == LEVELS - 1:
            acc, top, total, number = _attend_level(
                q, acc, top, total, ring_k, ring_v, full_k, full_v, empty_k, empty_v, number, tiles,
                fine, eight, tail, more, b, h, list_ptr, ends, n_k, extra, list_ptr, rest_ptr, scales_ptr,
                gl.where(end > start, n_k, 0), n_k - 1, (n_k - 1) * BLOCK_KV, length_k, scale,
                BLOCK_KV, 1, False, True, PART,
                FACTORS, LEVELS, TAIL, BLOCK_KV, BOX, COLUMNS, TILE, DIM, STAGES, HAS_EXTRA, INT8, HEADROOM,
            )  # fmt: skip
        else:
            last_block = gl.load(list_ptr + gl.maximum(end - 1, 0))
            acc, top, total, number = _attend_level(
                q, acc, top, total, ring_k, ring_v, full_k, full_v, empty_k, empty_v, number, tiles,
                fine, eight, tail, more, b, h, list_ptr, ends, n_k, extra, list_ptr + start, rest_ptr, scales_ptr,
                (end - start) * (BLOCK_KV // FACTORS[level]), end - start - 1, last_block * BLOCK_KV, length_k, scale,
                FACTORS[level], BLOCK_KV // FACTORS[level], True, False, PART,
                FACTORS, LEVELS, TAIL, BLOCK_KV, BOX, COLUMNS, TILE, DIM, STAGES, HAS_EXTRA, INT8, HEADROOM,
            )  # fmt: skip
        scales_ptr += n_k
        start = end

    total = gl.convert_layout(total, gl.SliceLayout(1, of_values))
    finite = (gl.abs(acc) < float("inf")) & (total < float("inf"))[:, None]
    gl.store(overflow_ptr + PART, 1 - gl.min(gl.min(finite.to(gl.int32), 1), 0))
    acc = acc / gl.where(total > 0, total, 1.0)[:, None]
    out = gl.convert_layout(acc.to(out_ptr.dtype.element_ty), in_memory)
    gl.store(out_ptr + queries * stride_ol + dims[None, :], out, mask=mask)


@gluon.jit(do_not_specialize=["heads", "length_q", "length_k", "extra", "n_q", "n_k"])
def _attend(
    fine_k, fine_v, eight_k, eight_v, tail_k, tail_v, extra_k, extra_v,
    q_ptr, index_ptr, scales_ptr, extra_scales_ptr, blocks_ptr, ends_ptr, rest_ptr, rows_ptr, overflow_ptr, out_ptr,
    stride_qb, stride_qh, stride_ql, stride_ob, stride_oh, stride_ol,
    heads, length_q, length_k, extra, n_q, n_k, scale,
    FACTORS: gl.constexpr, LEVELS: gl.constexpr, TAIL: gl.constexpr, BLOCK_KV: gl.constexpr, BOX: gl.constexpr,
    COLUMNS_K: gl.constexpr, COLUMNS_V: gl.constexpr, TILE: gl.constexpr, HEAD_DIM: gl.constexpr, DIM: gl.constexpr,
    STAGES: gl.constexpr, KEY: gl.constexpr, VALUE: gl.constexpr, ORDERED: gl.constexpr, SORTED: gl.constexpr,
    HAS_EXTRA: gl.constexpr, INT8: gl.constexpr, HEADROOM: gl.constexpr,
):  # fmt: skip
    """One query block of 128 of one head; see `attend_triton._attend` for the arguments."""
    head = gl.program_id(1)
    block = gl.program_id(0)
    if SORTED:
        block = gl.load(rows_ptr + head * n_q + block)
    row = head.to(gl.int64) * n_q + block
    b, h = head // heads, head % heads
    list_ptr = blocks_ptr + row * n_k
    ends_ptr += row * LEVELS
    rest_ptr += row * n_k
    overflow_ptr += row * 2
    q_ptr += b.to(gl.int64) * stride_qb + h.to(gl.int64) * stride_qh
    out_ptr += b.to(gl.int64) * stride_ob + h.to(gl.int64) * stride_oh
    scales_ptr += head.to(gl.int64) * LEVELS * n_k
    extra_scales_ptr += head.to(gl.int64) * ((extra + 63) // 64)

    ring_k = gl.allocate_shared_memory(
        KEY, [STAGES, TILE, DIM], gl.NVMMASharedLayout.get_default_for([TILE, DIM], KEY)
    )  # fmt: skip
    ring_v = gl.allocate_shared_memory(
        VALUE, [STAGES, TILE, DIM], gl.NVMMASharedLayout.get_default_for([TILE, DIM], VALUE)
    )  # fmt: skip
    full_k = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    full_v = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty_k = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty_v = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full_k.index(stage), count=1)
        mbarrier.init(full_v.index(stage), count=1)
        mbarrier.init(empty_k.index(stage), count=2)
        mbarrier.init(empty_v.index(stage), count=2)
    gl.warp_specialize(
        [
            (_attend_half, (
                0, fine_k, eight_k, tail_k, extra_k, ring_k, ring_v, full_k, full_v, empty_k, empty_v, b, h,
                q_ptr, index_ptr, scales_ptr, extra_scales_ptr, list_ptr, ends_ptr, rest_ptr, overflow_ptr, out_ptr,
                stride_ql, stride_ol, block * 128, length_q, length_k, extra, n_k, scale,
                FACTORS, LEVELS, TAIL, BLOCK_KV, BOX, COLUMNS_K, TILE, HEAD_DIM, DIM, STAGES, ORDERED, HAS_EXTRA, INT8,
                HEADROOM,
            )),
            (_attend_half, (
                1, fine_v, eight_v, tail_v, extra_v, ring_k, ring_v, full_k, full_v, empty_k, empty_v, b, h,
                q_ptr, index_ptr, scales_ptr, extra_scales_ptr, list_ptr, ends_ptr, rest_ptr, overflow_ptr, out_ptr,
                stride_ql, stride_ol, block * 128, length_q, length_k, extra, n_k, scale,
                FACTORS, LEVELS, TAIL, BLOCK_KV, BOX, COLUMNS_V, TILE, HEAD_DIM, DIM, STAGES, ORDERED, HAS_EXTRA, INT8,
                HEADROOM,
            )),
        ],
        [4],
        [256],
    )  # fmt: skip


def serves(q: torch.Tensor, pyramid: Pyramid, levels: tuple[int, ...], block_q: int) -> bool:
    """Whether the kernel takes this call: 16 bits, heads of 33 to 128, pooled blocks of 8 rows or of one, alignment."""
    pooled = [factor for factor in levels if factor != pyramid.block_kv]
    tensors = [*pyramid.keys.values(), *pyramid.values.values()]
    return (
        q.dtype in (torch.bfloat16, torch.float16)
        and 32 < q.shape[-1] <= 128
        and block_q == BLOCK_Q
        and all(pyramid.block_kv // factor >= 8 for factor in pooled)
        and all(x.stride(3) == 1 for x in (q, *tensors))
        and all(x.data_ptr() % 16 == 0 and not any(s * x.element_size() % 16 for s in x.stride()[:3]) for x in tensors)
    )


def attend_hopper(
    q: torch.Tensor,
    pyramid: Pyramid,
    lists: BlockLists,
    scale: float,
    order: TokenOrder,
    extra_k: torch.Tensor | None,
    extra_v: torch.Tensor | None,
    out: torch.Tensor,
    overflow: torch.Tensor,
    rows: torch.Tensor | None,
    *,
    tile: int = 64,
    stages: int = 4,
) -> None:
    """As `attend_triton.attend_triton` without its careful launch.

    overflow: int32 [B, H, n_q, 2], set to 1 for every half of a query block whose result is to be computed again. rows:
    int32 [B, H, n_q], the order in which query blocks start, or None.
    """
    batch, heads, length_q, dim = q.shape
    n_q, n_k = lists.blocks.shape[-2:]
    block_kv, levels = pyramid.block_kv, lists.levels
    int8 = pyramid.scales is not None
    padded = triton.next_power_of_2(dim)
    coarse = [factor for factor in levels if factor > 1]
    some = coarse[0] if coarse else 1
    # The coarse levels share one storage, in which the coarsest begin where the finest of them end.
    fine, pooled = ((pyramid.keys[f], pyramid.values[f]) for f in (levels[0], some))
    has_extra = extra_k is not None and extra_k.shape[2] > 0
    extra_scales = q
    more = pooled
    if has_extra:
        more = (extra_k.contiguous(), extra_v.contiguous())
        if int8:
            rounded, extra_scales = quantise(more[0], _EXTRA_BLOCK)
            more = (rounded.contiguous(), more[1])
    columns = [min(padded, 128 // x.element_size()) for x in pooled]
    box = min(block_kv, tile)
    descriptors = [
        _descriptor(x, rows_at_once, width)
        for pair, rows_at_once in ((fine, box), (pooled, 8), (pooled, tile), (more, tile))
        for x, width in zip(pair, columns, strict=True)
    ]
    scales = torch.stack(list(pyramid.scales.values()), 2) if int8 else q
    _attend[(n_q, batch * heads)](
        *descriptors, q, q if order.index is None else order.index, scales, extra_scales, lists.blocks, lists.ends,
        lists.last, lists.ends if rows is None else rows, overflow, out,
        *q.stride()[:3], *out.stride()[:3],
        heads, length_q, pyramid.length, extra_k.shape[2] if has_extra else 0, n_q, n_k, scale * _LOG2_E,
        FACTORS=levels, LEVELS=len(levels), TAIL=levels[-1] == block_kv, BLOCK_KV=block_kv, BOX=box,
        COLUMNS_K=columns[0], COLUMNS_V=columns[1], TILE=tile, HEAD_DIM=dim, DIM=padded, STAGES=stages,
        KEY=_TYPES[pooled[0].dtype], VALUE=_TYPES[pooled[1].dtype], ORDERED=order.index is not None,
        SORTED=rows is not None, HAS_EXTRA=has_extra, INT8=int8, HEADROOM=8 if q.dtype == torch.float16 else 0,
        num_warps=4,
    )  # fmt: skip


def _descriptor(x: torch.Tensor, rows: int, columns: int) -> TensorDescriptor:
    """For bulk copies of `rows` rows and `columns` columns of one head of x [B, H, R, D]."""
    block = [1, 1, rows, columns]
    bits = 8 * x.element_size()
    layout = gl.NVMMASharedLayout(swizzle_byte_width=columns * bits // 8, element_bitwidth=bits, rank=4)
    return TensorDescriptor(x, list(x.shape), list(x.stride()), block, layout)
