"""Levels from importance: which pooling factor each (query block, key block) pair gets.

Rules `topk` and `threshold` are the paper's (arXiv 2512.04025, section 3.3); `budget` is ours: the threshold rule with
its cuts scaled together until the mean density is the target. Ties are broken by block index, lower first.
"""

from __future__ import annotations

import math

import torch

from .config import ConfigError, PyramidConfig

# Spread over all blocks of a row in budget mode, so that blocks whose importance underflows still have an order and
# a place; far below any importance that matters.
_FLOOR = 1e-6
_BISECTIONS = 26


def choose_levels(scores: torch.Tensor, config: PyramidConfig, cap: torch.Tensor | None = None) -> torch.Tensor:
    """Pooling factors int16 [B, H, n_q, n_k] for importance `scores` [B, H, n_q, n_k]; 0 = dropped.

    Args:
        cap: coarsest factor per key block int16 [B, H, n_k] (`similarity_cap`). A chosen level is refined to it;
            blocks that no level takes stay dropped, or at the tail. In budget mode its cost is inside the budget.

    Raises:
        ConfigError: `sparsity` cannot be met with this number of key blocks.
    """
    if config.mode == "topk":
        ranked = scores.argsort(dim=-1, descending=True, stable=True)
        by_rank = torch.tensor(topk_table(scores.shape[-1], config), dtype=torch.int16, device=scores.device)
        factors = torch.empty_like(scores, dtype=torch.int16).scatter_(-1, ranked, by_rank.expand_as(ranked))
        return _refine(factors, config, cap)

    remaining, ranked = remaining_mass(scores, floor=_FLOOR if config.mode == "budget" else 0.0)
    depth = -remaining.log()  # 0 for the first block, growing; a cut tau is the depth -ln(1 - tau)
    cuts = [-math.log(max(1 - bound, 1e-12)) for bound in config.bounds]
    cap_ranked = None if cap is None else cap[:, :, None].expand(*scores.shape).gather(-1, ranked)
    if config.mode == "threshold":
        by_rank = _cut(depth, cuts, 1.0, config)
    else:
        by_rank = _cut(depth, cuts, budget_scale(depth, cuts, config, cap_ranked), config)
    by_rank = _refine_ranked(by_rank, config, cap_ranked)
    return torch.empty_like(by_rank).scatter_(-1, ranked, by_rank)


def remaining_mass(scores: torch.Tensor, floor: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Share of the row's importance that is left after each block, and the block at each rank.

    It is 1 - E of the paper (E: cumulative importance up to and with the block), summed from the small end so that it
    keeps its precision near zero. The first block counts as if nothing lay before it: it is always taken.
    """
    ranked_scores, ranked = scores.sort(dim=-1, descending=True, stable=True)
    share = ranked_scores / ranked_scores.sum(-1, keepdim=True).clamp_min(torch.finfo(scores.dtype).tiny)
    if floor:
        share = (share + floor / scores.shape[-1]) / (1 + floor)
    from_here = share.flip(-1).cumsum(-1).flip(-1)
    after = torch.cat([from_here[..., 1:], share[..., -1:] * (1.0 if floor else 0.0)], -1)
    after[..., 0] = 1.0
    return after, ranked


def budget_scale(
    depth: torch.Tensor, cuts: list[float], config: PyramidConfig, cap_ranked: torch.Tensor | None
) -> torch.Tensor:
    """Factor [B, 1, 1, 1] of the cuts at which the mean density of each batch entry is 1 - sparsity.

    Density grows with the factor, so it is bisected in log2; nothing is read back to the host.
    """
    target = 1 - config.sparsity
    low = depth.new_full((depth.shape[0], 1, 1, 1), -24.0)
    high = -low
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        factors = _refine_ranked(_cut(depth, cuts, middle.exp2(), config), config, cap_ranked)
        cost = torch.where(factors > 0, 1.0 / factors.clamp_min(1).float(), 0.0).mean((1, 2, 3), keepdim=True)
        low, high = torch.where(cost < target, middle, low), torch.where(cost < target, high, middle)
    return low.exp2()


def _cut(depth: torch.Tensor, cuts: list[float], scale: torch.Tensor | float, config: PyramidConfig) -> torch.Tensor:
    """Level of each ranked block: the first (finest) one whose scaled cut is not below the block's depth."""
    factors = torch.full_like(depth, config.dropped_factor, dtype=torch.int16)
    for factor, cut in reversed(list(zip(config.factors, cuts, strict=True))):
        # The small slack keeps a block whose cumulative importance equals the bound, in spite of rounding.
        factors = torch.where(depth <= cut * scale * (1 + 1e-6), factor, factors)
    return factors.to(torch.int16)


def _refine(factors: torch.Tensor, config: PyramidConfig, cap: torch.Tensor | None) -> torch.Tensor:
    return factors if cap is None else _refine_ranked(factors, config, cap[:, :, None].expand_as(factors))


def _refine_ranked(factors: torch.Tensor, config: PyramidConfig, cap: torch.Tensor | None) -> torch.Tensor:
    """Refine chosen levels to the cap; what no level took (0 or the tail) stays as it is."""
    if cap is None:
        return factors
    chosen = (factors > 0) & (factors <= config.factors[-1])
    return torch.where(chosen, torch.minimum(factors, cap), factors)


def topk_table(blocks: int, config: PyramidConfig) -> list[int]:
    """Pooling factor of each rank in topk mode, the same for every row.

    With `sparsity` given, the cumulative shares are multiplied by one number (and held at 1) so that the density meets
    it as closely as whole blocks allow. At least one block, the most important, is at the finest level.

    Raises:
        ConfigError: the sequence has too few blocks to come within 0.05 of the sparsity.
    """
    if config.sparsity is None:
        return _table(blocks, config, 1.0)
    target = 1 - config.sparsity

    def miss(scale: float) -> float:
        table = _table(blocks, config, scale)
        return sum(1 / factor for factor in table if factor) / blocks - target

    low, high = 0.0, 1 / config.bounds[0] + 1
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if miss(middle) < 0 else (low, middle)
    scale = min((low, high), key=lambda s: abs(miss(s)))
    if abs(miss(scale)) > 0.05:
        raise ConfigError("sparsity", config.sparsity, f"a value that {blocks} key blocks can meet; use more tokens")
    return _table(blocks, config, scale)


def _table(blocks: int, config: PyramidConfig, scale: float) -> list[int]:
    ends = [min(blocks, math.floor(bound * scale * blocks + 0.5)) for bound in config.bounds]
    ends[0] = max(1, ends[0])
    table, start = [], 0
    for factor, end in zip(config.factors, ends, strict=True):
        table += [factor] * (end - start)
        start = max(start, end)
    return table + [config.dropped_factor] * (blocks - start)


def group_by_level(factors: torch.Tensor, levels: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Block indices of every row grouped by level, and where each level's group ends.

    Returns:
        blocks int32 [B, H, n_q, n_k]: indices ascending inside a level, levels in the given order, dropped ones last.
        ends int32 [B, H, n_q, n_levels]: exclusive end of each level's group.
    """
    place = torch.full_like(factors, len(levels), dtype=torch.int8)
    for i, factor in enumerate(levels):
        place = torch.where(factors == factor, i, place).to(torch.int8)
    blocks = place.argsort(dim=-1, stable=True).to(torch.int32)
    counts = torch.stack([(place == i).sum(-1, dtype=torch.int32) for i in range(len(levels))], -1)
    return blocks, counts.cumsum(-1, dtype=torch.int32)
