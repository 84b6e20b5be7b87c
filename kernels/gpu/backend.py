"""PSA on the video tokens in Triton, for GPUs: one pass over k and v, one over q, levels without a sort.

The same stages as `torch_backend.py`. Stages that copy keys, values and queries go through the heads of long videos in
parts, so that only one part is held twice.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch

from ..config import PyramidConfig
from ..delta import Delta
from ..importance import Representatives, default_generator, group_size, key_groups, sample_count, sample_rows
from ..levels import BlockLists, SharedHeads
from ..order import TokenOrder
from ..similarity import similarity_cap
from .attend import attend_triton
from .autotune import Case, choose_tile
from .call import Call
from .exact_ranking import Ranked
from .importance import reduced_softmax_triton
from .levels import choose_lists_triton
from .order import apply_order_triton, undo_order_triton
from .pyramid import build_pyramid_triton, pool_triton
from .self_check import Kind, Trust, may_check, trust
from .tiles import AttendTile

# Up to this head size the attention kernel finds queries in raster order itself; larger heads leave it no registers.
FINDS_QUERIES = 64
# Most bytes of a tensor that are copied at a time: 720p of Wan 1.3B at once, so that the launches of a call stay few.
COPIED_AT_ONCE = 2**28


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

    Raises:
        KernelError: the kernels are known to be wrong for calls of this kind, or this one has shown it.
    """
    tile = choose_tile(q.device, Case.of(q, config))
    indices = query_order.index, key_order.index
    trusted = trust(q.device, Kind.of(q, config, indices, lists, extra_k, delta, tile))
    trusted.refuse()
    if lists is None:
        lists = _choose(q, k, config, query_order, key_order, scale, generator, shared, trusted)
    call = Call(q, k, v, config, query_order, key_order, scale, extra_k, extra_v, lists, delta)
    for some, place in _in_parts(call, out):
        _attend(some, place, tile)
    if not trusted.checked and may_check(q.device):
        trusted.check(call, out)
    return lists


def _choose(
    q: torch.Tensor,
    k: torch.Tensor,
    config: PyramidConfig,
    query_order: TokenOrder,
    key_order: TokenOrder,
    scale: float,
    generator: torch.Generator | None,
    shared: SharedHeads | None,
    trusted: Trust,
) -> BlockLists:
    ranking = config.ranking
    if ranking.importance == "sampled":
        generator = generator or default_generator(ranking, q.device)
        queries = _sampled(q, ranking.block_q, ranking.sample_share, generator, query_order)
        keys = summed = _sampled(k, ranking.block_kv, ranking.sample_share, generator, key_order)
    else:
        (queries,) = means(q, ranking.block_q, (group_size(ranking, ranking.block_q),), query_order)
        keys, *others = means(k, ranking.block_kv, key_groups(ranking), key_order)
        summed = others[0] if others else keys
    scores = reduced_softmax_triton(queries, keys, scale, ranking.reduction, summed)
    cap = None
    if config.similarity_cap:
        cap = similarity_cap(key_order.apply(k), config.similarity_cap, config.block_kv)
    lists = choose_lists_triton(scores, config, cap, k.shape[2], shared)
    if not trusted.checked and may_check(q.device):
        seen = Ranked(
            q, k, config, query_order, key_order, scale, queries, keys, summed, scores, lists,
            capped=cap is not None, shared=shared is not None,
        )  # fmt: skip
        trusted.check_ranking(seen)
    return lists


def _attend(call: Call, out: torch.Tensor, tile: AttendTile) -> None:
    """A separate function, so that its copies are freed before the next part makes its own."""
    q, config, order = call.q, call.config, call.query_order
    int8 = config.precision == "int8"
    pyramid = build_pyramid_triton(call.k, call.v, config.stored_factors, config.block_kv, call.key_order, int8=int8)
    extra_k = call.extra_k
    if pyramid.mean is not None and extra_k is not None:
        extra_k = (extra_k - pyramid.mean).to(q.dtype)
    inputs = pyramid, call.lists, config.block_q, call.scale, extra_k, call.extra_v
    uneven = config.mode != "topk"
    if order.index is None or q.shape[-1] <= FINDS_QUERIES:
        attend_triton(q, *inputs, out, order=order, delta=call.delta, uneven=uneven, tile=tile)
    else:
        ordered = apply_order_triton(q, order)
        attend_triton(ordered, *inputs, ordered, uneven=uneven, tile=tile)
        # Added here, it costs what it takes to read; added by the kernel above, its loops would lose registers.
        undo_order_triton(ordered, order, out, call.delta)


def _in_parts(call: Call, out: torch.Tensor) -> Iterator[tuple[Call, torch.Tensor]]:
    """What is computed at a time, with its output: everything, or as many heads of one batch entry as may be copied."""
    batch, heads, length, dim = call.q.shape
    head_bytes = length * dim * call.q.element_size()
    if call.key_order.index is None or batch * heads * head_bytes <= COPIED_AT_ONCE:
        yield call, out
        return
    parts = min(heads, -(-heads * head_bytes // COPIED_AT_ONCE))
    for entry, number in itertools.product(range(batch), range(parts)):
        part = slice(entry, entry + 1), slice(number * heads // parts, (number + 1) * heads // parts)
        yield call[part], out[part]


def means(x: torch.Tensor, block: int, groups: tuple[int, ...], order: TokenOrder) -> list[Representatives]:
    """As `importance.pooled` of the ordered x, for every group size."""
    rows = pool_triton(x, groups, block, order)
    return [
        Representatives(part, x.shape[2], block, group, block // group)
        for part, group in zip(rows, groups, strict=True)
    ]


def _sampled(
    x: torch.Tensor, block: int, share: float, generator: torch.Generator, order: TokenOrder
) -> Representatives:
    """As `importance.sampled` of the ordered x."""
    rows = sample_rows(x.shape[2], block, share, generator, x.device).flatten()
    chosen = order.take(x, rows).contiguous()
    return Representatives(chosen, x.shape[2], block, 1, sample_count(block, share))
