"""The correction: what sparse attention lost in one step, kept and given back in the steps that follow.

delta = dense - sparse is measured once for an attention call. Later calls at the same place, over the same levels,
return sparse + gamma * delta. From step to step attention changes slowly, and the part of it that is dropped or pooled
changes more slowly still. DiTFastAttn (arXiv 2406.08552) shares the residual of window attention between steps, and
Re-ttention (arXiv 2505.22918) the statistics of the full softmax; the figures for a pyramid with kept levels are in
`docs/quality.md`.
"""

from __future__ import annotations

import dataclasses

import torch

from .order import TokenOrder
from .pyramid import pool

GROUPS = {"full": 1, "half": 2, "quarter": 4, "eighth": 8}
"""Size of a correction -> how many neighbouring tokens share one row of it."""

_LARGEST = 448.0  # of float8_e4m3fn
_AT_ONCE = 2**26  # float32 numbers held at a time: 256 MB


@dataclasses.dataclass(frozen=True)
class Delta:
    """What a call lost, in eight bits: one row for every `group` neighbouring video tokens in block order.

    Attributes:
        values: float8_e4m3fn [B, H, rows, D], contiguous; rows = ceil(L / group).
        scales: float32 [B, H, rows], what a row of `values` is multiplied with. gamma is part of it.
        group: how many neighbouring tokens in block order share a row, which is the mean of what they lost.
    """

    values: torch.Tensor
    scales: torch.Tensor
    group: int

    def __getitem__(self, part: tuple) -> Delta:
        """The deltas of a part of the batch and the heads."""
        return Delta(self.values[part], self.scales[part], self.group)

    def rows(self, length: int) -> torch.Tensor:
        """What is added to each of `length` tokens in block order: float32 [B, H, length, D]."""
        rows = self.values.float() * self.scales[..., None]
        return rows.repeat_interleave(self.group, 2)[:, :, :length]


def measure_delta(
    dense: torch.Tensor, sparse: torch.Tensor, order: TokenOrder, group: int = 1, gamma: float = 1.0
) -> Delta:
    """gamma * (dense - sparse) as it is stored. A difference that is not finite counts as 0.

    Args:
        dense, sparse: outputs of the two calls [B, H, L, D] for the video tokens, in raster order.
        order: the order of the query blocks.
        group: number of neighbouring tokens in that order that share a row.
    """
    batch, heads, length, dim = dense.shape
    values = torch.empty(batch, heads, -(-length // group), dim, dtype=torch.float8_e4m3fn, device=dense.device)
    scales = torch.empty(values.shape[:3], dtype=torch.float32, device=dense.device)
    step = max(1, _AT_ONCE // (batch * length * dim))
    for first in range(0, heads, step):
        part = slice(None), slice(first, first + step)
        lost = (dense[part].float() - sparse[part].float()).nan_to_num_(0.0, 0.0, 0.0)
        rows = pool(order[part].apply(lost), group, group)
        scale = (rows.abs().amax(-1) / _LARGEST).clamp_min(torch.finfo(torch.float32).tiny)
        values[part] = (rows / scale[..., None]).to(torch.float8_e4m3fn)
        scales[part] = scale * gamma
    return Delta(values, scales, group)


def delta_bytes(heads: int, length: int, dim: int, group: int) -> int:
    """Bytes of a `Delta` for one batch entry with `length` video tokens."""
    return heads * -(-length // group) * (dim + 4)
