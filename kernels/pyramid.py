"""The pyramid: keys and values mean-pooled inside each key block (arXiv 2512.04025, section 3.2).

A row at pooling factor f stands for up to f neighbouring tokens of one block. At the end of a partly filled block it is
the mean of the tokens that exist. Its logit gets the bias ln(number of tokens), which is (h-1) ln 2 in the paper.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F


@dataclasses.dataclass(frozen=True)
class Pyramid:
    """Keys and values at every pooling factor, finest first.

    Attributes:
        keys, values: pooling factor f -> [B, H, R_f, D], block_kv/f rows per block. At factor 1 these are the tokens
            themselves, so the last block may end early. Coarser levels end with padding rows of zeros and follow each
            other in one storage.
        block_kv: tokens per key block.
        length: number of key tokens.
        scales, mean: if the keys at factor 1 are int8 (`int8.py`): float32 [B, H, n_blocks], and the key
            [B, H, 1, D] that was subtracted from all levels; otherwise None.
    """

    keys: dict[int, torch.Tensor]
    values: dict[int, torch.Tensor]
    block_kv: int
    length: int
    scales: torch.Tensor | None = None
    mean: torch.Tensor | None = None

    @property
    def blocks(self) -> int:
        """Number of key blocks."""
        return -(-self.length // self.block_kv)

    @property
    def int8(self) -> bool:
        """True where keys at factor 1 are there and in eight bits."""
        return self.scales is not None and 1 in self.keys

    def tokens(self, factor: int) -> torch.Tensor:
        """How many tokens each row of a level stands for, 0 for padding: int32 [n_blocks * block_kv / factor]."""
        device = next(iter(self.keys.values())).device
        return row_tokens(self.length, factor, self.block_kv, device)


def pool(x: torch.Tensor, factor: int, block: int, out: torch.Tensor | None = None) -> torch.Tensor:
    """Mean of every `factor` neighbouring tokens: [B, H, L, D] -> [B, H, n_blocks * block / factor, D].

    Means are taken in float32 (float64 for float64) over the tokens that exist; rows after the last token are zero.
    """
    batch, heads, length, dim = x.shape
    if out is None:
        out = x.new_empty(batch, heads, -(-length // block) * (block // factor), dim)
    whole = length // block * block
    work = torch.promote_types(x.dtype, torch.float32)
    if whole:
        groups = x[:, :, :whole].unflatten(2, (-1, factor))
        out[:, :, : whole // factor] = groups.mean(3, dtype=work)
    if whole < length:
        # Only the last block is padded, so that a long sequence is not copied.
        groups = F.pad(x[:, :, whole:].to(work), (0, 0, 0, whole + block - length)).unflatten(2, (-1, factor))
        tokens = row_tokens(length - whole, factor, block, x.device).clamp_min(1)
        out[:, :, whole // factor :] = groups.sum(3) / tokens[:, None]
    return out


def row_tokens(length: int, factor: int, block_kv: int, device: torch.device | str) -> torch.Tensor:
    """Tokens that each pooled row stands for: int32 [n_blocks * block_kv / factor], 0 for padding."""
    rows = -(-length // block_kv) * (block_kv // factor)
    return (length - factor * torch.arange(rows, device=device)).clamp(0, factor).to(torch.int32)


def build_pyramid(k: torch.Tensor, v: torch.Tensor, factors: tuple[int, ...], block_kv: int) -> Pyramid:
    """Pool k and v [B, H, L, D] to every factor of `factors` (ascending powers of two up to block_kv).

    The coarse levels of one tensor follow each other in one storage, row after row of blocks.
    """
    blocks = -(-k.shape[2] // block_kv)
    coarse = [factor for factor in factors if factor > 1]
    rows = [blocks * (block_kv // factor) for factor in coarse]
    levels: list[dict[int, torch.Tensor]] = []
    for x in (k, v):
        storage = x.new_empty(*x.shape[:2], sum(rows), x.shape[3])
        level = {1: x} if 1 in factors else {}
        for factor, part in zip(coarse, storage.split(rows, 2), strict=True):
            level[factor] = pool(x, factor, block_kv, out=part)
        levels.append(level)
    return Pyramid(levels[0], levels[1], block_kv, k.shape[2])
