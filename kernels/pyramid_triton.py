"""The pyramid in Triton: one pass over keys or values that puts them in order, pools them and, for int8, rounds them.

The kernel beside `pyramid.build_pyramid` and `int8.quantise_keys`, whose results it reproduces. A program reads one
block of one head and pools it in registers, pair by pair, in float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .int8 import mean_key
from .order import TokenOrder
from .pyramid import Pyramid


@triton.jit
def _store_rows(rows, out_ptr, base, row_stride, scale_ptr, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr,
                DIM: tl.constexpr, INT8: tl.constexpr, mask):  # fmt: skip
    """Write rows [ROWS, DIM] from row `base` on, as they are or rounded to int8 with one scale for all of them."""
    dims = tl.arange(0, DIM)
    if INT8:
        scale = tl.maximum(tl.max(tl.max(tl.abs(rows), 1), 0), 1e-20) / 127.0
        tl.store(scale_ptr, scale)
        rows = rows / scale
        rows += tl.where(rows >= 0, 0.5, -0.5)
    address = (base + tl.arange(0, ROWS))[:, None].to(tl.int64) * row_stride + dims[None, :]
    tl.store(out_ptr + address, rows.to(out_ptr.dtype.element_ty), mask=mask & (dims < HEAD_DIM)[None, :])


@triton.jit(do_not_specialize=["heads", "length", "blocks"])
def _pool(
    x_ptr, index_ptr, mean_ptr, fine_ptr, coarse_ptr, scales_ptr, summary_ptr,
    stride_b, stride_h, stride_l, heads, length, blocks, coarse_rows,
    FACTORS: tl.constexpr, LEVELS: tl.constexpr, SUMMARY: tl.constexpr, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr, ORDERED: tl.constexpr, FINE: tl.constexpr, INT8: tl.constexpr,
):  # fmt: skip
    """Block `program_id(0)` of head `program_id(1)`.

    x: [B, H, L, D] with unit stride in D. FACTORS: pooling factors of the levels, finest first; those above 1 lie in
    `coarse` [B, H, coarse_rows, D], level after level. FINE: whether level 1 is written, to `fine` [B, H, L, D].
    SUMMARY: a factor whose means are also written to `summary` [B, H, blocks * BLOCK / SUMMARY, D], without the mean
    taken off and never rounded to int8; 0 for none.
    """
    block = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    dims = tl.arange(0, DIM)
    tokens = block * BLOCK + tl.arange(0, BLOCK)
    exists = tokens < length
    mask = exists[:, None] & (dims < HEAD_DIM)[None, :]
    source = tokens
    if ORDERED:
        source = tl.load(index_ptr + tokens, mask=exists, other=0)
    base = x_ptr + (head // heads) * stride_b + (head % heads) * stride_h
    x = tl.load(base + source[:, None].to(tl.int64) * stride_l + dims[None, :], mask=mask, other=0).to(tl.float32)
    if INT8:
        mean = tl.load(mean_ptr + head * HEAD_DIM + dims, mask=dims < HEAD_DIM, other=0)
    scales_ptr += head * LEVELS * blocks + block

    rows = x
    if INT8:
        rows = tl.where(mask, x - mean[None, :], 0.0)
    if FINE:
        _store_rows(rows, fine_ptr + head * length * HEAD_DIM, block * BLOCK, HEAD_DIM, scales_ptr,
                    BLOCK, HEAD_DIM, DIM, INT8, exists[:, None])  # fmt: skip

    coarse_ptr += head * coarse_rows * HEAD_DIM
    first_row = 0
    sums = x
    FACTOR: tl.constexpr = 1
    for step in tl.static_range(7):
        FACTOR: tl.constexpr = 2 << step
        if FACTOR <= BLOCK:
            ROWS: tl.constexpr = BLOCK // FACTOR
            sums = tl.sum(tl.reshape(sums, [ROWS, 2, DIM]), 1)
            start = block * BLOCK + tl.arange(0, ROWS) * FACTOR
            held = tl.minimum(tl.maximum(length - start, 0), FACTOR)
            means = sums / tl.maximum(held, 1).to(tl.float32)[:, None]
            if FACTOR == SUMMARY:
                _store_rows(means, summary_ptr + head * blocks * ROWS * HEAD_DIM, block * ROWS, HEAD_DIM, scales_ptr,
                            ROWS, HEAD_DIM, DIM, False, held[:, None] >= 0)  # fmt: skip
            for level in tl.static_range(LEVELS):
                if FACTORS[level] == FACTOR:
                    rows = means
                    if INT8:
                        rows = tl.where(held[:, None] > 0, means - mean[None, :], 0.0)
                    _store_rows(rows, coarse_ptr, first_row + block * ROWS, HEAD_DIM, scales_ptr + level * blocks,
                                ROWS, HEAD_DIM, DIM, INT8, held[:, None] >= 0)  # fmt: skip
                    first_row += blocks * ROWS


def pool_triton(x: torch.Tensor, factor: int, block: int, order: TokenOrder) -> torch.Tensor:
    """As `pyramid.pool` of the ordered x [B, H, L, D], for factors from 2 to `block`."""
    out = x.new_empty(*x.shape[:2], -(-x.shape[2] // block) * (block // factor), x.shape[3])
    _launch(x, order, block, summary=out, summary_factor=factor)
    return out


def build_pyramid_triton(
    k: torch.Tensor,
    v: torch.Tensor,
    factors: tuple[int, ...],
    block_kv: int,
    order: TokenOrder,
    *,
    int8: bool = False,
    summary_factor: int = 0,
) -> tuple[Pyramid, torch.Tensor | None]:
    """As `pyramid.build_pyramid` of the ordered k and v [B, H, L, D]; with int8, its `int8.quantise_keys`.

    summary_factor: a pooling factor from 2 to `block_kv` of which the means of k come back beside the pyramid, never in
    int8: [B, H, rows, D]; 0 for none.
    """
    blocks = -(-k.shape[2] // block_kv)
    coarse = [factor for factor in factors if factor > 1]
    rows = [blocks * (block_kv // factor) for factor in coarse]

    def level(x: torch.Tensor, dtype: torch.dtype, **more: object) -> dict[int, torch.Tensor]:
        storage = torch.empty(*x.shape[:2], sum(rows), x.shape[3], dtype=dtype, device=x.device)
        copied = 1 in factors and (dtype != x.dtype or order.index is not None)
        fine = torch.empty(x.shape, dtype=dtype, device=x.device) if copied else None
        _launch(x, order, block_kv, factors=factors, fine=fine, coarse=storage, **more)
        result = {1: x if fine is None else fine} if 1 in factors else {}
        return result | dict(zip(coarse, storage.split(rows, 2), strict=True))

    summary = None
    if summary_factor and (int8 or summary_factor not in coarse):
        summary = k.new_empty(*k.shape[:2], blocks * (block_kv // summary_factor), k.shape[3])
    more = {"summary": summary, "summary_factor": summary_factor} if summary is not None else {}
    mean = scales = None
    if int8:
        mean = mean_key(k)
        scales = torch.empty(*k.shape[:2], len(factors), blocks, dtype=torch.float32, device=k.device)
        more |= {"mean": mean, "scales": scales}
        scales = {factor: scales[:, :, i] for i, factor in enumerate(factors)}
    keys = level(k, torch.int8 if int8 else k.dtype, **more)
    if summary_factor and summary is None:
        summary = keys[summary_factor]
    return Pyramid(keys, level(v, v.dtype), block_kv, k.shape[2], scales, mean), summary


def _launch(
    x: torch.Tensor,
    order: TokenOrder,
    block: int,
    *,
    factors: tuple[int, ...] = (),
    fine: torch.Tensor | None = None,
    coarse: torch.Tensor | None = None,
    scales: torch.Tensor | None = None,
    mean: torch.Tensor | None = None,
    summary: torch.Tensor | None = None,
    summary_factor: int = 0,
) -> None:
    x = x if x.stride(3) == 1 else x.contiguous()
    batch, heads, length, dim = x.shape
    blocks = -(-length // block)
    # A tensor that is not there is never touched; any may stand in its place.
    index, mean_, fine_, coarse_, scales_, summary_ = (
        x if tensor is None else tensor for tensor in (order.index, mean, fine, coarse, scales, summary)
    )
    _pool[(blocks, batch * heads)](
        x, index, mean_, fine_, coarse_, scales_, summary_,
        *x.stride()[:3], heads, length, blocks, 0 if coarse is None else coarse.shape[2],
        FACTORS=factors or (0,), LEVELS=len(factors), SUMMARY=summary_factor, BLOCK=block, HEAD_DIM=dim,
        DIM=max(16, triton.next_power_of_2(dim)), ORDERED=order.index is not None, FINE=fine is not None,
        INT8=scales is not None, num_warps=4,
    )  # fmt: skip
