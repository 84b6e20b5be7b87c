"""Picks the faster of torch's two exact attention functions for training; which one that is depends on the GPU."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from .wan_dit import HEAD_WIDTH, AttentionFunction

_CALLS = 5


def cudnn_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """cuDNN's attention, called directly, because torch's usual way of choosing a backend is a global switch."""
    return torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True)[0]


def fastest_attention(
    device: torch.device, batch: int, heads: int, tokens: int, log: Callable[[str], None]
) -> AttentionFunction:
    """Time one call and its gradient at this size in bfloat16; without a choice, return torch's usual attention."""
    usual = F.scaled_dot_product_attention
    if device.type != "cuda":
        return usual
    generator = torch.Generator(device).manual_seed(0)
    # The model's memory layout: the heads of a token are adjacent.
    q, k, v = (
        torch.randn(batch, tokens, heads, HEAD_WIDTH, generator=generator, device=device, dtype=torch.bfloat16)
        .transpose(1, 2)
        .requires_grad_()
        for _ in range(3)
    )

    def seconds(attend: AttentionFunction) -> tuple[float, torch.Tensor]:
        for number in range(_CALLS + 1):
            if number == 1:
                torch.cuda.synchronize(device)
                began = time.perf_counter()
            out = attend(q, k, v)
            torch.autograd.grad(out.square().sum(), (q, k, v))
        torch.cuda.synchronize(device)
        return (time.perf_counter() - began) / _CALLS, out.detach().float()

    usual_seconds, expected = seconds(usual)
    try:
        other_seconds, found = seconds(cudnn_attention)
    except RuntimeError as error:  # an old cuDNN, or a GPU that it does not support
        log(f"dit: cuDNN's attention is not used: {str(error).splitlines()[0]}")
        return usual
    same = bool((found - expected).norm() < 0.02 * expected.norm())
    note = "" if same else ", but its result differs"
    log(f"dit: attention {usual_seconds * 1e3:.1f} ms, cuDNN's {other_seconds * 1e3:.1f} ms{note}")
    return cudnn_attention if same and other_seconds < usual_seconds else usual
