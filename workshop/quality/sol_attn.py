"""ComfyUI's own sparse attention as a rival: Sol-Attn from the package comfy_kitchen (arXiv 2607.24027).

A block of 64 queries sees in full its own block of 64 keys, the two next to it, and every block whose mean scores more
than `tau` standard deviations above the row's mean. Of each other block it sees one mean row.
"""

from __future__ import annotations

import importlib.util

import torch
import torch.nn.functional as F

BLOCK = 64


def available() -> bool:
    """Whether the package is installed and has Sol-Attn."""
    if importlib.util.find_spec("comfy_kitchen") is None:
        return False
    import comfy_kitchen

    return hasattr(comfy_kitchen, "sol_attn")


def sol_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tau: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Output [B, H, L, 128] of q, k, v [B, H, L, 128], given in block order, and the density."""
    import comfy_kitchen

    rows = [x.transpose(1, 2).contiguous() for x in (q, k, v)]
    return comfy_kitchen.sol_attn(*rows, tau=tau).transpose(1, 2), density(q, k, tau)


def density(q: torch.Tensor, k: torch.Tensor, tau: float) -> torch.Tensor:
    """Share of the dense attention FLOPs by the package's documented rule, pooled rows included: a scalar."""
    queries, keys = _means(q), _means(k)
    keys = keys - keys.mean(2, keepdim=True)
    scores = queries @ keys.transpose(-1, -2)
    deviation = (queries.square() @ keys.square().mean(2, keepdim=True).transpose(-1, -2)).sqrt()
    index = torch.arange(scores.shape[-1], device=q.device)
    near = (index[:, None] - index).abs() <= 1
    full = ((scores > tau * deviation) | near).float().mean()
    return full + (1 - full) / BLOCK


def _means(x: torch.Tensor) -> torch.Tensor:
    """Means of blocks, float32 [B, H, blocks, D]."""
    length = x.shape[2]
    sums = F.pad(x.float(), (0, 0, 0, -length % BLOCK)).unflatten(2, (-1, BLOCK)).sum(3)
    counts = (length - torch.arange(sums.shape[2], device=x.device) * BLOCK).clamp(1, BLOCK)
    return sums / counts[:, None]
