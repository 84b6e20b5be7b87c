"""Attention over a pyramid with a given map of pooling factors, in plain torch (arXiv 2512.04025, section 3.4).

`attend_reference` is the definition: a dozen lines that hold every logit at once. `attend_streaming` computes the same
thing one query block at a time. It reads only the rows that the block sees, so memory stays linear in the length.
"""

from __future__ import annotations

import itertools
import math

import torch

from .levels import group_by_level
from .pyramid import Pyramid


def attend_reference(
    q: torch.Tensor,
    pyramid: Pyramid,
    factors: torch.Tensor,
    block_q: int,
    scale: float,
    extra_k: torch.Tensor | None = None,
    extra_v: torch.Tensor | None = None,
) -> torch.Tensor:
    """softmax(q K_h^T * scale + ln(tokens of the row)) V_h over the rows of every pair's level: [B, H, Lq, D].

    Args:
        q: [B, H, Lq, D]; pyramid rows as in `Pyramid`; factors: [B, H, n_q, n_k] pooling factors, 0 = dropped.
        extra_k, extra_v: [B, H, E, D], tokens outside the blocks that every query sees in full.
    """
    work = torch.promote_types(q.dtype, torch.float32)
    q_rows = torch.arange(q.shape[2], device=q.device) // block_q
    logits, values = [], []
    for factor, keys in pyramid.keys.items():
        chosen = (factors == factor)[:, :, q_rows].repeat_interleave(pyramid.block_kv // factor, -1)
        bias = pyramid.tokens(factor).to(work).log()
        level = q.to(work) @ keys.to(work).transpose(-1, -2) * scale + bias[: keys.shape[2]]
        logits.append(level.masked_fill(~chosen[..., : keys.shape[2]], -math.inf))
        values.append(pyramid.values[factor].to(work))
    if extra_k is not None:
        assert extra_v is not None  # they come together
        logits.append(q.to(work) @ extra_k.to(work).transpose(-1, -2) * scale)
        values.append(extra_v.to(work))
    return (torch.softmax(torch.cat(logits, -1), -1) @ torch.cat(values, 2)).to(q.dtype)


def attend_streaming(
    q: torch.Tensor,
    pyramid: Pyramid,
    factors: torch.Tensor,
    block_q: int,
    scale: float,
    extra_k: torch.Tensor | None = None,
    extra_v: torch.Tensor | None = None,
) -> torch.Tensor:
    """The same as `attend_reference`, one query block of one head at a time."""
    work = torch.promote_types(q.dtype, torch.float32)
    levels = tuple(pyramid.keys)
    lists = group_by_level(factors, levels)
    blocks, ends = lists.blocks, lists.ends.tolist()
    rows_per_block = [pyramid.block_kv // factor for factor in levels]
    steps = [torch.arange(rows, device=q.device) for rows in rows_per_block]
    biases = [pyramid.tokens(factor).to(work).log() for factor in levels]
    extra = 0 if extra_k is None else extra_k.shape[2]
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    for b, h in itertools.product(range(q.shape[0]), range(q.shape[1])):
        keys = [pyramid.keys[factor][b, h] for factor in levels]
        values = [pyramid.values[factor][b, h] for factor in levels]
        for i, start in enumerate(range(0, q.shape[2], block_q)):
            row_ends, first = ends[b][h][i], 0
            some_keys, some_values, some_bias = [], [], []
            for level, end in enumerate(row_ends):
                if end > first:
                    chosen = blocks[b, h, i, first:end, None] * rows_per_block[level] + steps[level]
                    rows = chosen.flatten()
                    some_bias.append(biases[level][rows])
                    # The finest level has no padding: rows past the end read the last token and get no weight.
                    rows = rows.clamp_max(len(keys[level]) - 1)
                    some_keys.append(keys[level].index_select(0, rows))
                    some_values.append(values[level].index_select(0, rows))
                first = end
            if extra_k is not None and extra:
                assert extra_v is not None
                some_keys.append(extra_k[b, h])
                some_values.append(extra_v[b, h])
                some_bias.append(biases[0].new_zeros(extra))
            queries = q[b, h, start : start + block_q].to(work)
            logits = torch.addmm(torch.cat(some_bias), queries, torch.cat(some_keys).to(work).T, alpha=scale)
            out[b, h, start : start + block_q] = torch.softmax(logits, -1) @ torch.cat(some_values).to(work)
    return out
