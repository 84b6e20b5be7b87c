"""ComfyUI's own sparse attention as a rival: Sol-Attn (arXiv 2607.24027), by the rule that comfy_kitchen documents.

A block of 64 queries sees in full its own block of 64 keys, the two next to it, and every block whose mean scores more
than `tau` standard deviations above the row's mean. Of each other block it sees one mean row, with one logit for all 64
queries: that of their mean. With extra tokens, as newer versions of the package have them, it also sees that many of
the other tokens, those that its mean query scores highest, and the rest with the mean query's logits instead of mean
rows.

The package's own function can be called instead; its kernels compute in 8 bits.
"""

from __future__ import annotations

import importlib.util
import math

import torch
import torch.nn.functional as F

BLOCK = 64


def available() -> bool:
    """Whether the package is installed and has Sol-Attn."""
    if importlib.util.find_spec("comfy_kitchen") is None:
        return False
    import comfy_kitchen

    return hasattr(comfy_kitchen, "sol_attn")


def sol_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    tau: float,
    *,
    extra: int = 0,
    tail: str = "block",
    package: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output [B, H, L, D] of q, k, v [B, H, L, D], given in block order, and the density: a scalar.

    extra: how many more tokens a query block sees. tail: `block` as described above; `row`, in which every query has
    its own logit for a mean row; or `none`. package: call comfy_kitchen, with heads of 128, instead of the float32 code
    here; `row` is not possible there.
    """
    if package:
        import comfy_kitchen

        rows = [x.transpose(1, 2).contiguous() for x in (q, k, v)]
        more = {"token_aug": extra} if extra else {}
        output = comfy_kitchen.sol_attn(*rows, tau=tau, tail=tail != "none", **more)
        return output.transpose(1, 2), density(q, k, tau, extra)
    output = torch.empty_like(q, memory_format=torch.contiguous_format)
    with torch.autocast(q.device.type, enabled=False):
        for b, h in ((b, h) for b in range(q.shape[0]) for h in range(q.shape[1])):
            output[b, h] = _one_head(*(x[b, h].to(_work(q)) for x in (q, k, v)), tau, extra, tail)
        return output, density(q, k, tau, extra)


def _one_head(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tau: float, extra: int, tail: str) -> torch.Tensor:
    seen, scale = in_full(q[None, None], k[None, None], tau)[0, 0], q.shape[-1] ** -0.5
    counts = _counts(len(q), q.device).to(q.dtype)
    k = k - _means(k[None, None])[0, 0].mean(0)  # so that the mean query stands for a query beside their common logit
    mean_q, mean_k, mean_v = (_means(x[None, None])[0, 0] for x in (q, k, v))
    block = torch.arange(len(q), device=q.device) // BLOCK
    tokens = seen[:, block]  # of each query block
    if extra:
        scores = (mean_q @ k.T) * scale
        chosen = scores.masked_fill(tokens, -math.inf).topk(min(extra, len(k)), -1).indices
        tokens = tokens.scatter(1, chosen, True)
        rest, values = scores.masked_fill(tokens, -math.inf)[block], v
    else:
        rest = (q @ mean_k.T if tail == "row" else (mean_q @ mean_k.T)[block]) * scale + counts.log()
        rest, values = rest.masked_fill(seen[block], -math.inf), mean_v
    logits = ((q @ k.T) * scale).masked_fill_(~tokens[block], -math.inf)
    if tail == "none":
        return torch.softmax(logits, -1) @ v
    return torch.softmax(torch.cat([logits, rest], -1), -1) @ torch.cat([v, values])


def in_full(q: torch.Tensor, k: torch.Tensor, tau: float) -> torch.Tensor:
    """Which key blocks a query block sees in full: bool [B, H, blocks, blocks]."""
    queries, keys = _means(q), _means(k)
    keys = keys - keys.mean(2, keepdim=True)
    scores = queries @ keys.transpose(-1, -2)
    deviation = (queries.square() @ keys.square().mean(2, keepdim=True).transpose(-1, -2)).sqrt()
    index = torch.arange(scores.shape[-1], device=q.device)
    return (scores > tau * deviation) | ((index[:, None] - index).abs() <= 1)


def density(q: torch.Tensor, k: torch.Tensor, tau: float, extra: int = 0) -> torch.Tensor:
    """Share of the dense attention FLOPs, pooled rows and extra tokens included: a scalar."""
    seen = in_full(q, k, tau)
    full = seen.float().mean()
    tokens = (seen * _counts(k.shape[2], k.device)).sum(-1)  # of each query block
    more = (k.shape[2] - tokens).clamp_max(extra).float().mean() / k.shape[2]
    return full + (1 - full) / BLOCK + more


def _work(x: torch.Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _counts(length: int, device: torch.device) -> torch.Tensor:
    return (length - torch.arange(0, length, BLOCK, device=device)).clamp_max(BLOCK)


def _means(x: torch.Tensor) -> torch.Tensor:
    """Means of blocks, float32 or float64 [B, H, blocks, D]."""
    sums = F.pad(x.to(_work(x)), (0, 0, 0, -x.shape[2] % BLOCK)).unflatten(2, (-1, BLOCK)).sum(3)
    return sums / _counts(x.shape[2], x.device)[:, None]
