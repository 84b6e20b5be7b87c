"""The similarity cap: how far a key block may be pooled, by how alike its tokens are (arXiv 2512.04025, 3.3)."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from .density import block_tokens


def similarity_cap(k: torch.Tensor, thresholds: Mapping[int, float], block_kv: int) -> torch.Tensor:
    """Coarsest pooling factor that each key block of k [B, H, L, D] may take: int16 [B, H, n_k].

    The similarity at factor f is the mean cosine similarity of tokens 0 and f-1 over all groups of f in the block. A
    block may be pooled to the largest f for which it passes every threshold up to f; otherwise it stays at full
    resolution.
    """
    batch, heads, length, dim = k.shape
    blocks = len(block_tokens(length, block_kv))
    cap = torch.ones(batch, heads, blocks, dtype=torch.int16, device=k.device)
    allowed = torch.ones_like(cap, dtype=torch.bool)
    unit = torch.nn.functional.normalize(k.float(), dim=-1)
    unit = torch.nn.functional.pad(unit, (0, 0, 0, -length % block_kv)).view(batch, heads, blocks, block_kv, dim)
    exists = (torch.arange(blocks * block_kv, device=k.device) < length).view(blocks, block_kv)
    for factor in sorted(thresholds):
        first, last = unit[:, :, :, ::factor], unit[:, :, :, factor - 1 :: factor]
        pairs = exists[:, factor - 1 :: factor].float()  # the later token of the pair decides
        similarity = ((first * last).sum(-1) * pairs).sum(-1) / pairs.sum(-1).clamp_min(1)
        allowed &= similarity > thresholds[factor]
        cap = torch.where(allowed, factor, cap).to(torch.int16)
    return cap
