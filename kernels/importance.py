"""Importance of every (query block, key block) pair: it only ranks blocks and never enters the output.

A few representative rows speak for every block. A softmax of the query rows over all key rows gives weights; the
largest (or mean) weight of a block pair is its importance (arXiv 2512.04025, section 3.3). The paper draws the
representatives at random (`sampled`). `pooled` takes means of 8 neighbouring tokens, which needs a quarter of the
scores. `means` takes one mean per block: with RoPE the phases of a whole block cancel out, which costs accuracy.
"""

from __future__ import annotations

import dataclasses
import math

import torch

from .config import Ranking
from .density import block_tokens
from .pyramid import pool

# How many scores are held at once, per head: 2^24 float32 are 64 MB.
_SCORES_AT_ONCE = 2**24
# Tokens per mean in `pooled` importance: 8 neighbours still share most of their RoPE phases.
POOLED = 8
# Tokens per mean in the sum that divides a row of `pooled` weights. The sum only balances the query rows of a block
# against each other, and a quarter of the rows does that nearly as well.
_SUMMED = 32
# Largest power of two of a weight. If the summed rows are coarser than the ranked ones, a weight can exceed 1 by any
# factor. That far above 1 no other block counts, and with this limit sums of weights stay finite in bfloat16.
CEILING = 64.0


@dataclasses.dataclass(frozen=True)
class Representatives:
    """Rows that speak for the blocks of a sequence.

    Attributes:
        rows: [B, H, blocks * padded, D], unit stride in D; rows that stand for no token never enter a score.
        length: tokens of the sequence; block: tokens per block.
        group: tokens per row; count: rows per block, the first of `padded`, a power of two.
    """

    rows: torch.Tensor
    length: int
    block: int
    group: int
    count: int

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return -(-self.length // self.block)

    @property
    def padded(self) -> int:
        """Rows that the storage holds for each block."""
        return 1 << (self.count - 1).bit_length()

    def tokens(self) -> torch.Tensor:
        """How many tokens each row stands for, 0 for none: int64 [blocks, padded]."""
        device = self.rows.device
        member = torch.arange(self.padded, device=device)
        held = (block_tokens(self.length, self.block, device)[:, None] - member * self.group).clamp(0, self.group)
        return torch.where(member < self.count, held, 0)


def importance(
    q: torch.Tensor, k: torch.Tensor, ranking: Ranking, scale: float, generator: torch.Generator | None = None
) -> torch.Tensor:
    """Importance as `ranking` asks for: float32 [B, H, n_q, n_k], non-negative.

    Args:
        q, k: [B, H, Lq, D] and [B, H, Lk, D], in block order.
        scale: factor of the logits; attention's default is 1/sqrt(D).
        generator: random source of `sampled`; by default one made from `ranking.seed`, so that calls are repeatable.
    """
    if ranking.importance == "sampled":
        generator = generator or default_generator(ranking, q.device)
        rows = sampled(q, ranking.block_q, ranking.sample_share, generator)
        columns = sampled(k, ranking.block_kv, ranking.sample_share, generator)
        return reduced_softmax(rows, columns, scale, ranking.reduction)
    queries = pooled(q, ranking.block_q, group_size(ranking, ranking.block_q))
    keys, *norm = (pooled(k, ranking.block_kv, group) for group in key_groups(ranking))
    return reduced_softmax(queries, keys, scale, ranking.reduction, *norm)


def group_size(ranking: Ranking, block: int) -> int:
    """Tokens per mean: 8 in `pooled` importance, the whole block in `means`."""
    return POOLED if ranking.importance == "pooled" else block


def key_groups(ranking: Ranking) -> tuple[int, ...]:
    """Tokens per mean of keys: for the ranked rows and, if they differ, for the summed rows."""
    group = group_size(ranking, ranking.block_kv)
    return (group, _SUMMED) if group < _SUMMED <= ranking.block_kv else (group,)


def default_generator(ranking: Ranking, device: torch.device) -> torch.Generator:
    """A fresh random source from `ranking.seed`, so that every call draws the same sample."""
    return torch.Generator(device=device).manual_seed(ranking.seed)


def pooled(x: torch.Tensor, block: int, group: int) -> Representatives:
    """Means of `group` neighbouring tokens of x [B, H, L, D]; in a short block the last mean is over what exists."""
    return Representatives(pool(x, group, block), x.shape[2], block, group, block // group)


def sampled(x: torch.Tensor, block: int, share: float, generator: torch.Generator) -> Representatives:
    """A random share of the tokens of every block of x [B, H, L, D], without repetition."""
    rows = sample_rows(x.shape[2], block, share, generator, x.device)
    return Representatives(x.index_select(2, rows.flatten()), x.shape[2], block, 1, sample_count(block, share))


def sample_count(block: int, share: float) -> int:
    """How many tokens are drawn from a whole block."""
    return max(1, round(block * share))


def sample_rows(
    length: int, block: int, share: float, generator: torch.Generator, device: torch.device
) -> torch.Tensor:
    """Which tokens are drawn: int64 [blocks, padded], existing tokens first."""
    tokens = block_tokens(length, block, device)
    count = sample_count(block, share)
    position = torch.arange(block, device=device)
    key = torch.rand(len(tokens), block, generator=generator, device=generator.device).to(device)
    key = torch.where(position < tokens[:, None], key, 2.0)  # tokens beyond the end come last
    picked = key.argsort(-1)[:, :count]
    picked = torch.nn.functional.pad(picked, (0, (1 << (count - 1).bit_length()) - count))
    rows = torch.arange(len(tokens), device=device)[:, None] * block + picked
    return rows.clamp_max(length - 1)


def reduced_softmax(
    q: Representatives, k: Representatives, scale: float, reduction: str, norm: Representatives | None = None
) -> torch.Tensor:
    """Softmax of every query row over all key rows, then max or mean over the rows of each block pair.

    A key row counts for the tokens it stands for: bias ln(tokens). norm: the key rows whose sum divides the weights,
    instead of k. Result float32 [B, H, n_q, n_k].
    """
    q_there, k_tokens = q.tokens() > 0, k.tokens()
    (n_q, m), (n_k, s) = q_there.shape, k_tokens.shape
    keys, bias = k.rows.float().transpose(-1, -2), _bias(k)
    if norm is not None:
        summed, summed_bias = norm.rows.float().transpose(-1, -2), _bias(norm)
    chunk = max(1, _SCORES_AT_ONCE // (n_k * s * m))
    result = []
    for start in range(0, n_q, chunk):
        there = q_there[start : start + chunk]
        queries = q.rows[:, :, start * m : (start + len(there)) * m].float()
        logits = queries @ keys * scale + bias
        total = torch.logsumexp(logits if norm is None else queries @ summed * scale + summed_bias, -1, keepdim=True)
        weights = torch.exp((logits - total).clamp_max(CEILING * math.log(2)))
        weights = weights.view(*weights.shape[:2], len(there), m, n_k, s)
        pair = (there[:, :, None, None] & (k_tokens > 0)).to(weights)
        if reduction == "max":
            result.append((weights * pair).amax((3, 5)))
        else:
            result.append((weights * pair).sum((3, 5)) / pair.sum((1, 3)).clamp_min(1))
    return torch.cat(result, 2)


def _bias(k: Representatives) -> torch.Tensor:
    """ln of the number of tokens that each key row stands for, -inf for none: float32 [blocks * padded]."""
    tokens = k.tokens().flatten()
    return torch.where(tokens > 0, tokens.clamp_min(1).float().log(), -math.inf)
