"""Ways to rank blocks that the kernels do not support, tried here in plain torch before building any of them.

A way is `{"q": KIND, "k": KIND, "reduction": "mean" or "max", "second_order": bool}`. Kinds: `pooled n` (means of n
neighbours), `sampled n` (one token in n, drawn from the whole block), `spread n` (one drawn from every n neighbours)
and `strided n` (the middle one of every n neighbours). The softmax is normalised over all the keys compared.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch

from ...kernels.config import PyramidConfig
from ...kernels.density import block_tokens
from ...kernels.importance import Representatives, default_generator, pooled, reduced_softmax, sampled
from ...kernels.levels import BlockLists, choose_levels, group_by_level


def ranked_lists(q: torch.Tensor, k: torch.Tensor, config: PyramidConfig, way: Mapping[str, Any]) -> BlockLists:
    """The levels for q, k [B, H, L, D], in block order, when ranked in the given way."""
    generator = default_generator(config.ranking, q.device)
    queries = representatives(q, config.block_q, way["q"], generator)
    keys = representatives(k, config.block_kv, way["k"], generator)
    if way.get("second_order"):
        queries, keys = with_second_order(queries, keys, k, q.shape[-1] ** -0.5)
    scores = reduced_softmax(queries, keys, q.shape[-1] ** -0.5, way.get("reduction", "mean"))
    key_tokens = block_tokens(k.shape[2], config.block_kv, k.device)
    return group_by_level(choose_levels(scores, config), config.stored_factors, key_tokens)


def representatives(x: torch.Tensor, block: int, kind: str, generator: torch.Generator) -> Representatives:
    """The tokens, or means of tokens, that represent the blocks of x [B, H, L, D]. For `kind` see the module."""
    name, group = kind.split()[0], int(kind.split()[1])
    if name == "pooled":
        return pooled(x, block, group)
    if name == "sampled":
        return sampled(x, block, 1 / group, generator)
    length, groups = x.shape[2], -(-x.shape[2] // group)
    first = torch.arange(groups, device=x.device) * group
    if name == "strided":
        within = torch.full_like(first, group // 2)
    elif name == "spread":
        within = torch.randint(group, (groups,), generator=generator, device=generator.device).to(x.device)
    else:
        raise ValueError(f"there is no kind of representative named {name!r}")
    padded = -(-length // block) * (block // group)
    rows = torch.nn.functional.pad((first + within).clamp_max(length - 1), (0, padded - groups))
    return Representatives(x.index_select(2, rows), length, block, group, block // group)


def with_second_order(
    queries: Representatives, keys: Representatives, k: torch.Tensor, scale: float
) -> tuple[Representatives, Representatives]:
    """Rows with twice the dimensions, whose product also accounts for the spread of the keys within each group.

    The mean of exp(scale q.k) over a group is about exp(scale q.mean + scale^2 sum_d q_d^2 var_d / 2).
    """
    mean = pooled(k.float(), keys.block, keys.group).rows
    variance = (pooled(k.float().square(), keys.block, keys.group).rows - mean.square()).clamp_min(0)
    rows = queries.rows.float()
    wide_q = torch.cat([rows, rows.square() * math.sqrt(scale / 2)], -1)
    wide_k = torch.cat([mean, variance * math.sqrt(scale / 2)], -1)
    return dataclasses.replace(queries, rows=wide_q), dataclasses.replace(keys, rows=wide_k)
