"""Queries in eight bits in Triton: the kernel for `int8.quantise`, whose result it reproduces.

The attention kernel could round its queries itself. But then the tensor cores of compute capability 9.0 would read them
from registers, and it has none to spare.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..order import TokenOrder
from .order import load_rows
from .tiles import padded_dim


@triton.jit(do_not_specialize=["heads", "length", "length_index", "blocks"])
def _quantise(
    x_ptr, index_ptr, out_ptr, scales_ptr, stride_b, stride_h, stride_l, heads, length, length_index, blocks,
    BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr, ORDERED: tl.constexpr,
):  # fmt: skip
    """Block `program_id(0)` of head `program_id(1)`: out [B, H, L, D] in block order, one scale per block.

    length_index: entries of the index from one head to the next; 0 if all heads share one.
    """
    head = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0) * BLOCK
    base = x_ptr + (head // heads) * stride_b + (head % heads) * stride_h
    index_ptr += head * length_index
    rows = load_rows(base, index_ptr if ORDERED else None, first, length, stride_l, BLOCK, HEAD_DIM, DIM).to(tl.float32)
    # Numbers that are not finite become 0, so that the others decide the scale.
    rows = tl.where(tl.abs(rows) < float("inf"), rows, 0.0)
    # Exact division: next to a half, a quotient that is off by its last bit would round to another number.
    scale = tl.div_rn(tl.maximum(tl.max(tl.max(tl.abs(rows), 1), 0), 1e-20), 127.0)
    rows = tl.div_rn(rows, scale)
    rows += tl.where(rows >= 0, 0.5, -0.5)
    row, dims = first + tl.arange(0, BLOCK), tl.arange(0, DIM)
    address = out_ptr + (head * length + row)[:, None] * HEAD_DIM + dims[None, :]
    tl.store(address, rows.to(tl.int8), mask=(row < length)[:, None] & (dims < HEAD_DIM)[None, :])
    tl.store(scales_ptr + head * blocks + tl.program_id(0), scale)


def quantise_queries_triton(q: torch.Tensor, block_q: int, order: TokenOrder) -> tuple[torch.Tensor, torch.Tensor]:
    """As `int8.quantise` of the ordered q [B, H, L, D]: int8 of the same shape, contiguous, and float32 scales
    [B, H, blocks]. Numbers that are not finite become 0.
    """
    batch, heads, length, dim = q.shape
    blocks = -(-length // block_q)
    rows = torch.empty(q.shape, dtype=torch.int8, device=q.device)
    scales = torch.empty(batch, heads, blocks, dtype=torch.float32, device=q.device)
    index = None if order.index is None else order.index.contiguous()
    _quantise[(blocks, batch * heads)](
        q, q if index is None else index, rows, scales, *q.stride()[:3], heads, length,
        length if index is not None and index.ndim > 1 else 0, blocks,
        BLOCK=block_q, HEAD_DIM=dim, DIM=padded_dim(dim), ORDERED=index is not None, num_warps=4,
    )  # fmt: skip
    return rows, scales
