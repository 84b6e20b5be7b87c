"""Levels from importance: which pooling factor each (query block, key block) pair gets.

The rules `topk` and `threshold` are the paper's (arXiv 2512.04025, section 3.3). `budget` is ours: the threshold rule
with all cuts scaled by one factor until the mean density is the target. In a tie the lower block index comes first.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

from .config import ConfigError, PyramidConfig
from .density import row_density

# Spread over all blocks of a row in budget mode, so that blocks whose importance underflows still have an order and
# a depth; far below any importance that matters.
FLOOR = 1e-6
# The histogram of depths in budget mode: log2(depth) from -_LOG_RANGE to _LOG_RANGE.
_LOG_RANGE = 24.0
_BINS = 8192


@dataclasses.dataclass(frozen=True)
class BlockLists:
    """The levels of all pairs as lists that a kernel walks.

    Attributes:
        blocks: int32 [B, H, n_q, n_k], the key blocks of every row grouped by level, ascending within a level; entries
            after the last group are undefined. `packed` lists are int16 and end with the longest row.
        ends: int32 [B, H, n_q, n_levels], exclusive end of each level's group.
        levels: pooling factor of each group, finest first.
        density: float32 [B, H, n_q], see `density.py`.
        unranked: int32 [B, H, n_q], number of blocks per row whose score was not finite; None if no scores were given.
        best: int32 [B, H, n_q], the most important block of every row; None if no scores were given.
        key_blocks: n_k if `blocks` is packed, otherwise None.
    """

    blocks: torch.Tensor
    ends: torch.Tensor
    levels: tuple[int, ...]
    density: torch.Tensor
    unranked: torch.Tensor | None = None
    best: torch.Tensor | None = None
    key_blocks: int | None = None

    @functools.cached_property
    def mean_density(self) -> torch.Tensor:
        """Mean of `density`, a scalar on the device; computed once, since lists may be kept for many calls."""
        return self.density.mean()

    @functools.cached_property
    def mean_ends(self) -> torch.Tensor:
        """Share of the key blocks up to the end of each level, mean over all rows: float32 [n_levels]."""
        return self.ends.mean((0, 1, 2), dtype=torch.float32) / self.shape[-1]

    @property
    def shape(self) -> tuple[int, ...]:
        """(B, H, n_q, n_k) of the map that the lists were made from."""
        return (*self.blocks.shape[:-1], self.key_blocks or self.blocks.shape[-1])

    def __getitem__(self, part: tuple) -> BlockLists:
        """The lists of a part of the batch and the heads."""
        unranked, best = (None if rows is None else rows[part] for rows in (self.unranked, self.best))
        blocks, density = self.blocks[part], self.density[part]
        return BlockLists(blocks, self.ends[part], self.levels, density, unranked, best, self.key_blocks)

    def packed(self, longest: int | None = None) -> BlockLists:
        """The same lists in the least memory, to be kept for later steps.

        They say nothing about scores that were not finite: those were counted when the levels were chosen.

        Args:
            longest: no row has more blocks; None reads it from the device, which waits for it.
        """
        if longest is None:
            longest = int(self.ends[..., -1].max())
        longest = max(1, longest)
        dtype = torch.int16 if self.shape[-1] <= torch.iinfo(torch.int16).max else torch.int32
        # `blocks` may be undefined after the last group, so it must not be read there as a number that does not fit.
        blocks = self.blocks[..., :longest].to(dtype).contiguous()
        return dataclasses.replace(self, blocks=blocks, unranked=None, key_blocks=self.shape[-1])

    def of_head(self, batch: int, head: int) -> BlockLists:
        """The lists of one head: the tensors above without their first two dimensions."""
        return self[batch, head]

    def factors(self) -> torch.Tensor:
        """The map that the lists were made from: int16 [B, H, n_q, n_k], 0 = dropped.

        Nothing is copied from the host, which would wait for the device in the middle of a model call.
        """
        place = torch.arange(self.blocks.shape[-1], device=self.blocks.device)
        group = (place >= self.ends[..., None]).sum(-2)  # [B, H, n_q, listed], number of levels that end before
        value = torch.zeros_like(group, dtype=torch.int16)
        for number, level in enumerate(self.levels):
            value.masked_fill_(group == number, level)
        # One extra column collects the blocks that are not listed.
        index = torch.where(group < len(self.levels), self.blocks.long(), self.shape[-1])
        result = value.new_zeros(*self.shape[:-1], self.shape[-1] + 1)
        return result.scatter_(-1, index, value)[..., :-1]


@dataclasses.dataclass(frozen=True)
class SharedHeads:
    """The place of a call's heads among those that several processes compute at the same time. They share one budget.

    Attributes:
        first: number of the first head here. heads: how many there are in all processes.
        add: add(entry, counts) sums the counts of a batch entry over all processes; every process asks for it.
        entry: number of the call's first batch entry.
    """

    first: int
    heads: int
    add: Callable[[int, torch.Tensor], torch.Tensor]
    entry: int = 0


def choose_levels(
    scores: torch.Tensor,
    config: PyramidConfig,
    cap: torch.Tensor | None = None,
    shared: SharedHeads | None = None,
) -> torch.Tensor:
    """Pooling factors int16 [B, H, n_q, n_k] for importance `scores` [B, H, n_q, n_k]; 0 = dropped.

    A score that is not finite has no weight and ranks after all others.

    Args:
        cap: coarsest factor per key block int16 [B, H, n_k] (`similarity_cap`). A chosen level is refined to it;
            blocks that no level takes stay dropped, or at the tail. In budget mode the budget includes its cost.
        shared: in budget mode, the heads elsewhere that share the budget.

    Raises:
        ConfigError: in topk mode, `sparsity` cannot be met with this number of key blocks. Budget mode gets as close
            as it can: every row keeps one block in full.
    """
    scores = torch.where(scores.isfinite(), scores, -1.0)
    if config.mode == "topk":
        ranked = scores.argsort(dim=-1, descending=True, stable=True)
        by_rank = torch.zeros(scores.shape[-1], dtype=torch.int16, device=scores.device)
        start = 0
        for factor, end in zip(config.factors, topk_ends(len(by_rank), config), strict=True):
            by_rank[start:end] = factor
            start = end
        return _place(by_rank.expand_as(ranked), ranked, config, _by_rank(cap, ranked))

    remaining, ranked = remaining_mass(scores, floor=FLOOR if config.mode == "budget" else 0.0)
    depth = -remaining.log()  # 0 for the first block, then rising; a cut tau is the depth -ln(1 - tau)
    cap_ranked = _by_rank(cap, ranked)
    cuts = depth_cuts(config)
    scale = budget_scale(depth, cuts, config, cap_ranked, shared) if config.mode == "budget" else 1.0
    return _place(_cut(depth, cuts, scale, config), ranked, config, cap_ranked)


def depth_cuts(config: PyramidConfig) -> tuple[float, ...]:
    """The bounds tau of threshold and budget mode as depths -ln(1 - tau)."""
    if config.mode == "budget":
        return tuple(-math.log(max(1 - bound, 1e-12)) for bound in config.bounds)
    # A bound of 1 takes every block, whatever rounding does to its cumulative importance.
    return tuple(math.inf if bound >= 1 - 1e-6 else -math.log(1 - bound) for bound in config.bounds)


def remaining_mass(scores: torch.Tensor, floor: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Share of the row's importance that is left after each block, and the block at each rank.

    It is 1 - E in the paper (E: cumulative importance up to and including the block), summed from the small end to
    keep precision near zero. The first block counts as if nothing came before it: it is always taken.
    """
    ranked_scores, ranked = torch.where(scores.isfinite(), scores, -1.0).sort(dim=-1, descending=True, stable=True)
    ranked_scores = ranked_scores.clamp_min(0)
    share = ranked_scores / ranked_scores.sum(-1, keepdim=True).clamp_min(torch.finfo(scores.dtype).tiny)
    if floor:
        share = (share + floor / scores.shape[-1]) / (1 + floor)
    from_here = share.flip(-1).cumsum(-1).flip(-1)
    after = torch.cat([from_here[..., 1:], share[..., -1:] * (1.0 if floor else 0.0)], -1)
    after[..., 0] = 1.0
    return after, ranked


