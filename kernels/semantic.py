"""Token orders that follow the data: tokens of a head are neighbours if their queries, or keys, are alike.

k-means per head, as in the release of Pyramid Sparse Attention (arXiv 2512.04025): 200 clusters of queries and 1000 of
keys, 50 iterations in the first step. Every later step does 2, starting from the centroids of the step before.
`semantic` orders queries and keys this way; `hybrid` only the keys, with the queries on the curve. Within a cluster
tokens keep the raster order. k-means starts from evenly spaced tokens, not random ones, so a run is repeatable.
"""

from __future__ import annotations

import dataclasses

import torch

from .config import PyramidConfig
from .order import TokenOrder, make_order

SEMANTIC_ORDERS = ("semantic", "hybrid")
# How many similarities of tokens and centroids are held at a time: 64 MB.
_AT_ONCE = 2**24


@dataclasses.dataclass(frozen=True)
class Centroids:
    """Where a later step starts: cluster centres float32 [B, H, clusters, D]; queries None in the hybrid order."""

    queries: torch.Tensor | None
    keys: torch.Tensor


def semantic_orders(
    q: torch.Tensor,
    k: torch.Tensor,
    config: PyramidConfig,
    grid: tuple[int, int, int],
    centroids: Centroids | None = None,
) -> tuple[TokenOrder, TokenOrder, Centroids]:
    """Orders of the queries and of the keys, and where the next step starts.

    Args:
        q: [B, H, Lq, D], k: [B, H, Lk, D], video tokens only.
        grid: of the queries, for the curve of the hybrid order.
        centroids: those of the step before; ignored if their shapes do not fit.
    """
    first, later = config.cluster_iterations
    old_q, old_k = (None, None) if centroids is None else (centroids.queries, centroids.keys)

    def order(x: torch.Tensor, old: torch.Tensor | None, clusters: int, block: int) -> tuple[TokenOrder, torch.Tensor]:
        # Clusters smaller than a block would only scatter the tokens.
        clusters = max(1, min(clusters, x.shape[2] // block))
        if old is None or old.shape != (*x.shape[:2], clusters, x.shape[3]) or old.device != x.device:
            start, iterations = spread_tokens(x, clusters), first
        else:
            start, iterations = old, later
        centres = k_means(x, start, iterations)
        return TokenOrder.of(nearest(x, centres).argsort(dim=-1, stable=True)), centres

    key_order, keys = order(k, old_k, config.clusters[1], config.block_kv)
    if config.order == "hybrid":
        return make_order("curve", grid, device=q.device), key_order, Centroids(None, keys)
    query_order, queries = order(q, old_q, config.clusters[0], config.block_q)
    return query_order, key_order, Centroids(queries, keys)


def spread_tokens(x: torch.Tensor, count: int) -> torch.Tensor:
    """`count` evenly spaced tokens of x [B, H, L, D]: float32 [B, H, count, D]."""
    return x[:, :, torch.arange(count, device=x.device) * x.shape[2] // count].float()


def nearest(x: torch.Tensor, centres: torch.Tensor) -> torch.Tensor:
    """Index of the centre [B, H, C, D] nearest to each token of x [B, H, L, D]: int64 [B, H, L]."""
    # |x - c|^2 is smallest where x c - |c|^2 / 2 is largest.
    half = centres.square().sum(-1)[:, :, None] / 2
    step = max(1, _AT_ONCE // (centres.shape[0] * centres.shape[1] * centres.shape[2]))
    transposed = centres.transpose(-1, -2)
    parts = [(part.float() @ transposed - half).argmax(-1) for part in x.split(step, 2)]
    return torch.cat(parts, 2)


def k_means(x: torch.Tensor, centres: torch.Tensor, iterations: int) -> torch.Tensor:
    """Lloyd's algorithm per head of x [B, H, L, D] from centres float32 [B, H, C, D]; an empty cluster stays put."""
    values = x.float()
    for _ in range(iterations):
        labels = nearest(x, centres)
        sums = torch.zeros_like(centres).scatter_add_(2, labels[..., None].expand_as(values), values)
        counts = torch.zeros_like(centres[..., 0]).scatter_add_(2, labels, values.new_ones(labels.shape))[..., None]
        centres = torch.where(counts > 0, sums / counts.clamp_min(1), centres)
    return centres
