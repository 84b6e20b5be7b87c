"""Smooth, video-like q, k, v for benchmarks: the same recipe for every method, from an explicit seed.

A field is the sum of unit normal noise on the grid divided by (1,1,1), (2,4,4) and (4,10,16), upsampled trilinearly.
Per head, x is a field, y = x + .5 field, q = x + .3 noise, k = y + .3 noise. Each token is RMS-normalised and
multiplied by a gain of 1.0, 1.3, 1.6 or 2.0 (head mod 4, from flat to peaky), followed by 3-D RoPE as in Wan;
v = field + .5 noise.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

GAINS = (1.0, 1.3, 1.6, 2.0)


def smooth_qkv(
    heads: int, grid: tuple[int, int, int], dim: int, dtype: torch.dtype, device: str, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k, v [1, heads, T*H*W, dim] on `device`."""
    generator = torch.Generator(device=device).manual_seed(seed)
    rotation = _rope_angles(grid, dim, device)
    parts: list[list[torch.Tensor]] = [[], [], []]
    for head in range(heads):
        x = _field(grid, dim, generator)
        y = x + 0.5 * _field(grid, dim, generator)
        v = _field(grid, dim, generator) + 0.5 * _noise(x.shape, generator)
        for part, base in zip(parts[:2], (x, y), strict=True):
            token = base + 0.3 * _noise(x.shape, generator)
            token = F.rms_norm(token, (dim,)) * GAINS[head % 4]
            part.append(_rotate(token, rotation).to(dtype))
        parts[2].append(v.to(dtype))
    q, k, v = (torch.stack(part)[None] for part in parts)
    return q, k, v


def _noise(shape: torch.Size | tuple, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(shape, generator=generator, device=generator.device)


def _field(grid: tuple[int, int, int], dim: int, generator: torch.Generator) -> torch.Tensor:
    total = torch.zeros(1, dim, *grid, device=generator.device)
    for divisor in ((1, 1, 1), (2, 4, 4), (4, 10, 16)):
        size = [max(1, n // d) for n, d in zip(grid, divisor, strict=True)]
        total += F.interpolate(_noise((1, dim, *size), generator), size=grid, mode="trilinear", align_corners=False)
    return total[0].flatten(1).T


def _rope_angles(grid: tuple[int, int, int], dim: int, device: str) -> torch.Tensor:
    sizes = (dim - 4 * (dim // 6), 2 * (dim // 6), 2 * (dim // 6))
    positions = torch.meshgrid(*(torch.arange(n, device=device, dtype=torch.float32) for n in grid), indexing="ij")
    angles = []
    for size, position in zip(sizes, positions, strict=True):
        frequency = 10000 ** (-torch.arange(0, size, 2, device=device, dtype=torch.float32) / size)
        angles.append(position.reshape(-1, 1) * frequency)
    return torch.cat(angles, 1)


def _rotate(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    even, odd = x[:, ::2], x[:, 1::2]
    return torch.stack(
        [even * angles.cos() - odd * angles.sin(), even * angles.sin() + odd * angles.cos()], -1
    ).flatten(1)
