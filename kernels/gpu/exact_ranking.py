"""The ranking of a few query blocks computed again in plain torch: what the kernels that choose levels must give.

Each stage starts from what the stage before it really gave, so that rounding does not add up: means of neighbouring
tokens, importance, levels. A wrong choice of levels loses what matters, and exact attention over the same levels
(`exact.py`) cannot show it.
"""

from __future__ import annotations

import dataclasses
import itertools
import math

import torch
import torch.nn.functional as F

from ..config import PyramidConfig
from ..density import block_tokens, row_density
from ..importance import Representatives, reduced_softmax
from ..levels import FLOOR, BlockLists, depth_cuts, remaining_mass, topk_ends
from ..order import TokenOrder
from ..pyramid import pool
from .exact import factors_of_rows
from .levels import learned_scale

BLOCKS = 4
"""How many query blocks of a head are ranked again."""

# Means are rounded once on either side; weights are added in bfloat16.
_MEANS_MAY_DIFFER, _SHORTEST_MAY_DIFFER = {torch.bfloat16: 2.0**-7}, 2.0**-10
_IMPORTANCE_MAY_DIFFER = 2.0**-6
# Sums of products in float32 err by no more than that much of the product of the norms.
_PRODUCTS_MAY_DIFFER = 2.0**-18
# Where that leaves a logit uncertain by more, its query block says nothing.
_MOST_SLIP = 0.5
# Depths are logarithms of sums in float32, and densities add up to 1 at most.
_DEPTH_MAY_DIFFER = 1e-3


@dataclasses.dataclass(frozen=True)
class Ranked:
    """A call's ranking: what it started from, and what each stage gave.

    Attributes:
        q, k: [B, H, L, D] in raster order. scale: factor of the logits.
        queries, keys, summed: the rows that speak for the blocks; means of tokens, unless they were drawn.
        scores: float32 [B, H, n_q, n_k]. capped: whether levels were refined to a cap; shared: whether heads elsewhere
            share the budget.
    """

    q: torch.Tensor
    k: torch.Tensor
    config: PyramidConfig
    query_order: TokenOrder
    key_order: TokenOrder
    scale: float
    queries: Representatives
    keys: Representatives
    summed: Representatives
    scores: torch.Tensor
    lists: BlockLists
    capped: bool
    shared: bool


