"""Muon: momentum whose matrix updates are orthogonalised, for the 2-D weights of the transformer.

Matrices of equal shape are stacked and orthogonalised together, one batched product instead of dozens of small ones.
Not for embeddings, biases or gains. Method: K. Jordan et al., "Muon" (https://kellerjordan.github.io/posts/muon/);
update scale 0.2 * sqrt(longer side) from J. Liu et al., arXiv 2502.16982.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def orthogonalise(matrices: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Replace the singular values of [N, rows, columns] by values near 1 (quintic Newton-Schulz, in bfloat16)."""
    a, b, c = NEWTON_SCHULZ
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = (matrices.mT if tall else matrices).bfloat16()
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.mT if tall else x


class Muon:
    """Optimiser over 2-D parameters with decoupled weight decay; the caller passes the learning rate to `step`."""

    def __init__(self, parameters: Iterable[torch.nn.Parameter], momentum: float = 0.95, weight_decay: float = 0.01):
        self.momentum, self.weight_decay = momentum, weight_decay
        groups: dict[torch.Size, list[torch.nn.Parameter]] = {}
        for parameter in parameters:
            if parameter.ndim != 2:
                raise ValueError(f"Muon takes matrices only, not shape {tuple(parameter.shape)}")
            groups.setdefault(parameter.shape, []).append(parameter)
        self.groups = list(groups.values())
        self.buffers = [torch.zeros(len(g), *g[0].shape, device=g[0].device) for g in self.groups]

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """Apply one update from the gradients."""
        for group, buffer in zip(self.groups, self.buffers, strict=True):
            gradient = torch.stack([parameter.grad for parameter in group])
            buffer.lerp_(gradient, 1 - self.momentum)
            update = orthogonalise(gradient.lerp(buffer, self.momentum)).float()
            update *= -learning_rate * 0.2 * max(update.shape[1:]) ** 0.5
            torch._foreach_mul_(group, 1 - learning_rate * self.weight_decay)
            torch._foreach_add_(group, list(update.unbind(0)))

    def zero_grad(self) -> None:
        """Drop the gradients."""
        for group in self.groups:
            for parameter in group:
                parameter.grad = None
