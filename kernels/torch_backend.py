"""PSA on the video tokens in plain torch: any device and type, memory linear in the length.

The same stages as `gpu/backend.py`, one line each.
"""

from __future__ import annotations

import dataclasses

import torch

from .attend import attend_streaming
from .config import PyramidConfig
from .delta import Delta
from .density import block_tokens
from .importance import importance
from .levels import BlockLists, SharedHeads, choose_levels, group_by_level
from .order import TokenOrder
from .pyramid import build_pyramid
from .similarity import similarity_cap


def attend_video(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    config: PyramidConfig,
    query_order: TokenOrder,
    key_order: TokenOrder,
    scale: float,
    extra_k: torch.Tensor | None,
    extra_v: torch.Tensor | None,
    generator: torch.Generator | None,
    out: torch.Tensor,
    lists: BlockLists | None = None,
    delta: Delta | None = None,
    shared: SharedHeads | None = None,
) -> BlockLists:
    """Attention of q [B, H, Lq, D] over the pyramid of k, v [B, H, Lk, D] and the extra tokens, written to `out`.

    lists: levels to use instead of choosing them. delta: added to the output. shared: heads elsewhere. Returns the
    levels that were used.
    """
    q, k, v = query_order.apply(q), key_order.apply(k), key_order.apply(v)
    if lists is None:
        scores = importance(q, k, config.ranking, scale, generator)
        cap = similarity_cap(k, config.similarity_cap, config.block_kv) if config.similarity_cap else None
        key_tokens = block_tokens(k.shape[2], config.block_kv, k.device)
        lists = group_by_level(choose_levels(scores, config, cap, shared), config.stored_factors, key_tokens)
        finite = scores.isfinite()
        best = torch.where(finite, scores, -1.0).argmax(-1).to(torch.int32)
        lists = dataclasses.replace(lists, unranked=(~finite).sum(-1, dtype=torch.int32), best=best)
    pyramid = build_pyramid(k, v, config.stored_factors, config.block_kv)
    output = attend_streaming(q, pyramid, lists.factors(), config.block_q, scale, extra_k, extra_v)
    if delta is not None:
        output = (output.float() + delta.rows(q.shape[2])).to(q.dtype)
    out.copy_(query_order.undo(output))
    return lists
