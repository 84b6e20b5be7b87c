"""Flow matching as Wan is sampled in ComfyUI: noisy = (1 - sigma) * data + sigma * noise, target noise - data.

The model gets sigma * 1000 as its timestep. Schedules are shifted, sigma = s*u / (1 + (s - 1)*u), following
P. Esser et al., arXiv 2403.03206, section 5.3.2. Samples with plain Euler steps.
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


Velocity = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""Velocity of noisy latents, timesteps and context tokens, all batch first."""


def guided(
    model: Velocity, x: torch.Tensor, timestep: torch.Tensor, context: torch.Tensor, scale: float
) -> torch.Tensor:
    """Velocity with classifier-free guidance (J. Ho and T. Salimans, arXiv 2207.12598), like ComfyUI's cfg.

    scale: 1 uses the prompt alone; otherwise prompts and empty prompts go through the model as one batch of twice the
    size, prompts first. An empty prompt is zeros of the prompt's shape.
    """
    if scale == 1:
        return model(x, timestep, context)
    both = model(torch.cat([x, x]), torch.cat([timestep, timestep]), torch.cat([context, torch.zeros_like(context)]))
    prompted, empty = both.float().chunk(2)
    return empty + scale * (prompted - empty)


@torch.no_grad()
def sample_euler(
    model: Velocity,
    noise: torch.Tensor,
    context: torch.Tensor,
    steps: int,
    shift: float,
    guidance: float = 1.0,
) -> torch.Tensor:
    """Integrate from noise (sigma 1) to data (sigma 0): latents of the noise's shape, float32."""
    sigmas = shifted(torch.linspace(1, 0, steps + 1, device=noise.device), shift)
    x = noise.float()
    for now, following in itertools.pairwise(sigmas):
        velocity = guided(model, x, (now * 1000).expand(x.shape[0]), context, guidance)
        x = x + (following - now) * velocity.float()
    return x
