"""Pyramid Sparse Attention as one call: video tokens go through a backend, text and reference tokens are added.

It knows nothing about models or sampling. The stages follow one another in `torch_backend.py` and `gpu/backend.py`.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F

from .backends import BackendError, choose_backend, gradient_reason, video_attention
from .config import PyramidConfig
from .delta import Delta
from .levels import BlockLists, SharedHeads
from .order import TokenLayout, TokenOrder, make_order
from .semantic import SEMANTIC_ORDERS, Centroids, semantic_orders


@dataclasses.dataclass(frozen=True)
class AttentionResult:
    """What a call did.

    Attributes:
        output: [B, H, Lq, D], dtype of q: `out`, or a view of [B, Lq, H, D] storage, the layout that models use next.
        lists: the levels of all block pairs, in block order.
        density: scalar tensor on the device, see `density.py`; reading it waits for the device.
        backend: the backend that computed it.
        query_order, key_order: the token orders in which the blocks were cut.
        centroids: where the next step starts, for the orders that follow the data; None otherwise.
    """

    output: torch.Tensor
    lists: BlockLists
    density: torch.Tensor
    backend: str
    query_order: TokenOrder
    key_order: TokenOrder
    centroids: Centroids | None

    @property
    def factors(self) -> torch.Tensor:
        """Pooling factor of every pair, int16 [B, H, n_q, n_k], 0 = dropped, in block order."""
        return self.lists.factors()

    @property
    def unranked(self) -> torch.Tensor | None:
        """How many pairs had a score that is not finite: a scalar on the device; None if the levels were given."""
        return None if self.lists.unranked is None else self.lists.unranked.sum()


def pyramid_sparse_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    config: PyramidConfig,
    *,
    layout: TokenLayout | None = None,
    query_layout: TokenLayout | None = None,
    order: TokenOrder | None = None,
    scale: float | None = None,
    backend: str = "auto",
    generator: torch.Generator | None = None,
    lists: BlockLists | None = None,
    delta: Delta | None = None,
    centroids: Centroids | None = None,
    out: torch.Tensor | None = None,
    shared: SharedHeads | None = None,
) -> AttentionResult:
    """Attention in which every query block sees each key block at the resolution that its importance earns.

    Args:
        q, k, v: [B, H, Lq, D], [B, Hkv, Lk, D], [B, Hkv, Lk, D]; float32, float16 or bfloat16, any strides. H must be
            a multiple of Hkv (grouped queries; keys and values are then repeated).
        config: the setting.
        layout: video grid of the keys, and the tokens before and after it. Those tokens stay at full resolution and
            are not reordered or pooled: every query sees them, and as queries they see everything. None: all tokens
            are video and keep their order.
        query_layout: the same for the queries; by default `layout` if Lq == Lk, otherwise none.
        order: the token order of the keys' grid, made once with `make_order`; by default made from `config`. Ignored
            for the orders that follow the data, which are made again in every call.
        scale: factor of the logits, by default 1/sqrt(D).
        backend: auto, triton or torch.
        lists: levels to use instead of choosing them, for example those of an earlier step with the same shapes and
            config.
        delta: what an earlier call lost (`delta.py`), added to the output of the video tokens. It was measured in the
            order of the query blocks, so that order must be the same again.
        centroids: those of an earlier step, for the orders that follow the data.
        out: where to write the output [B, H, Lq, D], any strides; by default a new tensor.
        shared: heads of the same call that other processes compute; only budget mode asks about them.
        generator: random source of `sampled` importance; by default a fresh one per call, seeded with config.seed.

    Raises:
        ValueError: the shapes do not fit together.
        ConfigError: a setting that cannot be met at this length.
        BackendError: the backend cannot compute the call, or gradients were asked for; the message says why.
        KernelError: the kernels compute wrong results on this machine.
    """
    _check_shapes(q, k, v, layout)
    reason = gradient_reason(q, k, v)
    if reason is not None:
        raise BackendError(reason)
    if k.shape[1] != q.shape[1]:
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    same_length = q.shape[2] == k.shape[2]
    layout = layout or TokenLayout((1, 1, k.shape[2]))
    if query_layout is None:
        query_layout = layout if same_length else TokenLayout((1, 1, q.shape[2]))
    if query_layout.length != q.shape[2]:
        raise ValueError(f"query_layout has {query_layout.length} tokens, q has {q.shape[2]}")
    if config.order in SEMANTIC_ORDERS:
        video = _video(q, query_layout), _video(k, layout)
        query_order, order, centroids = semantic_orders(*video, config, query_layout.grid, centroids)
    else:
        if order is None:
            order = _default_order(layout, config, k.device)
        elif order.length not in (None, layout.video):
            raise ValueError(f"order was made for {order.length} tokens, the grid {layout.grid} has {layout.video}")
        query_order = order if query_layout == layout else _default_order(query_layout, config, q.device)
        centroids = None
    _check_given(q, config, (query_layout.video, layout.video), lists, delta, out)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    name = choose_backend(backend, q, config.precision)
    output = q.new_empty(q.shape[0], q.shape[2], q.shape[1], q.shape[3]).transpose(1, 2) if out is None else out
    with torch.cuda.device_of(q):  # Triton launches on the current device, whatever its tensors are on
        lists = video_attention(name)(
            _video(q, query_layout),
            _video(k, layout),
            _video(v, layout),
            config,
            query_order,
            order,
            scale,
            _others(k, layout),
            _others(v, layout),
            generator,
            _video(output, query_layout),
            lists,
            delta,
            shared,
        )
    other_queries = _others(q, query_layout)
    if other_queries is not None:
        # Text and reference queries are few: they see everything at full resolution.
        others = F.scaled_dot_product_attention(other_queries, _aligned(k), _aligned(v), scale=scale)
        output[:, :, : query_layout.before] = others[:, :, : query_layout.before]
        output[:, :, query_layout.before + query_layout.video :] = others[:, :, query_layout.before :]
    return AttentionResult(output, lists, lists.mean_density, name, query_order, order, centroids)


def _default_order(layout: TokenLayout, config: PyramidConfig, device: torch.device) -> TokenOrder:
    name = "raster" if layout.grid[:2] == (1, 1) else config.order
    return make_order(name, layout.grid, config.tile, device)


def _video(x: torch.Tensor, layout: TokenLayout) -> torch.Tensor:
    if layout.video == layout.length:
        return x
    return x[:, :, layout.before : layout.before + layout.video]


def _others(x: torch.Tensor, layout: TokenLayout) -> torch.Tensor | None:
    if layout.video == layout.length:
        return None
    return torch.cat([x[:, :, : layout.before], x[:, :, x.shape[2] - layout.after :]], 2)


def _aligned(x: torch.Tensor) -> torch.Tensor:
    """x, copied if not all of its rows start at a multiple of 16 bytes: torch misreads those (2.11 on an H100)."""
    starts = [x.data_ptr(), *(stride * x.element_size() for stride in x.stride()[:3])]
    return x.contiguous() if any(start % 16 for start in starts) else x


def _check_shapes(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: TokenLayout | None) -> None:
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape:
        raise ValueError(
            f"q, k, v must be [B, H, L, D] with k and v alike: {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3] or q.shape[1] % k.shape[1]:
        raise ValueError(f"q {tuple(q.shape)} and k {tuple(k.shape)} must agree in batch, head size and head groups")
    if not q.shape[2] or not k.shape[2]:
        raise ValueError("q and k must hold at least one token")
    if layout is not None and (layout.length != k.shape[2] or layout.video < 1):
        raise ValueError(f"layout {layout} has {layout.length} tokens, k has {k.shape[2]}")


def _check_given(
    q: torch.Tensor,
    config: PyramidConfig,
    tokens: tuple[int, int],
    lists: BlockLists | None,
    delta: Delta | None,
    out: torch.Tensor | None,
) -> None:
    """Raise ValueError if what was made for another call does not fit this one on `tokens` video queries and keys."""
    pairs = [*q.shape[:2], -(-tokens[0] // config.block_q), -(-tokens[1] // config.block_kv)]
    if lists is not None and (list(lists.shape) != pairs or lists.levels != config.stored_factors):
        raise ValueError(
            f"lists are for {list(lists.shape)} pairs at {lists.levels}, not {pairs} at {config.stored_factors}"
        )
    if delta is not None:
        rows = [*q.shape[:2], -(-tokens[0] // delta.group), q.shape[3]]
        if list(delta.values.shape) != rows:
            raise ValueError(f"delta has rows of {list(delta.values.shape)}, the queries need {rows}")
    if out is not None and (out.shape, out.dtype, out.device) != (q.shape, q.dtype, q.device):
        raise ValueError(f"out is {tuple(out.shape)} {out.dtype} on {out.device}, unlike q")
