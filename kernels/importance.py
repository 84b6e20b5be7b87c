"""Importance of every (query block, key block) pair: it only ranks blocks and never enters the output.

`sampled` is the paper's estimator (arXiv 2512.04025, section 3.3): softmax of sampled queries over all sampled keys,
reduced by max (or mean) over the pair. `pooled` takes means of 8 neighbouring tokens in place of the sample, a quarter
of its scores; `means` one mean per block: with RoPE the phases of a whole block cancel, which costs accuracy.
"""

from __future__ import annotations

import math

import torch

from .config import PyramidConfig
from .density import block_tokens
from .pyramid import pool, row_tokens

# Sampled scores that are held at once, per head: 2^24 float32 are 64 MB.
_SCORES_AT_ONCE = 2**24
# Tokens of one mean in `pooled` importance: 8 neighbours still share most of their RoPE phases.
_POOLED = 8


def importance(
    q: torch.Tensor, k: torch.Tensor, config: PyramidConfig, scale: float, generator: torch.Generator | None = None
) -> torch.Tensor:
    """Importance as `config` asks for: float32 [B, H, n_q, n_k], non-negative.

    Args:
        q, k: [B, H, Lq, D] and [B, H, Lk, D], in block order.
        scale: factor of the logits, 1/sqrt(D) by default of attention.
        generator: random source of `sampled`; by default one made from `config.seed`, so that calls repeat.
    """
    if config.importance == "means":
        return means_importance(q, k, config.block_q, config.block_kv, scale)
    if config.importance == "pooled":
        return pooled_importance(q, k, config.block_q, config.block_kv, scale, config.reduction)
    if generator is None:
        generator = torch.Generator(device=q.device).manual_seed(config.seed)
    return sampled_importance(
        q, k, config.block_q, config.block_kv, scale, generator, config.sample_share, config.reduction
    )


def means_importance(q: torch.Tensor, k: torch.Tensor, block_q: int, block_kv: int, scale: float) -> torch.Tensor:
    """Softmax over key blocks of (mean query . mean key) * scale + ln(tokens of the block): rows sum to one."""
    mean_q = pool(q, block_q, block_q).float()
    mean_k = pool(k, block_kv, block_kv).float()
    bias = block_tokens(k.shape[2], block_kv, k.device).float().log()
    return torch.softmax(mean_q @ mean_k.transpose(-1, -2) * scale + bias, -1)


def sampled_importance(
    q: torch.Tensor,
    k: torch.Tensor,
    block_q: int,
    block_kv: int,
    scale: float,
    generator: torch.Generator,
    share: float = 0.25,
    reduction: str = "max",
) -> torch.Tensor:
    """Sampled scores: softmax of every sampled query over all sampled keys, then max or mean over the block pair."""
    q_rows, q_valid = _sample(q.shape[2], block_q, share, generator, q.device)
    k_rows, k_valid = _sample(k.shape[2], block_kv, share, generator, k.device)
    k_bias = torch.where(k_valid, 0.0, -math.inf)
    return _reduced_softmax(
        q[:, :, q_rows.flatten()], k[:, :, k_rows.flatten()], q_valid, k_valid, k_bias, scale, reduction
    )


def pooled_importance(
    q: torch.Tensor, k: torch.Tensor, block_q: int, block_kv: int, scale: float, reduction: str = "max"
) -> torch.Tensor:
    """As `sampled_importance`, with means of 8 neighbouring tokens as queries and keys; bias ln(tokens of the mean)."""
    q_tokens = row_tokens(q.shape[2], _POOLED, block_q, q.device).view(-1, block_q // _POOLED)
    k_tokens = row_tokens(k.shape[2], _POOLED, block_kv, k.device).view(-1, block_kv // _POOLED)
    return _reduced_softmax(
        pool(q, _POOLED, block_q),
        pool(k, _POOLED, block_kv),
        q_tokens > 0,
        k_tokens > 0,
        k_tokens.float().log(),
        scale,
        reduction,
    )


def _reduced_softmax(
    q: torch.Tensor,
    k: torch.Tensor,
    q_valid: torch.Tensor,
    k_valid: torch.Tensor,
    k_bias: torch.Tensor,
    scale: float,
    reduction: str,
) -> torch.Tensor:
    """Softmax of representatives q [B, H, n_q*m, D] over all k [B, H, n_k*s, D], reduced over each block pair.

    `q_valid` [n_q, m] and `k_valid` [n_k, s] mark representatives that exist, `k_bias` [n_k, s] is added to the logits.
    """
    (n_q, m), (n_k, s) = q_valid.shape, k_valid.shape
    keys = k.float().transpose(-1, -2)
    chunk = max(1, _SCORES_AT_ONCE // (k_valid.numel() * m))
    result = []
    for start in range(0, n_q, chunk):
        valid = q_valid[start : start + chunk]
        queries = q[:, :, start * m : (start + len(valid)) * m].float()
        scores = torch.softmax(queries @ keys * scale + k_bias.flatten(), -1)
        scores = scores.view(*scores.shape[:2], len(valid), m, n_k, s)
        pair = (valid[:, :, None, None] & k_valid).to(scores)
        if reduction == "max":
            result.append((scores * pair).amax((3, 5)))
        else:
            result.append((scores * pair).sum((3, 5)) / pair.sum((1, 3)).clamp_min(1))
    return torch.cat(result, 2)


def _sample(
    length: int, block: int, share: float, generator: torch.Generator, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Random tokens of every block without repetition: rows int64 [n, m], valid bool [n, m] (short last block)."""
    tokens = block_tokens(length, block, device)
    count = max(1, round(block * share))
    position = torch.arange(block, device=device)
    key = torch.rand(len(tokens), block, generator=generator, device=generator.device).to(device)
    key = torch.where(position < tokens[:, None], key, 2.0)  # tokens beyond the end come last
    picked = key.argsort(-1)[:, :count]
    valid = picked < tokens[:, None]
    rows = torch.arange(len(tokens), device=device)[:, None] * block + picked
    return rows.clamp_max(length - 1), valid


def similarity_cap(k: torch.Tensor, thresholds: dict[int, float], block_kv: int) -> torch.Tensor:
    """Coarsest pooling factor that each key block may take (paper 3.3): int16 [B, H, n_k].

    For factor f it is the mean cosine similarity of the tokens 0 and f-1 of every group of f in the block. A block may
    be pooled to the largest f up to which every threshold is passed, else it stays at full resolution.
    """
    batch, heads, length, dim = k.shape
    blocks = len(block_tokens(length, block_kv))
    cap = torch.ones(batch, heads, blocks, dtype=torch.int16, device=k.device)
    allowed = torch.ones_like(cap, dtype=torch.bool)
    unit = torch.nn.functional.normalize(k.float(), dim=-1)
    unit = torch.nn.functional.pad(unit, (0, 0, 0, -length % block_kv)).view(batch, heads, blocks, block_kv, dim)
    exists = (torch.arange(blocks * block_kv, device=k.device) < length).view(blocks, block_kv)
    for factor in sorted(thresholds):
        first, last = unit[:, :, :, ::factor], unit[:, :, :, factor - 1 :: factor]
        pairs = exists[:, factor - 1 :: factor].float()  # the later token of the pair decides
        similarity = ((first * last).sum(-1) * pairs).sum(-1) / pairs.sum(-1).clamp_min(1)
        allowed &= similarity > thresholds[factor]
        cap = torch.where(allowed, factor, cap).to(torch.int16)
    return cap
