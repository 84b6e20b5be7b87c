"""Levels in Triton: the kernel for `levels.choose_levels` and `levels.group_by_level`, without a sort.

A program holds one row of importance. Non-negative floats sort like their bits, so the cut of a level is found bit by
bit: the count (topk) or the sum (threshold, budget) on one side of a trial value decides whether the bit stays.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..config import PyramidConfig
from ..levels import FLOOR, BlockLists, SharedHeads, budget_scale, depth_cuts, remaining_mass, topk_ends
from .tiles import power_of_two

_TOPK, _MASS = 0, 1
# Rows of importance, per batch entry, from which budget mode learns the scale of its cuts.
_BUDGET_ROWS = 1024


@triton.jit
def _by_count(keys, wanted):
    """Mask of the `wanted` largest keys, ties broken by lower index; keys are non-negative, padding is -1."""
    cut, count, bit = tl.full([], 0, tl.int32), tl.full([], -1, tl.int32), tl.full([], 1 << 30, tl.int32)
    while (bit > 0) & (count != wanted):  # once the count is met exactly, no further bit matters
        trial_count = tl.sum((keys >= (cut | bit)).to(tl.int32), 0)
        stays = trial_count >= wanted
        cut = tl.where(stays, cut | bit, cut)
        count = tl.where(stays, trial_count, count)
        bit >>= 1
    above = keys > cut
    equal = keys == cut
    room = wanted - tl.sum(above.to(tl.int32), 0)
    return above | (equal & (tl.cumsum(equal.to(tl.int32), 0) <= room))


@triton.jit
def _by_mass(keys, weights, least, FLOORED: tl.constexpr):
    """Mask of the keys, counted from the largest down, after which at least `least` of the weight remains."""
    cut = 0
    for step in range(31):
        trial = cut | (1 << (30 - step))
        cut = tl.where(tl.sum(tl.where(keys < trial, weights, 0.0), 0) < least, trial, cut)
    above = keys > cut
    equal = keys == cut
    count = tl.sum(equal.to(tl.int32), 0)
    below = tl.sum(tl.where(keys < cut, weights, 0.0), 0)
    one = tl.sum(tl.where(equal, weights, 0.0), 0) / tl.maximum(count, 1).to(tl.float32)
    after = below + (count - tl.cumsum(equal.to(tl.int32), 0)).to(tl.float32) * one
    if FLOORED:
        after = tl.where(after > 0, after, one)  # the last block counts as if it were left itself
    return tl.where(least <= 0, keys >= 0, above | (equal & (after >= least)))


@triton.jit(do_not_specialize=["heads", "n_q", "n_k", "length_k"])
def _choose(
    scores_ptr, cap_ptr, scale_ptr, blocks_ptr, ends_ptr, density_ptr, unranked_ptr, best_ptr,
    heads, n_q, n_k, length_k, cuts,
    FACTORS: tl.constexpr, LEVELS: tl.constexpr, STORED: tl.constexpr, STORED_LEVELS: tl.constexpr,
    DROPPED: tl.constexpr, RULE: tl.constexpr, SCALED: tl.constexpr, FLOOR: tl.constexpr, CAPPED: tl.constexpr,
    BLOCK_KV: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Row `program_id(0)` of [B * H * n_q]. `cuts`: floats; ends of ranks in topk, depths -ln(1 - tau) otherwise."""
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, WIDTH)
    exists = lanes < n_k
    scores = tl.load(scores_ptr + row * n_k + lanes, mask=exists, other=0.0)
    finite = tl.abs(scores) < float("inf")
    scores = tl.where(finite, scores, 0.0)
    # The bits of every score are raised by one, so that scores that are not finite (0) rank after all others.
    keys = tl.where(exists, tl.where(finite, scores.to(tl.int32, bitcast=True) + 1, 0), -1)
    tl.store(unranked_ptr + row, tl.sum((exists & ~finite).to(tl.int32), 0))
    largest = tl.max(keys, 0)
    first = tl.min(tl.where(keys == largest, lanes, WIDTH), 0)
    tl.store(best_ptr + row, first)
    if RULE == 1:
        total = tl.maximum(tl.sum(scores, 0), 1.1754944e-38)
        weights = tl.where(exists, (scores / total + FLOOR / n_k) / (1.0 + FLOOR), 0.0)
        scale = tl.full([], 1.0, tl.float32)
        if SCALED:
            scale = tl.load(scale_ptr + row // n_q // heads)

    factors = tl.full([WIDTH], 0, tl.int32)
    for step in tl.static_range(LEVELS):  # coarsest first: a finer level takes precedence
        if RULE == 0:
            taken = _by_count(keys, cuts[LEVELS - 1 - step])
        else:
            # The small slack keeps a block whose cumulative importance equals the bound despite rounding.
            least = tl.exp(-cuts[LEVELS - 1 - step] * scale * (1.0 + 1e-6)) - 1e-37
            taken = _by_mass(keys, weights, least, FLOOR > 0)
        factors = tl.where(taken, FACTORS[LEVELS - 1 - step], factors)
    factors = tl.where(lanes == first, FACTORS[0], factors)
    chosen = factors > 0
    if CAPPED:
        cap = tl.load(cap_ptr + row // n_q * n_k + lanes, mask=exists, other=1).to(tl.int32)
        factors = tl.where(chosen, tl.minimum(factors, cap), factors)
    factors = tl.where(exists, tl.where(chosen, factors, DROPPED), 0)

    tokens = tl.minimum(tl.maximum(length_k - lanes * BLOCK_KV, 0), BLOCK_KV).to(tl.float32)
    cost = tl.where(factors > 0, tokens / tl.maximum(factors, 1).to(tl.float32), 0.0)
    tl.store(density_ptr + row, tl.sum(cost, 0) / length_k)
    start = 0
    for level in tl.static_range(STORED_LEVELS):
        here = (factors == STORED[level]).to(tl.int32)
        place = start + tl.cumsum(here, 0) - 1
        tl.store(blocks_ptr + row * n_k + place, lanes, mask=here > 0)
        start += tl.sum(here, 0)
        tl.store(ends_ptr + row * STORED_LEVELS + level, start)


def learned_scale(
    scores: torch.Tensor, config: PyramidConfig, cap: torch.Tensor | None, shared: SharedHeads | None = None
) -> torch.Tensor:
    """The factor [B, 1, 1, 1] of all cuts in budget mode, for scores float32 [B, H, n_q, n_k], contiguous.

    It is learnt from some of the rows, evenly spread over every head, here and elsewhere. So heads that several
    processes share have the rows that they would have in one.
    """
    batch, heads, n_q, n_k = scores.shape
    before, all_heads = (0, heads) if shared is None else (shared.first, shared.heads)
    step = max(1, all_heads * n_q // _BUDGET_ROWS)
    start = -before * n_q % step
    part = scores.view(batch, 1, heads * n_q, n_k)[:, :, start::step]
    left, ranked = remaining_mass(part, floor=FLOOR)
    part_cap = None
    if cap is not None:
        rows = torch.arange(start, heads * n_q, step, device=scores.device) // n_q
        part_cap = cap[:, rows][:, None].gather(-1, ranked)
    return budget_scale(-left.log(), depth_cuts(config), config, part_cap, shared)


def choose_lists_triton(
    scores: torch.Tensor,
    config: PyramidConfig,
    cap: torch.Tensor | None,
    length_k: int,
    shared: SharedHeads | None = None,
) -> BlockLists:
    """As `levels.group_by_level` of `levels.choose_levels`. Scores float32 [B, H, n_q, n_k], contiguous."""
    batch, heads, n_q, n_k = scores.shape
    stored = config.stored_factors
    scale = learned_scale(scores, config, cap, shared) if config.mode == "budget" else None
    if config.mode == "topk":
        cuts, rule = tuple(float(end) for end in topk_ends(n_k, config)), _TOPK
    else:
        cuts, rule = depth_cuts(config), _MASS
    blocks = torch.empty(batch, heads, n_q, n_k, dtype=torch.int32, device=scores.device)
    ends = torch.empty(batch, heads, n_q, len(stored), dtype=torch.int32, device=scores.device)
    density = torch.empty(batch, heads, n_q, dtype=torch.float32, device=scores.device)
    unranked, best = (torch.empty_like(density, dtype=torch.int32) for _ in range(2))
    width = max(32, power_of_two(n_k))
    _choose[(batch * heads * n_q,)](
        scores, scores if cap is None else cap.contiguous(), scores if scale is None else scale, blocks, ends, density,
        unranked, best, heads, n_q, n_k, length_k, cuts,
        FACTORS=config.factors, LEVELS=len(cuts), STORED=stored, STORED_LEVELS=len(stored),
        DROPPED=config.dropped_factor, RULE=rule, SCALED=scale is not None,
        FLOOR=FLOOR if config.mode == "budget" else 0.0, CAPPED=cap is not None, BLOCK_KV=config.block_kv, WIDTH=width,
        num_warps=max(1, min(8, width // 1024)),
    )  # fmt: skip
    return BlockLists(blocks, ends, stored, density, unranked, best)
