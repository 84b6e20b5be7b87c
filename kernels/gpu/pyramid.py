"""The pyramid in Triton: one launch puts keys and values in order, pools them and, for int8, rounds keys at full
resolution.

The kernel for `pyramid.build_pyramid` and `int8.quantise_keys`, whose results it reproduces. A program reads a few
blocks of one head, eight neighbouring tokens per thread, and pools them in registers in float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..int8 import mean_key
from ..order import TokenOrder
from ..pyramid import Pyramid
from .tiles import padded_dim


@triton.jit
def _write(rows, ptr, first, step, there, HEAD_DIM: tl.constexpr):
    """Write rows [N, DIM] to the rows first, first + step, ... of a level."""
    dims = tl.arange(0, rows.shape[1])
    address = (first + tl.arange(0, rows.shape[0]) * step)[:, None].to(tl.int64) * HEAD_DIM + dims[None, :]
    tl.store(ptr + address, rows.to(ptr.dtype.element_ty), mask=there[:, None] & (dims < HEAD_DIM)[None, :])


@triton.jit
def _block_scale(largest, ptr, first_block, blocks, BLOCKS: tl.constexpr):
    """Scale of each block from the largest value of each of its groups [GROUPS], spread over the groups again."""
    GROUPS: tl.constexpr = largest.shape[0]
    scale = tl.max(tl.reshape(largest, [BLOCKS, GROUPS // BLOCKS]), 1)
    scale = tl.div_rn(tl.maximum(scale, 1e-20), 127.0)
    block = tl.arange(0, BLOCKS)
    tl.store(ptr + first_block + block, scale, mask=first_block + block < blocks)
    return tl.reshape(tl.broadcast_to(scale[:, None], [BLOCKS, GROUPS // BLOCKS]), [GROUPS])


@triton.jit
def _shifted(rows, mean, there):
    """The rows that exist, with the mean key subtracted."""
    return tl.where(there[:, None], rows - mean[None, :], 0.0)


@triton.jit(do_not_specialize=["heads", "length", "length_index", "blocks", "coarse_rows"])
def _pool(
    x_ptr, y_ptr, index_ptr, mean_ptr, fine_ptr, coarse_ptr, scales_ptr, stride_x, stride_y,
    heads, length, length_index, blocks, coarse_rows,
    FACTORS: tl.constexpr, LEVELS: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
    HEAD_DIM: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """Blocks from BLOCKS * program_id(0) of head `program_id(1)`, read as groups of 8 neighbouring tokens.

    x, and y for `program_id(2)` 1: [B, H, L, D] with unit stride in D; strides are those of batch entry, head and
    token. A missing tensor is None. length_index: entries of the index from one head to the next; 0 if all heads share
    one. FACTORS: pooling factors of the levels, finest first; levels above 1 go to `coarse`
    [tensors, B, H, coarse_rows, D], level after level, level 1 to `fine` [tensors, B, H, L, D] if it is copied.
    mean, scales: of int8 keys; the mean key is subtracted from all levels, level 1 is rounded with one scale per block.
    """
    INT8: tl.constexpr = scales_ptr is not None
    GROUPS: tl.constexpr = BLOCKS * BLOCK // 8
    first_block = tl.program_id(0) * BLOCKS
    first = first_block * BLOCK
    head = tl.program_id(1).to(tl.int64)
    dims = tl.arange(0, DIM)
    dim_exists = dims < HEAD_DIM
    group = tl.arange(0, GROUPS)
    base, stride = x_ptr + (head // heads) * stride_x[0] + (head % heads) * stride_x[1], stride_x[2]
    if y_ptr is not None:
        is_x = tl.program_id(2) == 0
        base = tl.where(is_x, base, y_ptr + (head // heads) * stride_y[0] + (head % heads) * stride_y[1])
        stride = tl.where(is_x, stride, stride_y[2])
    mean = tl.zeros([DIM], tl.float32)
    if INT8:
        mean = tl.load(mean_ptr + head * HEAD_DIM + dims, mask=dim_exists, other=0)
        scales_ptr += head * blocks
    written = head + tl.program_id(2) * tl.num_programs(1)
    coarse_ptr += written * coarse_rows * HEAD_DIM
    # Rows of the blocks after the last one are never written.
    inside = first + group * 8 < blocks * BLOCK

    rows = ()
    for i in tl.static_range(8):
        token = first + group * 8 + i
        source = token
        if index_ptr is not None:
            source = tl.load(index_ptr + head * length_index + token, mask=token < length, other=0)
        address = base + source[:, None].to(tl.int64) * stride + dims[None, :]
        mask = (token < length)[:, None] & dim_exists[None, :]
        rows = rows + (tl.load(address, mask=mask, other=0).to(tl.float32),)
    if fine_ptr is not None:
        fine_ptr += written * length * HEAD_DIM
        largest = tl.zeros([GROUPS], tl.float32)
        scale = largest
        if INT8:
            for i in tl.static_range(8):
                row = _shifted(rows[i], mean, first + group * 8 + i < length)
                largest = tl.maximum(largest, tl.max(tl.abs(row), 1))
            scale = _block_scale(largest, scales_ptr, first_block, blocks, BLOCKS)
        for i in tl.static_range(8):
            there = first + group * 8 + i < length
            row = rows[i]
            if INT8:  # halves are rounded away from zero; exact division, as in int8.py
                row = tl.div_rn(_shifted(row, mean, there), scale[:, None])
                row += tl.where(row >= 0, 0.5, -0.5)
            _write(row, fine_ptr, first + i, 8, there, HEAD_DIM)

    coarse_row = 0
    for halving in tl.static_range(3):  # factors 2, 4, 8: sums of rows of one thread
        sums = ()
        for i in tl.static_range(4 >> halving):
            sums = sums + (rows[2 * i] + rows[2 * i + 1],)
        rows = sums
        for level in tl.static_range(LEVELS):
            if FACTORS[level] == 2 << halving:
                for i in tl.static_range(4 >> halving):
                    held = _held(first, group * (4 >> halving) + i, 2 << halving, length)
                    means = rows[i] / tl.maximum(held, 1).to(tl.float32)[:, None]
                    if INT8:
                        means = _shifted(means, mean, held > 0)
                    _write(means, coarse_ptr, coarse_row + first // (2 << halving) + i, 4 >> halving, inside, HEAD_DIM)
                coarse_row += blocks * (BLOCK // (2 << halving))

    sums = rows[0]
    for halving in tl.static_range(4):  # factors 16 to 128: sums of neighbouring groups
        if 16 << halving <= BLOCK:
            sums = tl.sum(tl.reshape(sums, [GROUPS >> (halving + 1), 2, DIM]), 1)
            row = tl.arange(0, GROUPS >> (halving + 1))
            held = _held(first, row, 16 << halving, length)
            means = sums / tl.maximum(held, 1).to(tl.float32)[:, None]
            row_inside = first + row * (16 << halving) < blocks * BLOCK
            for level in tl.static_range(LEVELS):
                if FACTORS[level] == 16 << halving:
                    shifted = means
                    if INT8:
                        shifted = _shifted(means, mean, held > 0)
                    _write(shifted, coarse_ptr, coarse_row + first // (16 << halving), 1, row_inside, HEAD_DIM)
                    coarse_row += blocks * (BLOCK // (16 << halving))


@triton.jit
def _held(first, row, FACTOR: tl.constexpr, length):
    """How many of the FACTOR tokens of each row exist; `row` counts from token `first`."""
    return tl.minimum(tl.maximum(length - first - row * FACTOR, 0), FACTOR)


def pool_triton(x: torch.Tensor, factors: tuple[int, ...], block: int, order: TokenOrder) -> list[torch.Tensor]:
    """As `pyramid.pool` of the ordered x [B, H, L, D], for factors from 2 to `block`, ascending, all in one pass."""
    (levels,) = _levels((x,), factors, block, order)
    return list(levels.values())


def build_pyramid_triton(
    k: torch.Tensor,
    v: torch.Tensor,
    factors: tuple[int, ...],
    block_kv: int,
    order: TokenOrder,
    *,
    int8: bool = False,
) -> Pyramid:
    """As `pyramid.build_pyramid` of the ordered k and v [B, H, L, D]; with int8, its `int8.quantise_keys`."""
    length = k.shape[2]
    if int8:
        mean = mean_key(k)
        scales = torch.empty(*k.shape[:2], -(-length // block_kv), dtype=torch.float32, device=k.device)
        (keys,) = _levels((k,), factors, block_kv, order, mean, scales)
        (values,) = _levels((v,), factors, block_kv, order)
        return Pyramid(keys, values, block_kv, length, scales, mean)
    keys, values = _levels((k, v), factors, block_kv, order)
    return Pyramid(keys, values, block_kv, length)


def _levels(
    tensors: tuple[torch.Tensor, ...],
    factors: tuple[int, ...],
    block: int,
    order: TokenOrder,
    mean: torch.Tensor | None = None,
    scales: torch.Tensor | None = None,
) -> list[dict[int, torch.Tensor]]:
    """Pooling factor -> level, for one or two tensors [B, H, L, D], in one launch. mean, scales: for int8 keys."""
    tensors = tuple(x if x.stride(3) == 1 else x.contiguous() for x in tensors)
    x, y = tensors[0], tensors[1] if len(tensors) > 1 else None
    batch, heads, length, dim = x.shape
    blocks, at_once = -(-length // block), max(1, 128 // block)
    pooled = [factor for factor in factors if factor > 1]
    rows = [blocks * (block // factor) for factor in pooled]
    coarse = x.new_empty(len(tensors), batch, heads, sum(rows), dim)
    fine = None
    if 1 in factors and (scales is not None or order.index is not None):
        dtype = x.dtype if scales is None else torch.int8
        fine = torch.empty(len(tensors), *x.shape, dtype=dtype, device=x.device)
    index = None if order.index is None else order.index.contiguous()
    _pool[(-(-blocks // at_once), batch * heads, len(tensors))](
        x, y, index, mean, fine, coarse, scales, x.stride()[:3], None if y is None else y.stride()[:3],
        heads, length, length if index is not None and index.ndim > 1 else 0, blocks, coarse.shape[3],
        FACTORS=factors, LEVELS=len(factors), BLOCK=block, BLOCKS=at_once, HEAD_DIM=dim,
        DIM=padded_dim(dim), num_warps=4,
    )  # fmt: skip
    finest = tensors if fine is None else fine.unbind(0)
    return [
        ({1: first} if 1 in factors else {}) | dict(zip(pooled, part.split_with_sizes(rows, 2), strict=True))
        for first, part in zip(finest, coarse.unbind(0), strict=True)
    ]
