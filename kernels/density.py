"""Density, sparsity and coverage: the numbers a user sees, defined here and nowhere else.

All are computed from a map of pooling factors (0 = dropped) over (query block, key block) pairs, as in the paper's
cost model (arXiv 2512.04025, section 3.4): a pair at pooling factor f costs 1/f of its full-resolution FLOPs.
Text and reference tokens are not counted: they are outside the blocks and stay at full resolution.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch


def block_tokens(length: int, block: int, device: torch.device | str | None = None) -> torch.Tensor:
    """Tokens in each block of a sequence of `length` tokens cut into blocks of `block`: int64 [n_blocks]."""
    starts = torch.arange(0, length, block, device=device)
    return (length - starts).clamp_max(block)


def pair_cost(factors: torch.Tensor) -> torch.Tensor:
    """Cost of each pair relative to full resolution: 1/f, and 0 where f is 0. Float32, shape of `factors`."""
    return torch.where(factors > 0, 1.0 / factors.clamp_min(1).float(), 0.0)


def row_density(factors: torch.Tensor, key_tokens: torch.Tensor | None = None) -> torch.Tensor:
    """Mean cost of the pairs of each query block: float32 [..., n_q].

    Args:
        factors: pooling factors [..., n_q, n_k].
        key_tokens: tokens of each key block [n_k]; a partly filled block then counts for the tokens it holds.
    """
    cost = pair_cost(factors)
    if key_tokens is None:
        return cost.mean(-1)
    weight = key_tokens.to(cost) / key_tokens.sum()
    return (cost * weight).sum(-1)


def density(factors: torch.Tensor, key_tokens: torch.Tensor | None = None) -> torch.Tensor:
    """Mean cost of a pair, a scalar on the device of `factors`; reading it on the host waits for the device."""
    return row_density(factors, key_tokens).mean()


def sparsity(factors: torch.Tensor, key_tokens: torch.Tensor | None = None) -> torch.Tensor:
    """1 - density: the FLOP-equivalent sparsity that the slider sets and the paper reports."""
    return 1 - density(factors, key_tokens)


def coverage(factors: torch.Tensor) -> torch.Tensor:
    """Share of pairs that are seen at any level (paper: KV coverage), a scalar."""
    return (factors > 0).float().mean()


def level_shares(factors: Sequence[int], ends: Sequence[float]) -> dict[int, float]:
    """Pooling factor -> share of the pairs at it; `ends`: the shares up to the end of each level, finest first."""
    shares = dict.fromkeys(factors, 0.0)
    for factor, (start, end) in zip(factors, itertools.pairwise([0.0, *ends]), strict=True):
        shares[factor] += end - start
    return shares


def density_of(shares: dict[int, float]) -> float:
    """`density` of a map with these shares, 0 = dropped among them or left out."""
    return sum(share / factor for factor, share in shares.items() if factor)


def coverage_of(shares: dict[int, float]) -> float:
    """`coverage` of a map with these shares."""
    return sum(share for factor, share in shares.items() if factor)
