"""Keys and queries in eight bits at full resolution: the mean key is subtracted first, then rounding is symmetric with
one scale per block.

Subtracting one vector from all keys shifts the logits of a query equally at every level, so the softmax does not
change. What is left of smooth keys is small and rounds well (J. Zhang et al., SageAttention, arXiv 2410.02367,
section 4.2). Values, weights and pooled keys keep their type: a pooled block does not fill a tile, so every column of a
tile would need its own scale, which costs more than the shorter numbers save.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F

from .pyramid import Pyramid

# The mean is taken over one key in sixteen. It need not be exact, only the same for all keys.
_STRIDE = 16


def mean_key(k: torch.Tensor) -> torch.Tensor:
    """Mean of every sixteenth key of k [B, H, L, D]: float32 [B, H, 1, D]."""
    return k[:, :, ::_STRIDE].mean(2, keepdim=True, dtype=torch.float32)


def quantise(x: torch.Tensor, rows_per_block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """x [B, H, R, D] -> int8 of the same shape and float32 scales [B, H, blocks]; the last block may be short.

    Halves are rounded away from zero; the largest absolute value of a block becomes 127.
    """
    blocks = -(-x.shape[2] // rows_per_block)
    padded = F.pad(x.float(), (0, 0, 0, blocks * rows_per_block - x.shape[2])).unflatten(2, (blocks, rows_per_block))
    largest = padded.abs().amax((3, 4)).clamp_min(1e-20)
    # By a tensor: a GPU multiplies by 1/127 instead, and next to a half the last bit of a scale decides.
    scales = largest / torch.full_like(largest, 127)
    scaled = padded / scales[..., None, None]
    rounded = (scaled + torch.where(scaled >= 0, 0.5, -0.5)).trunc().to(torch.int8)
    return rounded.flatten(2, 3)[:, :, : x.shape[2]], scales


def dequantise(rows: torch.Tensor, scales: torch.Tensor, rows_per_block: int) -> torch.Tensor:
    """Inverse of `quantise`, up to rounding: float32 [B, H, R, D]."""
    return rows.float() * scales.repeat_interleave(rows_per_block, 2)[:, :, : rows.shape[2], None]


def quantise_keys(pyramid: Pyramid, mean: torch.Tensor) -> Pyramid:
    """The pyramid with `mean` [B, H, 1, D] subtracted from every key that is not padding, and int8 keys at level 1."""
    rows, scales = {}, None
    for factor, keys in pyramid.keys.items():
        there = (pyramid.tokens(factor) > 0)[: keys.shape[2], None]
        rows[factor] = torch.where(there, keys.float() - mean, 0.0)
        if factor == 1:
            rows[factor], scales = quantise(rows[factor], pyramid.block_kv)
    coarse = [factor for factor in rows if factor > 1]
    if coarse:  # one storage, as everywhere
        storage = torch.cat([rows[factor] for factor in coarse], 2).to(pyramid.keys[coarse[0]].dtype)
        rows |= zip(coarse, storage.split([rows[factor].shape[2] for factor in coarse], 2), strict=True)
    return dataclasses.replace(pyramid, keys=rows, scales=scales, mean=mean)


def dequantise_keys(pyramid: Pyramid) -> Pyramid:
    """The pyramid with its int8 keys turned back into float32, the mean still subtracted."""
    keys = dict(pyramid.keys)
    if 1 in keys:
        assert pyramid.scales is not None  # int8 keys come with them
        keys[1] = dequantise(keys[1], pyramid.scales, pyramid.block_kv)
    return dataclasses.replace(pyramid, keys=keys, scales=None)
