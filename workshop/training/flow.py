"""Flow matching as Wan is sampled in ComfyUI: noisy = (1 - sigma) * data + sigma * noise, target noise - data.

The model receives sigma * 1000 as its timestep. Schedules are shifted, sigma = s*u / (1 + (s - 1)*u), after
P. Esser et al., arXiv 2403.03206, section 5.3.2. Not a general sampler: Euler steps, no guidance.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch


def shifted(uniform: torch.Tensor, shift: float) -> torch.Tensor:
    """Shifted noise level 0..1 of schedule time 0..1."""
    return shift * uniform / (1 + (shift - 1) * uniform)


def draw_sigmas(count: int, shift: float, generator: torch.Generator) -> torch.Tensor:
    """Training noise levels, float32 [count]: half logit-normal, half uniform, then shifted."""
    device = generator.device
    normal = torch.sigmoid(torch.randn(count, generator=generator, device=device))
    uniform = torch.rand(count, generator=generator, device=device)
    pick = torch.rand(count, generator=generator, device=device) < 0.5
    return shifted(torch.where(pick, uniform, normal), shift).clamp(1e-3, 1.0)


@torch.no_grad()
def sample_euler(
    model: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
    noise: torch.Tensor,
    context: torch.Tensor,
    steps: int,
    shift: float,
) -> torch.Tensor:
    """Integrate from noise (sigma 1) to data (sigma 0): latents of the noise's shape, float32."""
    sigmas = shifted(torch.linspace(1, 0, steps + 1, device=noise.device), shift)
    x = noise.float()
    for now, following in itertools.pairwise(sigmas):
        velocity = model(x, (now * 1000).expand(x.shape[0]), context)
        x = x + (following - now) * velocity.float()
    return x
