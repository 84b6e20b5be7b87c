"""An independent oracle: the definitions of Pyramid Sparse Attention in float64 and plain loops.

Written from the paper (arXiv 2512.04025, sections 3.2-3.4); it never calls `kernels/`.
It is slow and simple on purpose: one head at a time, one block at a time.
"""

from __future__ import annotations

import math
from fractions import Fraction

import torch


def blocks_of(length: int, block: int) -> list[range]:
    """The token indices of every block; the last may be short."""
    return [range(start, min(start + block, length)) for start in range(0, length, block)]


def pooled_rows(x: torch.Tensor, factor: int, block: int) -> list[list[tuple[torch.Tensor, int]]]:
    """Per block of x [L, D] the pooled rows as (mean of the tokens that exist, their number); no padding rows."""
    x = x.double()
    result = []
    for tokens in blocks_of(len(x), block):
        rows = []
        for start in range(tokens.start, tokens.stop, factor):
            members = [x[t] for t in range(start, min(start + factor, tokens.stop))]
            rows.append((sum(members) / len(members), len(members)))
        result.append(rows)
    return result


def attend(q, k, v, factors, block_q, block_kv, scale, extra_k=None, extra_v=None) -> torch.Tensor:
    """Attention of one head: q [Lq, D], k and v [Lk, D], factors [n_q][n_k] (0 = dropped), float64 [Lq, D]."""
    q, v = q.double(), v.double()
    levels = sorted({int(f) for row in factors for f in row if f})
    keys = {f: pooled_rows(k, f, block_kv) for f in levels}
    values = {f: pooled_rows(v, f, block_kv) for f in levels}
    out = torch.zeros(len(q), v.shape[1], dtype=torch.float64)
    for i, queries in enumerate(blocks_of(len(q), block_q)):
        row_keys, row_values, bias = [], [], []
        for j, factor in enumerate(int(f) for f in factors[i]):
            if factor:
                for (key, count), (value, _) in zip(keys[factor][j], values[factor][j], strict=True):
                    row_keys.append(key)
                    row_values.append(value)
                    bias.append(math.log(count))
        if extra_k is not None:
            for key, value in zip(extra_k.double(), extra_v.double(), strict=True):
                row_keys.append(key)
                row_values.append(value)
                bias.append(0.0)
        row_keys, row_values = torch.stack(row_keys), torch.stack(row_values)
        for t in queries:
            logits = row_keys @ q[t] * scale + torch.tensor(bias, dtype=torch.float64)
            weights = torch.exp(logits - logits.max())
            out[t] = weights @ row_values / weights.sum()
    return out


