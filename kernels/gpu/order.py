"""Token orders in Triton: the kernel for `order.TokenOrder.apply` and `undo`, whose results it reproduces."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..delta import Delta
from ..order import TokenOrder
from .delta import lost_rows, passed
from .tiles import power_of_two

_ROWS = 64


@triton.jit
def load_rows(
    base_ptr, index_ptr, first, length, stride, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr
):
    """The ordered rows first..first + ROWS of a head [ROWS, DIM], 0 if there is no row.

    base_ptr: the head; index_ptr: where its rows are, None if they are in order.
    """
    position = first + tl.arange(0, ROWS)
    dims = tl.arange(0, DIM)
    exists = position < length
    place = position.to(tl.int64)
    if index_ptr is not None:
        place = tl.load(index_ptr + position, mask=exists, other=0)
    mask = exists[:, None] & (dims < HEAD_DIM)[None, :]
    return tl.load(base_ptr + place[:, None] * stride + dims[None, :], mask=mask, other=0)


@triton.jit(do_not_specialize=["heads", "length", "length_index"])
def _move(
    x_ptr, index_ptr, out_ptr, delta, stride_xb, stride_xh, stride_xl, stride_ob, stride_oh, stride_ol,
    heads, length, length_index, UNDO: tl.constexpr, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """Rows from ROWS * program_id(0) of head program_id(1): out[i] = x[index[i]], or out[index[i]] = x[i] to undo.

    delta: added to the rows, None for nothing. length_index: entries of the index from one head to the next; 0 if all
    heads share one.
    """
    head = tl.program_id(1).to(tl.int64)
    ordered = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    dims = tl.arange(0, DIM)
    exists = ordered < length
    raster = tl.load(index_ptr + head * length_index + ordered, mask=exists, other=0)
    source, target = raster, ordered.to(tl.int64)
    if UNDO:
        source, target = target, source
    mask = exists[:, None] & (dims < HEAD_DIM)[None, :]
    x_ptr += (head // heads) * stride_xb + (head % heads) * stride_xh
    out_ptr += (head // heads) * stride_ob + (head % heads) * stride_oh
    rows = tl.load(x_ptr + source[:, None] * stride_xl + dims[None, :], mask=mask, other=0)
    if delta is not None:
        rows = rows.to(tl.float32) + lost_rows(delta, head, ordered, exists, dims, length, HEAD_DIM)
    tl.store(out_ptr + target[:, None] * stride_ol + dims[None, :], rows.to(out_ptr.dtype.element_ty), mask=mask)


def apply_order_triton(x: torch.Tensor, order: TokenOrder) -> torch.Tensor:
    """x [B, H, L, D] in this order: a contiguous copy, or x itself for the raster order."""
    if order.index is None:
        return x
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(x, order.index, out, undo=False)
    return out


def undo_order_triton(x: torch.Tensor, order: TokenOrder, out: torch.Tensor, delta: Delta | None = None) -> None:
    """Write x [B, H, L, D] from this order to `out` in raster order, with `delta` added."""
    assert order.index is not None  # the raster order moves nothing, so nothing is undone
    _launch(x, order.index, out, delta, undo=True)


def _launch(x: torch.Tensor, index: torch.Tensor, out: torch.Tensor, delta: Delta | None = None, *, undo: bool) -> None:
    x = x if x.stride(3) == 1 else x.contiguous()
    batch, heads, length, dim = x.shape
    _move[(-(-length // _ROWS), batch * heads)](
        x, index.contiguous(), out, passed(delta), *x.stride()[:3], *out.stride()[:3], heads, length,
        length if index.ndim > 1 else 0, UNDO=undo, ROWS=_ROWS, HEAD_DIM=dim, DIM=power_of_two(dim),
        num_warps=4,
    )  # fmt: skip