def budget_scale(
    depth: torch.Tensor,
    cuts: tuple[float, ...],
    config: PyramidConfig,
    cap_ranked: torch.Tensor | None,
    shared: SharedHeads | None = None,
) -> torch.Tensor:
    """Factor [B, 1, 1, 1] of the cuts at which the mean density of each batch entry is 1 - sparsity.

    The density at a factor c follows from how many blocks lie within depth c * cut of every level. One histogram of
    log2(depth) gives that for all c at once, and nothing is read back to the host. With a cap: one histogram per cap.
    Histograms are whole numbers, so their sum over several processes is that of one process, to the last bit.
    """
    assert config.sparsity is not None  # the config has it in budget mode
    caps = [None] if cap_ranked is None else _caps(config)
    log_depth = depth.log2().clamp(-_LOG_RANGE, _LOG_RANGE)
    width = 2 * _LOG_RANGE / _BINS
    candidates = torch.linspace(-_LOG_RANGE, _LOG_RANGE, _BINS + 1, device=depth.device)
    dropped_cost = 1 / config.dropped_factor if config.dropped_factor else 0.0
    scales = []
    for b in range(depth.shape[0]):
        histograms = []
        for cap in caps:
            # Values outside the range are not counted: this is how the histogram of one cap leaves out the others.
            values = log_depth[b]
            if cap is not None and cap_ranked is not None:
                values = torch.where(cap_ranked[b] == cap, values, math.inf)
            histograms.append(torch.histc(values, _BINS, -_LOG_RANGE, _LOG_RANGE))
        counts = torch.stack(histograms)
        if shared is not None:
            counts = shared.add(shared.entry + b, counts)
        within_cap = counts.cumsum(1, dtype=torch.float64)
        within_cap /= within_cap[:, -1].sum()
        density = torch.full_like(candidates, dropped_cost)
        for cap, within in zip(caps, within_cap, strict=True):
            share_within = F.pad(within, (1, 0)).float()
            costs = [1 / (factor if cap is None else min(factor, cap)) for factor in config.factors]
            for cut, cost, next_cost in zip(cuts, costs, [*costs[1:], dropped_cost], strict=True):
                position = ((candidates + math.log2(cut) + _LOG_RANGE) / width).clamp(0, _BINS)
                below = position.floor().clamp_max(_BINS - 1).long()
                density += (cost - next_cost) * torch.lerp(
                    share_within[below], share_within[below + 1], position - below
                )
        after = (density < 1 - config.sparsity).sum().clamp(1, _BINS)
        low, high = density[after - 1], density[after]
        part = ((1 - config.sparsity - low) / (high - low).clamp_min(1e-9)).clamp(0, 1)
        scales.append(torch.lerp(candidates[after - 1], candidates[after], part).exp2())
    return torch.stack(scales).view(-1, 1, 1, 1)


