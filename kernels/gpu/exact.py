"""A few rows of a call computed again in plain torch, from the tokens and the levels alone: what the kernels must give.

Two runs of 64 query rows of every head are computed, one head at a time. It shares no code with the kernels, and works
in float64 because torch may be set to round float32 products to fewer bits. Pooled rows are rounded to the type of the
call and int8 rows as `int8.py` says, as in the kernels.
"""

from __future__ import annotations

import dataclasses
import itertools
import math

import torch
import torch.nn.functional as F

from ..int8 import dequantise, mean_key, quantise
from ..levels import BlockLists
from .call import Call

RUNS, ROWS = 2, 64
"""How many runs of query rows of a head are computed again, and how many rows a run has at most."""

# A run of rows may differ by twice what 16 bits explain: the bound that the tests hold the kernels to, which is twice
# the error of rounding every weight and the output, plus a thousandth of the output.
_MARGIN, _ROUNDINGS, _OF_OUTPUT = 2.0, 2.0, 1e-3
_UNIT = {torch.bfloat16: 2.0**-8}
_SHORTEST_UNIT = 2.0**-11  # of float16
# Logits are sums of products in float32, which err by no more than that share of the product of the norms; those of
# int8 rows have a large number added on the way. Means of tokens err by no more than `_MEAN_SLIPS` of their size.
_SLIPS, _INT8_SLIPS, _MEAN_SLIPS = 2.0**-18, 2.0**-14, 2.0**-20
# Errors of a logit from which a row says nothing.
_MOST_SLIP = 0.5
_LARGEST_WEIGHT = 2.0**15  # of float16, whose weights are scaled up


@dataclasses.dataclass(frozen=True)
class _Head:
    """One head of a call, in raster order; a place is a token's position in block order.

    Attributes:
        q, k, v, extra_k, extra_v: [L, D]. query_index: the token at every place, None if they are the same.
        key_place: place of every key token.
        mean, fine_k: with int8 keys, the mean key [1, D] and the keys [L, D] of level 1.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    extra_k: torch.Tensor | None
    extra_v: torch.Tensor | None
    query_index: torch.Tensor | None
    key_place: torch.Tensor
    mean: torch.Tensor | None
    fine_k: torch.Tensor | None


def what_differs(call: Call, out: torch.Tensor) -> str | None:
    """What is wrong with the output [B, H, Lq, D] of a call, as a part of a sentence; None if nothing is, and an empty
    string if no row says anything.

    Rows whose exact result is not finite, or out of the type's range, say nothing; nor do rows of numbers so large that
    float32 sums of them may overflow or tell nothing about the weights. Reads from the device.
    """
    batch, heads, length, _ = call.q.shape
    runs = [_runs(head, heads, length, call.config.block_q) for head in range(heads)]
    blocks = torch.tensor([[rows.start // call.config.block_q for rows in some] for some in runs], device=out.device)
    factors, wrong = factors_of_rows(call.lists, blocks)
    sizes = torch.where(factors > 0, call.config.block_kv // factors.clamp_min(1), 0)
    totals = [int(wrong), *sizes.sum(-1).flatten().tolist()]
    if totals.pop(0):
        return "the lists of blocks are no lists of blocks"
    firsts = sizes.cumsum(-1) - sizes
    mean = mean_key(call.k) if call.config.precision == "int8" else None
    shares = []
    for b, h in itertools.product(range(batch), range(heads)):
        head = _head(call, b, h, None if mean is None else mean[b, h])
        for i, rows in enumerate(runs[h]):
            total = totals[(b * heads + h) * len(runs[h]) + i]
            expected, spread, slips = _expected(call, head, rows, factors[b, h, i], firsts[b, h, i], total)
            place = torch.arange(rows.start, rows.stop, device=out.device)
            if call.delta is not None:
                row = place // call.delta.group
                lost = call.delta.values[b, h, row].double() * call.delta.scales[b, h, row, None].double()
                # What is added may cancel a sum that was rounded before.
                expected, spread = expected + lost, torch.hypot(spread, expected)
            token = place if head.query_index is None else head.query_index[place]
            shares.append(_share(out[b, h, token], expected, spread, slips))
    found = torch.stack(shares).tolist()
    worst = max(range(len(found)), key=found.__getitem__)
    if found[worst] <= 1:
        return None if found[worst] >= 0 else ""
    more = "is not finite" if math.isinf(found[worst]) else f"is off by {found[worst]:.1f} times what is allowed"
    return f"head {worst // len(runs[0]) % heads} {more}"


def _runs(head: int, heads: int, length: int, block_q: int) -> list[range]:
    """The places of the query rows that are computed again, each within one block: spread over the sequence from head
    to head, at its end for every head, at the beginning of blocks for one head and at the end for the next."""
    blocks, at_once = -(-length // block_q), min(ROWS, block_q)
    count = RUNS * ROWS // at_once
    spread = [(head * blocks // heads + i * blocks // count) % blocks for i in range(count - 1)]
    runs = []
    for block in [*spread, blocks - 1]:
        start, stop = block * block_q, min((block + 1) * block_q, length)
        at_end = head % 2 or block == blocks - 1
        runs.append(range(max(start, stop - at_once), stop) if at_end else range(start, min(start + at_once, stop)))
    return runs


def factors_of_rows(lists: BlockLists, blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The factors [B, H, n, n_k] of the query blocks [H, n], and whether the lists contradict themselves."""
    heads = torch.arange(len(blocks), device=blocks.device)[:, None]
    listed, ends = lists.blocks[:, heads, blocks].long(), lists.ends[:, heads, blocks]
    n_k, width = lists.shape[-1], listed.shape[-1]
    rises = torch.cat([ends[..., :1], ends.diff(dim=-1), width - ends[..., -1:]], -1)
    used = torch.arange(width, device=blocks.device) < ends[..., -1:]
    outside = used & ((listed < 0) | (listed >= n_k))
    some = dataclasses.replace(lists, blocks=listed.clamp(0, n_k - 1), ends=ends, key_blocks=n_k)
    factors = some.factors().long()
    doubled = (factors > 0).sum(-1) != ends[..., -1]
    return factors, (rises < 0).any() | outside.any() | doubled.any()


