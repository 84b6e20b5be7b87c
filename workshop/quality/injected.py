"""Fixed levels: masks that do not depend on the data.

`radial` follows the idea of Radial Attention (X. Li et al., arXiv 2506.19852): the further away a frame is in time, the
less of it is seen, and every query sees the first frame. This is our own version at block size, with one width chosen
to meet the density exactly; it uses neither the authors' code nor their sizes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ...kernels.config import PyramidConfig
from ...kernels.density import block_tokens
from ...kernels.levels import BlockLists, group_by_level


def static_lists(
    kind: str,
    grid: tuple[int, int, int],
    config: PyramidConfig,
    density: float,
    heads: Sequence[int],
    device: torch.device,
) -> BlockLists:
    """A binary mask in raster order with the given density, the same for all [B, H] = `heads`.

    kind: `radial`, or `random` as a control (a fixed draw of the same number of blocks).
    """
    tokens = grid[0] * grid[1] * grid[2]
    frame = grid[1] * grid[2]

    def centres(block: int) -> torch.Tensor:
        start = torch.arange(0, tokens, block)
        return start + block_tokens(tokens, block) / 2

    query, key = centres(config.block_q)[:, None], centres(config.block_kv)[None]
    frames_apart = (query // frame - key // frame).abs()
    if kind == "radial":
        # The width halves each time the distance in time doubles: blocks rank by distance * 2^floor(log2 frames).
        doublings = frames_apart.clamp_min(1).log2().floor()
        distance = (query % frame - key % frame).abs() * 2**doublings
        distance = torch.where(key < frame, -1.0, distance)  # all see the first frame
    else:
        distance = torch.rand(frames_apart.shape, generator=torch.Generator().manual_seed(config.seed))
    own = (query - key).abs() <= config.block_q / 2
    distance = torch.where(own, -2.0, distance)
    keep = max(int(own.sum()), round(density * distance.numel()))
    factors = torch.zeros(distance.numel(), dtype=torch.int16)
    factors[distance.flatten().argsort(stable=True)[:keep]] = 1
    factors = factors.view(1, 1, *distance.shape).expand(*heads, -1, -1).contiguous().to(device)
    return group_by_level(factors, (1,), block_tokens(tokens, config.block_kv, device))