def no_counts(config: PyramidConfig, device: torch.device) -> torch.Tensor:
    """What a process that chooses no levels adds to the counts of `SharedHeads`."""
    return torch.zeros(len(_caps(config)) if config.similarity_cap else 1, _BINS, device=device)


def _caps(config: PyramidConfig) -> list[int]:
    return sorted({1, *config.similarity_cap})


def _cut(
    depth: torch.Tensor, cuts: tuple[float, ...], scale: torch.Tensor | float, config: PyramidConfig
) -> torch.Tensor:
    """Level of each ranked block: the first (finest) one whose scaled cut is not below the block's depth; else 0."""
    factors = torch.zeros_like(depth, dtype=torch.int16)
    for factor, cut in reversed(list(zip(config.factors, cuts, strict=True))):
        # The small slack keeps a block whose cumulative importance equals the bound despite rounding.
        factors = torch.where(depth <= cut * scale * (1 + 1e-6), factor, factors)
    return factors.to(torch.int16)


def _by_rank(cap: torch.Tensor | None, ranked: torch.Tensor) -> torch.Tensor | None:
    return None if cap is None else cap[:, :, None].expand(*ranked.shape).gather(-1, ranked)


def _place(
    by_rank: torch.Tensor, ranked: torch.Tensor, config: PyramidConfig, cap_ranked: torch.Tensor | None
) -> torch.Tensor:
    """Factors by rank (0: no level took the block) -> factors by block: levels refined to the cap, the rest dropped."""
    taken = by_rank > 0
    if cap_ranked is not None:
        by_rank = torch.minimum(by_rank, cap_ranked)
    by_rank = torch.where(taken, by_rank, config.dropped_factor).to(torch.int16)
    return torch.empty_like(by_rank).scatter_(-1, ranked, by_rank)


