"""Importance in Triton: the kernel for `importance.reduced_softmax`, without a map of scores in memory.

A program serves the representatives of some query blocks. It walks over the keys twice: first for the sum that divides
every softmax row, then for the largest (or mean) weight of every block pair.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..importance import CEILING, Representatives
from .tiles import gpu_of, importance_stages, padded_dim

_LOG2_E = 1.4426950408889634
_CEILING = tl.constexpr(CEILING)


@triton.jit
def _logits(
    q, k_ptr, first, stride_k, length_k, rows_k, scale, GROUP: tl.constexpr, BLOCK: tl.constexpr, COUNT: tl.constexpr,
    PADDED: tl.constexpr, TILE: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr,
    FULL: tl.constexpr,
):  # fmt: skip
    """Logits in base 2 of q [M, D] and keys first..first + TILE; -inf if there is no key. FULL: all are whole."""
    dims = tl.arange(0, DIM)
    row = first + tl.arange(0, TILE)
    address = k_ptr + row[:, None].to(tl.int64) * stride_k + dims[None, :]
    if FULL:
        if DIM == HEAD_DIM:
            k = tl.load(address)
        else:
            k = tl.load(address, mask=(dims < HEAD_DIM)[None, :], other=0)
        logits = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        if GROUP > 1:
            logits += tl.log2(GROUP * 1.0)
        return logits
    else:
        block, member = row // PADDED, row % PADDED
        held = tl.minimum(tl.maximum(length_k - block * BLOCK, 0), BLOCK) - member * GROUP
        held = tl.where(member < COUNT, tl.minimum(tl.maximum(held, 0), GROUP), 0)
        k = tl.load(address, mask=(row < rows_k)[:, None] & (dims < HEAD_DIM)[None, :], other=0)
        bias = tl.where((held > 0) & (row < rows_k), tl.log2(tl.maximum(held, 1).to(tl.float32)), float("-inf"))
        return tl.dot(q, tl.trans(k), input_precision="ieee") * scale + bias[None, :]


@triton.jit
def _reduce_tile(
    logits, scores_ptr, out_q, first, length_q, length_k, n_q, n_k,
    GROUP_Q: tl.constexpr, BLOCK_Q: tl.constexpr, COUNT_Q: tl.constexpr, PADDED_Q: tl.constexpr,
    GROUP_K: tl.constexpr, BLOCK_K: tl.constexpr, COUNT_K: tl.constexpr, PADDED_K: tl.constexpr,
    TILE: tl.constexpr, MEAN: tl.constexpr, WEIGHTS: tl.constexpr,
):  # fmt: skip
    """Reduce normalised logits [ROWS, TILE] over each block pair and write the scores."""
    BLOCKS_Q: tl.constexpr = logits.shape[0] // PADDED_Q
    BLOCKS_K: tl.constexpr = TILE // PADDED_K
    COLUMNS: tl.constexpr = max(BLOCKS_K, 16) if MEAN else BLOCKS_K
    column = tl.arange(0, COLUMNS)
    out_k = first // PADDED_K + column
    # NaN stays NaN.
    logits = tl.minimum(logits, _CEILING, propagate_nan=tl.PropagateNan.ALL)
    if MEAN:
        # Tensor cores add the keys of a block.
        member = (tl.arange(0, TILE)[:, None] // PADDED_K == column[None, :]).to(WEIGHTS)
        sums = tl.dot(tl.exp2(logits).to(WEIGHTS), member, input_precision="ieee")
        result = tl.sum(tl.reshape(sums, [BLOCKS_Q, PADDED_Q, COLUMNS]), 1)
        held_q = tl.minimum(tl.maximum(length_q - out_q * BLOCK_Q, 0), BLOCK_Q)
        held_k = tl.minimum(tl.maximum(length_k - out_k * BLOCK_K, 0), BLOCK_K)
        pairs_q = tl.minimum((held_q + GROUP_Q - 1) // GROUP_Q, COUNT_Q)
        pairs_k = tl.minimum((held_k + GROUP_K - 1) // GROUP_K, COUNT_K)
        result /= tl.maximum(pairs_q[:, None] * pairs_k[None, :], 1).to(tl.float32)
    else:
        grouped = tl.reshape(logits, [BLOCKS_Q, PADDED_Q, BLOCKS_K, PADDED_K])
        result = tl.exp2(tl.max(tl.max(grouped, 3), 1))
    address = out_q[:, None].to(tl.int64) * n_k + out_k[None, :]
    tl.store(scores_ptr + address, result, mask=(out_q < n_q)[:, None] & ((out_k < n_k) & (column < BLOCKS_K))[None, :])


@triton.jit(do_not_specialize=["heads", "length_q", "length_k", "n_q", "n_k"])
def _reduce(
    q_ptr, k_ptr, norm_ptr, scores_ptr, stride_qb, stride_qh, stride_q, stride_kb, stride_kh, stride_k,
    stride_nb, stride_nh, stride_n, heads, length_q, length_k, n_q, n_k, scale,
    GROUP_Q: tl.constexpr, BLOCK_Q: tl.constexpr, COUNT_Q: tl.constexpr, PADDED_Q: tl.constexpr,
    GROUP_K: tl.constexpr, BLOCK_K: tl.constexpr, COUNT_K: tl.constexpr, PADDED_K: tl.constexpr,
    GROUP_N: tl.constexpr, COUNT_N: tl.constexpr, PADDED_N: tl.constexpr,
    ROWS: tl.constexpr, TILE: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr, MEAN: tl.constexpr,
    WEIGHTS: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1).to(tl.int64)
    first_row = tl.program_id(0) * ROWS
    rows_q, rows_k, rows_n = n_q * PADDED_Q, n_k * PADDED_K, n_k * PADDED_N
    dims = tl.arange(0, DIM)
    row = first_row + tl.arange(0, ROWS)
    block, member = row // PADDED_Q, row % PADDED_Q
    held = tl.minimum(tl.maximum(length_q - block * BLOCK_Q, 0), BLOCK_Q) - member * GROUP_Q
    there = (held > 0) & (member < COUNT_Q) & (row < rows_q)
    mask = (row < rows_q)[:, None] & (dims < HEAD_DIM)[None, :]
    q_ptr += (head // heads) * stride_qb + (head % heads) * stride_qh
    k_ptr += (head // heads) * stride_kb + (head % heads) * stride_kh
    norm_ptr += (head // heads) * stride_nb + (head % heads) * stride_nh
    q = tl.load(q_ptr + row[:, None].to(tl.int64) * stride_q + dims[None, :], mask=mask, other=0)

    # The last tile may have short or missing rows, so it comes first.
    last = (rows_n - 1) // TILE * TILE
    logits = _logits(q, norm_ptr, last, stride_n, length_k, rows_n, scale, GROUP_N, BLOCK_K, COUNT_N, PADDED_N,
                     TILE, HEAD_DIM, DIM, False)  # fmt: skip
    # Never -inf, from which -inf could not be subtracted: an infinite key may be all that the last tile has.
    top = tl.maximum(tl.max(logits, 1), -3.4e38)
    total = tl.sum(tl.exp2(logits - top[:, None]), 1)
    whole: tl.constexpr = COUNT_N == PADDED_N
    for first in range(0, last, TILE):
        logits = _logits(q, norm_ptr, first, stride_n, length_k, rows_n, scale, GROUP_N, BLOCK_K, COUNT_N, PADDED_N,
                         TILE, HEAD_DIM, DIM, whole)  # fmt: skip
        # Later tiles may be any factor above the first one.
        higher = tl.maximum(top, tl.max(logits, 1))
        total = total * tl.exp2(top - higher) + tl.sum(tl.exp2(logits - higher[:, None]), 1)
        top = higher
    norm = tl.where(there, top + tl.log2(total), float("inf"))

    out_q = first_row // PADDED_Q + tl.arange(0, ROWS // PADDED_Q)
    scores_ptr += head * n_q * n_k
    full: tl.constexpr = COUNT_K == PADDED_K
    last = (rows_k - 1) // TILE * TILE
    for first in range(0, last, TILE):
        logits = _logits(q, k_ptr, first, stride_k, length_k, rows_k, scale, GROUP_K, BLOCK_K, COUNT_K, PADDED_K,
                         TILE, HEAD_DIM, DIM, full) - norm[:, None]  # fmt: skip
        _reduce_tile(logits, scores_ptr, out_q, first, length_q, length_k, n_q, n_k, GROUP_Q, BLOCK_Q, COUNT_Q,
                     PADDED_Q, GROUP_K, BLOCK_K, COUNT_K, PADDED_K, TILE, MEAN, WEIGHTS)  # fmt: skip
    logits = _logits(q, k_ptr, last, stride_k, length_k, rows_k, scale, GROUP_K, BLOCK_K, COUNT_K, PADDED_K,
                     TILE, HEAD_DIM, DIM, False) - norm[:, None]  # fmt: skip
    _reduce_tile(logits, scores_ptr, out_q, last, length_q, length_k, n_q, n_k, GROUP_Q, BLOCK_Q, COUNT_Q, PADDED_Q,
                 GROUP_K, BLOCK_K, COUNT_K, PADDED_K, TILE, MEAN, WEIGHTS)  # fmt: skip


def reduced_softmax_triton(
    q: Representatives, k: Representatives, scale: float, reduction: str, norm: Representatives | None = None
) -> torch.Tensor:
    """As `importance.reduced_softmax`: float32 [B, H, n_q, n_k]; all rows contiguous in D."""
    batch, heads, _, dim = q.rows.shape
    n_q, n_k = q.blocks, k.blocks
    norm = norm or k
    scores = torch.empty(batch, heads, n_q, n_k, dtype=torch.float32, device=q.rows.device)
    rows, padded = max(128, q.padded), padded_dim(dim)
    tile = max(64, k.padded)
    _reduce[(-(-n_q * q.padded // rows), batch * heads)](
        q.rows, k.rows, norm.rows, scores, *q.rows.stride()[:3], *k.rows.stride()[:3], *norm.rows.stride()[:3],
        heads, q.length, k.length, n_q, n_k, scale * _LOG2_E,
        GROUP_Q=q.group, BLOCK_Q=q.block, COUNT_Q=q.count, PADDED_Q=q.padded,
        GROUP_K=k.group, BLOCK_K=k.block, COUNT_K=k.count, PADDED_K=k.padded,
        GROUP_N=norm.group, COUNT_N=norm.count, PADDED_N=norm.padded,
        ROWS=rows, TILE=tile, HEAD_DIM=dim, DIM=padded, MEAN=reduction == "mean",
        WEIGHTS=_weight_type(q.rows),
        num_warps=8, num_stages=importance_stages(gpu_of(q.rows.device), padded),
    )  # fmt: skip
    return scores


def _weight_type(rows: torch.Tensor) -> tl.dtype:
    """The type in which weights are added: they reach up to 2^CEILING, which float16 cannot hold."""
    exact = rows.dtype == torch.float32 or gpu_of(rows.device) == "interpreter"  # which mishandles bfloat16
    return tl.float32 if exact else tl.bfloat16
