"""The correction in Triton: what the kernel that writes the output adds to its rows; the torch code is `..delta`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..delta import Delta


def passed(delta: Delta | None) -> tuple[torch.Tensor, torch.Tensor, int] | None:
    """A `Delta` as kernels take it: its codes as plain bytes, its scales, and its group."""
    if delta is None:
        return None
    return delta.values.view(torch.uint8).contiguous(), delta.scales.contiguous(), delta.group


@triton.jit
def lost_rows(delta, head, position, exists, dims, length, HEAD_DIM: tl.constexpr):
    """What a delta, as `passed`, gives back to the tokens at `position` in block order of a head: float32 [ROWS, DIM].

    head: number of the head, counted over the batch. exists, length: whether there is such a token, and how many.
    """
    values_ptr, scales_ptr, group = delta
    row = head.to(tl.int64) * tl.cdiv(length, group) + position // group
    mask = exists[:, None] & (dims < HEAD_DIM)[None, :]
    code = tl.load(values_ptr + row[:, None] * HEAD_DIM + dims[None, :], mask=mask, other=0).to(tl.uint16)
    # Moved by one bit, the exponent and fraction of float8_e4m3 are those of a float16 that is 2^8 times too small. No
    # GPU before compute capability 8.9 converts them itself.
    half = ((code & 0x80) << 8) | ((code & 0x7F) << 7)
    scale = tl.load(scales_ptr + row, mask=exists, other=0.0) * 256.0
    return half.to(tl.float16, bitcast=True).to(tl.float32) * scale[:, None]