def what_misranks(ranked: Ranked) -> str | None:
    """What is wrong with a ranking, as a part of a sentence; None if nothing is. Reads once from the device.

    Pairs whose exact importance is not finite say nothing, nor do query blocks with logits too large for float32, nor
    means of numbers whose sum may overflow. Where levels were refined to a cap, what they were chosen by
    is compared, and not the choice.
    """
    batch, heads, n_q, _ = ranked.scores.shape
    device, everyone = ranked.scores.device, ranked.queries
    places = sorted({i * (n_q - 1) // (BLOCKS - 1) for i in range(BLOCKS)})
    blocks = torch.tensor(places, device=device)
    rows = everyone.rows.unflatten(2, (-1, everyone.padded))[:, :, blocks].flatten(2, 3)
    length = sum(min(everyone.block, everyone.length - place * everyone.block) for place in places)
    queries = dataclasses.replace(everyone, rows=rows, length=length)  # only the last block can be short
    factors, broken = factors_of_rows(ranked.lists, blocks.expand(heads, -1))
    found, scales = [], _scales(ranked)
    for b in range(batch):
        least, most = scales[b]
        for h in range(heads):
            means, scores = _means_differ(ranked, b, h), _scores_differ(ranked, b, h, queries, blocks)
            levels = broken
            if not ranked.capped:
                wrong, low, high = _levels_differ(ranked, b, h, blocks, factors[b, h])
                # One scale of the cuts serves all heads of a batch entry.
                least, most = torch.maximum(least, low), torch.minimum(most, high)
                levels = broken | wrong | (least > most)
            found.append(torch.stack([means, scores, levels]))
    for place, wrong in enumerate(torch.stack(found).tolist()):
        for part in itertools.compress(("means", "scores", "levels"), wrong):
            return f"the {part} of head {place % heads} are wrong"
    return None


def _scales(ranked: Ranked) -> torch.Tensor:
    """The least and the largest factor of all cuts that levels of a batch entry may have been chosen with: [B, 2]."""
    scores, config = ranked.scores, ranked.config
    if config.mode == "threshold":
        return scores.new_ones(len(scores), 2)
    if config.mode == "topk" or ranked.capped or ranked.shared:
        return scores.new_tensor([0.0, math.inf]).expand(len(scores), 2)
    margin = scores.new_tensor([1 - _DEPTH_MAY_DIFFER, 1 + _DEPTH_MAY_DIFFER])
    return learned_scale(scores, config, None).view(-1, 1) * margin


def _means_differ(ranked: Ranked, b: int, h: int) -> torch.Tensor:
    """Whether means of tokens of a head are wrong."""
    wrong = ranked.scores.new_zeros((), dtype=torch.bool)
    if ranked.config.importance == "sampled":
        return wrong
    sides = (
        (ranked.q, ranked.query_order, ranked.queries),
        (ranked.k, ranked.key_order, ranked.keys),
        (ranked.k, ranked.key_order, ranked.summed),
    )
    for x, order, means in sides:
        exact = pool(order.of_head(b, h).apply(x[b : b + 1, h : h + 1]), means.group, means.block)[0, 0].float()
        # Sums in another order can only differ in what overflows where the sum of the sizes does, too.
        sizes = pool(order.of_head(b, h).apply(x[b : b + 1, h : h + 1].abs()), means.group, means.block)[0, 0].float()
        says = exact.isfinite() & (sizes < torch.finfo(torch.float32).max / (2 * means.group))
        got, exact = (torch.where(says, rows, 0.0) for rows in (means.rows[b, h].float(), exact))
        wrong |= ~((got - exact).norm() <= _MEANS_MAY_DIFFER.get(x.dtype, _SHORTEST_MAY_DIFFER) * exact.norm())
    return wrong


def _scores_differ(ranked: Ranked, b: int, h: int, queries: Representatives, blocks: torch.Tensor) -> torch.Tensor:
    """Whether the importance of some query blocks of a head is wrong; queries: what speaks for those blocks."""
    queries, keys, summed = (
        dataclasses.replace(means, rows=means.rows[b : b + 1, h : h + 1])
        for means in (queries, ranked.keys, ranked.summed)
    )
    exact = reduced_softmax(queries, keys, ranked.scale, ranked.config.reduction, summed)[0, 0]
    of_queries, of_keys = (means.rows[0, 0].double().norm(dim=-1).nan_to_num(0.0, 0.0) for means in (queries, keys))
    of_queries = of_queries.unflatten(0, (-1, queries.padded)).amax(-1, keepdim=True)  # [n, 1]
    slip = _PRODUCTS_MAY_DIFFER * abs(ranked.scale) * of_queries * of_keys.amax()
    says = exact.isfinite() & (slip <= _MOST_SLIP)
    off = (ranked.scores[b, h, blocks] - exact).abs() - 2 * torch.finfo(torch.float32).tiny
    return (says & ~(off <= exact * (_IMPORTANCE_MAY_DIFFER + slip))).any()


def _levels_differ(
    ranked: Ranked, b: int, h: int, blocks: torch.Tensor, factors: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Whether the levels [n, n_k] of some query blocks of a head do not follow from their scores, and between which
    scales of the cuts they do; topk has none."""
    config, lists = ranked.config, ranked.lists
    scores, device = ranked.scores[b, h, blocks], blocks.device
    after, order = remaining_mass(scores, floor=FLOOR if config.mode == "budget" else 0.0)
    names = torch.tensor([*config.factors, *({config.dropped_factor} - set(config.factors))], device=device)
    named = factors.gather(-1, order)[..., None] == names
    number = named.int().argmax(-1)  # of each block's level, by rank
    density = row_density(factors, block_tokens(ranked.k.shape[2], config.block_kv, device))
    wrong = [~named.any(-1).all(), (number.diff(dim=-1) < 0).any(), (number[:, 0] != 0).any()]
    wrong.append(((lists.density[b, h, blocks] - density).abs() > _DEPTH_MAY_DIFFER).any())
    if lists.best is not None:
        wrong.append((lists.best[b, h, blocks] != order[:, 0]).any())
    # Where the last level is also that of the blocks that no level takes, its end cannot be seen.
    levels = len(config.factors) - (config.dropped_factor in config.factors)
    low, high = scores.new_zeros(()), scores.new_full((), math.inf)
    if not levels:
        return torch.stack(wrong).any(), low, high
    taken = torch.stack([(number <= level).sum(-1) for level in range(levels)], -1)  # [n, levels]
    if config.mode == "topk":
        wrong.append((taken != torch.tensor(topk_ends(scores.shape[-1], config)[:levels], device=device)).any())
    else:
        says = (scores.isfinite().all(-1) & (scores.sum(-1) > 0))[:, None]
        depth = F.pad(-after.log(), (0, 1), value=math.inf)
        slack = _DEPTH_MAY_DIFFER * (1 + depth)
        cuts = torch.tensor(depth_cuts(config)[:levels], device=device)
        lows = (depth - slack).gather(-1, (taken - 1).clamp_min(0)) / cuts
        highs = (depth + slack).gather(-1, taken) / cuts
        low = torch.where(says, lows.nan_to_num(0.0), 0.0).amax()
        high = torch.where(says, highs.nan_to_num(math.inf, math.inf), math.inf).amin()
    return torch.stack(wrong).any(), low, high