def attend_all(q, k, v, factors, block_q, block_kv, scale, extra_k=None, extra_v=None) -> torch.Tensor:
    """`attend` for every head of every batch entry: [B, H, L, D] in, float64 [B, H, Lq, D] out."""
    batch, heads = q.shape[:2]
    out = torch.zeros(q.shape, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            extra = (None, None) if extra_k is None else (extra_k[b, h], extra_v[b, h])
            out[b, h] = attend(
                q[b, h], k[b, h], v[b, h], factors[b, h].tolist(), block_q, block_kv, scale, extra[0], extra[1]
            )
    return out


def dense(q, k, v, scale) -> torch.Tensor:
    """Ordinary softmax attention, [B, H, L, D], in float64."""
    logits = q.double() @ k.double().transpose(-1, -2) * scale
    weights = torch.exp(logits - logits.amax(-1, keepdim=True))
    return weights @ v.double() / weights.sum(-1, keepdim=True)


def means_importance(q, k, block_q, block_kv, scale) -> torch.Tensor:
    """One head: softmax over key blocks of mean query . mean key * scale + ln(tokens): float64 [n_q, n_k]."""
    mean_q = [rows[0][0] for rows in pooled_rows(q, block_q, block_q)]
    mean_k = [rows[0] for rows in pooled_rows(k, block_kv, block_kv)]
    result = []
    for query in mean_q:
        logits = [float(query @ key) * scale + math.log(count) for key, count in mean_k]
        top = max(logits)
        weights = [math.exp(x - top) for x in logits]
        result.append([w / math.fsum(weights) for w in weights])
    return torch.tensor(result, dtype=torch.float64)


def exact_importance(q, k, block_q, block_kv, scale, reduction="max") -> torch.Tensor:
    """One head: max (or mean) of the full softmax map over every pair of blocks: float64 [n_q, n_k]."""
    logits = q.double() @ k.double().T * scale
    weights = torch.exp(logits - logits.amax(-1, keepdim=True))
    weights = weights / weights.sum(-1, keepdim=True)
    result = []
    for queries in blocks_of(len(q), block_q):
        row = []
        for keys in blocks_of(len(k), block_kv):
            part = weights[queries.start : queries.stop, keys.start : keys.stop]
            row.append(float(part.max() if reduction == "max" else part.mean()))
        result.append(row)
    return torch.tensor(result, dtype=torch.float64)


def by_importance(scores: list[float]) -> list[int]:
    """Block indices from the most to the least important, the lower index first among equals."""
    return sorted(range(len(scores)), key=lambda j: (-scores[j], j))


def threshold_levels(scores: list[float], shares: dict[int, float], dropped: int, slack: float = 0.0) -> list[int]:
    """Level of a block: the finest whose cumulative share is not below its cumulative importance E (inclusive).

    The most important block is always kept at the finest level. `slack` is added to every bound.
    """
    total = math.fsum(scores)
    factors = [dropped] * len(scores)
    ranked = by_importance(scores)
    for rank, j in enumerate(ranked):
        cumulative = math.fsum(scores[i] for i in ranked[: rank + 1]) / total if total else 1.0
        bound = 0.0
        for factor in sorted(shares):
            bound += shares[factor]
            if cumulative <= bound + slack:
                factors[j] = factor
                break
    factors[ranked[0]] = min(shares)
    return factors


def topk_levels(scores: list[float], shares: dict[int, str], dropped: int) -> list[int]:
    """Level by rank; each cumulative share of the blocks is rounded half up; shares are decimal strings."""
    factors = [dropped] * len(scores)
    ranked = by_importance(scores)
    start, bound = 0, Fraction(0)
    for factor in sorted(shares):
        bound += Fraction(shares[factor])
        end = math.floor(bound * len(scores) + Fraction(1, 2))
        for j in ranked[start:end]:
            factors[j] = factor
        start = max(start, end)
    factors[ranked[0]] = min(shares)
    return factors


def similarity_caps(k: torch.Tensor, thresholds: dict[int, float], block_kv: int) -> list[int]:
    """Coarsest factor per key block of one head: mean cosine of tokens 0 and f-1 of each group of f that exists."""
    k = k.double()
    result = []
    for tokens in blocks_of(len(k), block_kv):
        cap = 1
        for factor in sorted(thresholds):
            pairs = [(t, t + factor - 1) for t in range(tokens.start, tokens.stop, factor)]
            cosines = [
                float(k[a] @ k[b]) / (float(k[a].norm()) * float(k[b].norm())) for a, b in pairs if b < tokens.stop
            ]
            mean = math.fsum(cosines) / len(cosines) if cosines else 0.0
            if not mean > thresholds[factor]:
                break
            cap = factor
        result.append(cap)
    return result


def density(factors: list[list[int]], tokens: list[int] | None = None) -> float:
    """Mean of 1/f over the pairs, 0 where f is 0; `tokens` weighs the key blocks."""
    weights = tokens or [1] * len(factors[0])
    costs = [sum(w / f if f else 0.0 for f, w in zip(row, weights, strict=True)) / sum(weights) for row in factors]
    return math.fsum(costs) / len(costs)