def _head(call: Call, b: int, h: int, mean: torch.Tensor | None) -> _Head:
    query_order, key_order = call.query_order.of_head(b, h), call.key_order.of_head(b, h)
    k, extra_k = call.k[b, h], None if call.extra_k is None else call.extra_k[b, h]
    place = torch.arange(len(k), device=k.device) if key_order.inverse is None else key_order.inverse
    fine_k = None
    if mean is not None:
        by_place = torch.empty_like(k, dtype=torch.float32).index_copy_(0, place, k.float() - mean)
        rows, scales = quantise(by_place[None, None], call.config.block_kv)
        fine_k = dequantise(rows, scales, call.config.block_kv)[0, 0][place]
        extra_k = None if extra_k is None else (extra_k - mean).to(k.dtype)
    extra_v = None if call.extra_v is None else call.extra_v[b, h]
    return _Head(call.q[b, h], k, call.v[b, h], extra_k, extra_v, query_order.index, place, mean, fine_k)


def _expected(
    call: Call, head: _Head, rows: range, factors: torch.Tensor, firsts: torch.Tensor, total: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The exact output of the query rows at the places `rows` of one block, without the correction; how far 16 bits
    may be from each number of it, in units; and how far errors of the logits may move it, inf in rows that say nothing.
    All float64 [rows, D].

    Args:
        factors, firsts: [n_k], the pooling factor of each key block and the first of its rows, of which there are
            `total`.
    """
    block, within = head.key_place // call.config.block_kv, head.key_place % call.config.block_kv
    factor = factors[block]  # of every key token
    # Tokens of dropped blocks gather in one more row at the end.
    row = torch.where(factor > 0, firsts[block] + within // factor.clamp_min(1), total)
    tokens = factor.new_zeros(total + 1).index_add_(0, row, torch.ones_like(row))[:total]

    def pooled(x: torch.Tensor) -> torch.Tensor:
        sums = x.new_zeros(total + 1, x.shape[1], dtype=torch.float32).index_add_(0, row, x.float())[:total]
        return sums / tokens.clamp_min(1)[:, None]

    dtype = head.k.dtype
    q, fine_q = _queries(call, head, rows)
    values = pooled(head.v).to(dtype).double()
    keys, sizes = pooled(head.k), pooled(head.k.abs())
    if head.mean is not None:
        keys, sizes = keys - head.mean, sizes + head.mean.abs()
    bias = tokens.double().log()  # -inf for rows without a token
    logits = q @ keys.to(dtype).double().T
    # A mean next to the middle of two numbers of the type may become either.
    either = (keys + _MEAN_SLIPS * sizes).to(dtype).double() - (keys - _MEAN_SLIPS * sizes).to(dtype).double()
    slips = q.abs() @ either.T
    if head.fine_k is not None:
        is_fine = torch.zeros(total + 1, dtype=torch.bool, device=row.device).index_fill_(0, row[factor == 1], True)
        logits = torch.where(is_fine[:total], fine_q @ pooled(head.fine_k).double().T, logits)
        slips = torch.where(is_fine[:total], 0.0, slips)
    logits = logits * call.scale + bias
    # Weighted values are added up in float32 before they are divided by the sum of the weights.
    room = torch.finfo(torch.float32).max / (_LARGEST_WEIGHT * (len(head.k) + total))
    norms, says = F.pad(sizes.double().norm(dim=1), (0, 1)), (head.v.abs().double() < room).all()
    if head.extra_k is not None and head.extra_v is not None:
        logits = torch.cat([logits, q @ head.extra_k.double().T * call.scale], 1)
        values = torch.cat([values, head.extra_v.double()])
        slips = F.pad(slips, (0, len(head.extra_k)))
        norms = torch.cat([norms, head.extra_k.double().norm(dim=1)])
        says &= (head.extra_v.abs().double() < room).all()
    weights = torch.softmax(logits, 1)
    expected = weights @ values
    slip = (_SLIPS if head.fine_k is None else _INT8_SLIPS) * q.norm(dim=1, keepdim=True) * norms.amax()
    slips = abs(call.scale) * (slips + slip)
    says = says & (slips <= _MOST_SLIP).all(1, keepdim=True)
    # A weight errs by the error of its logit, and moves the output by how far its value is from it.
    varies = (weights @ values.square() - expected.square()).clamp_min(0)
    moved = ((weights * slips.square()).sum(1, keepdim=True) * varies).sqrt()
    # Each weight is rounded on its own, so the errors add up like random steps.
    return expected, (weights.square() @ values.square()).sqrt(), torch.where(says, moved, math.inf)


def _queries(call: Call, head: _Head, rows: range) -> tuple[torch.Tensor, torch.Tensor]:
    """The queries at the places `rows` for pooled keys and for those of level 1: float64 [rows, D]."""
    block = rows.start // call.config.block_q * call.config.block_q
    place = torch.arange(block, min(block + call.config.block_q, len(head.q)), device=head.q.device)
    q = head.q[place if head.query_index is None else head.query_index[place]]
    some = slice(rows.start - block, rows.stop - block)
    if call.config.precision != "int8":
        return q[some].double(), q[some].double()
    fine = dequantise(*quantise(q[None, None], len(q)), len(q))[0, 0]
    return q[some].double(), fine[some].double()


def _share(got: torch.Tensor, expected: torch.Tensor, spread: torch.Tensor, slips: torch.Tensor) -> torch.Tensor:
    """The error of rows [R, D] as a share of what is allowed, a scalar on the device; -1 if no row says anything."""
    limits = torch.finfo(got.dtype)
    says = ((expected.abs() < limits.max / 2) & slips.isfinite()).all(1, keepdim=True)
    got, expected, spread, slips = (torch.where(says, x.double(), 0.0) for x in (got, expected, spread, slips))
    unit = _UNIT.get(got.dtype, _SHORTEST_UNIT)
    rounding = unit * (spread.square() + expected.square()).sum().sqrt()
    # GPUs may take numbers for 0 that are subnormal in float32.
    least = max(limits.smallest_normal * limits.eps, torch.finfo(torch.float32).tiny) * expected.numel() ** 0.5
    allowed = _MARGIN * (_ROUNDINGS * rounding + _OF_OUTPUT * expected.norm() + least + slips.norm())
    share = torch.nan_to_num((got - expected).norm() / allowed, math.inf, math.inf)
    return torch.where(says.any(), share, -1.0)