def topk_ends(blocks: int, config: PyramidConfig) -> tuple[int, ...]:
    """Where the ranks of each level end in topk mode, the same for every row; no level takes later ranks.

    If `sparsity` is given, the cumulative shares are multiplied by one number (and capped at 1) so that the density
    meets it as closely as whole blocks allow. At least the most important block is at the finest level.

    Raises:
        ConfigError: the sequence has too few blocks to come within 0.05 of the sparsity.
    """
    ends, miss = _searched_ends(blocks, config.factors, config.bounds, config.dropped_factor, config.sparsity)
    if miss > 0.05:
        raise ConfigError("sparsity", config.sparsity, f"a value that {blocks} key blocks can meet; use more tokens")
    return ends


def can_meet(blocks: int, config: PyramidConfig) -> bool:
    """Whether a sequence of so many key blocks can have the sparsity, see `topk_ends`; other modes can have any."""
    try:
        return config.mode != "topk" or bool(topk_ends(blocks, config))
    except ConfigError:
        return False


def listed_blocks(blocks: int, config: PyramidConfig) -> int | None:
    """How many of a row's key blocks any level takes, if that is the same for every row; see `topk_ends` for errors."""
    if config.tail:
        return blocks
    return topk_ends(blocks, config)[-1] if config.mode == "topk" else None


@functools.lru_cache(maxsize=64)  # needed in every attention call
def _searched_ends(
    blocks: int, factors: tuple[int, ...], bounds: tuple[float, ...], dropped: int, sparsity: float | None
) -> tuple[tuple[int, ...], float]:
    """The ends, and how far the density misses 1 - sparsity."""
    if sparsity is None:
        return _scaled_ends(blocks, bounds, 1.0), 0.0
    costs = [*(1 / factor for factor in factors), 1 / dropped if dropped else 0.0]

    def miss(scale: float) -> float:
        ends = [0, *_scaled_ends(blocks, bounds, scale), blocks]
        counts = (end - start for start, end in itertools.pairwise(ends))
        return sum(cost * count for cost, count in zip(costs, counts, strict=True)) / blocks - (1 - sparsity)

    low, high = 0.0, 1 / bounds[0] + 1
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if miss(middle) < 0 else (low, middle)
    scale = min((low, high), key=lambda s: abs(miss(s)))
    return _scaled_ends(blocks, bounds, scale), abs(miss(scale))


def _scaled_ends(blocks: int, bounds: tuple[float, ...], scale: float) -> tuple[int, ...]:
    # Bounds ascend, so only the one block that the finest level always keeps can overtake the levels after it.
    return tuple(max(1, min(blocks, math.floor(bound * scale * blocks + 0.5))) for bound in bounds)


def group_by_level(
    factors: torch.Tensor, levels: tuple[int, ...], key_tokens: torch.Tensor | None = None
) -> BlockLists:
    """The map of pooling factors [B, H, n_q, n_k] as lists; `key_tokens` [n_k] as in `density.row_density`."""
    place = torch.full_like(factors, len(levels), dtype=torch.int8)
    for i, factor in enumerate(levels):
        place = torch.where(factors == factor, i, place).to(torch.int8)
    blocks = place.argsort(dim=-1, stable=True).to(torch.int32)
    counts = torch.stack([(place == i).sum(-1, dtype=torch.int32) for i in range(len(levels))], -1)
    return BlockLists(blocks, counts.cumsum(-1, dtype=torch.int32), levels, row_density(factors, key_tokens))
