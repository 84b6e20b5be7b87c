"""PSA on the video tokens in Triton, for GPUs: one pass over k and v, one over q, levels without a sort.

The same stages as `torch_backend.py`. Order costs no pass of its own: keys and values are read through the index when
they are pooled, queries and output when they are attended.
"""

from __future__ import annotations

import torch

from .attend_triton import attend_triton
from .config import PyramidConfig
from .importance import Representatives, default_generator, group_size, sample_count, sample_rows
from .importance_triton import reduced_softmax_triton
from .levels import BlockLists
from .levels_triton import choose_lists_triton
from .order import TokenOrder
from .pyramid_triton import build_pyramid_triton, pool_triton
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
) -> BlockLists:
    """Attention of q [B, H, Lq, D] over the pyramid of k, v [B, H, Lk, D] and the extra tokens, written to `out`."""
    sampling, int8 = config.importance == "sampled", config.precision == "int8"
    group_q, group_k = group_size(config, config.block_q), group_size(config, config.block_kv)
    pyramid, means_k = build_pyramid_triton(
        k, v, config.stored_factors, config.block_kv, key_order, int8=int8, summary_factor=0 if sampling else group_k
    )
    if sampling:
        generator = generator or default_generator(config, q.device)
        chosen_q = _sampled(q, config.block_q, config.sample_share, generator, query_order)
        chosen_k = _sampled(k, config.block_kv, config.sample_share, generator, key_order)
    else:
        means_q = pool_triton(q, group_q, config.block_q, query_order)
        chosen_q = Representatives(means_q, q.shape[2], config.block_q, group_q, config.block_q // group_q)
        chosen_k = Representatives(means_k, k.shape[2], config.block_kv, group_k, config.block_kv // group_k)
    scores = reduced_softmax_triton(chosen_q, chosen_k, scale, config.reduction)
    cap = None
    if config.similarity_cap:
        cap = similarity_cap(key_order.apply(k), config.similarity_cap, config.block_kv)
    lists = choose_lists_triton(scores, config, cap, k.shape[2])
    if int8 and extra_k is not None:
        extra_k = (extra_k - pyramid.mean).to(q.dtype)
    uneven = config.mode != "topk"
    attend_triton(q, pyramid, lists, config.block_q, scale, query_order, extra_k, extra_v, out, uneven=uneven)
    return lists


def _sampled(
    x: torch.Tensor, block: int, share: float, generator: torch.Generator, order: TokenOrder
) -> Representatives:
    """As `importance.sampled` of the ordered x."""
    rows = sample_rows(x.shape[2], block, share, generator, x.device).flatten()
    rows = rows if order.index is None else order.index[rows]
    return Representatives(x.index_select(2, rows).contiguous(), x.shape[2], block, 1, sample_count(block, share))
