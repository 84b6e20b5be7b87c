"""One call of the Triton backend: what its stages need, whole or a part of its heads."""

from __future__ import annotations

import dataclasses

import torch

from ..config import PyramidConfig
from ..delta import Delta
from ..levels import BlockLists
from ..order import TokenOrder


@dataclasses.dataclass(frozen=True)
class Call:
    """The inputs of `backend.attend_video`, and the levels that it uses."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    config: PyramidConfig
    query_order: TokenOrder
    key_order: TokenOrder
    scale: float
    extra_k: torch.Tensor | None
    extra_v: torch.Tensor | None
    lists: BlockLists
    delta: Delta | None

    def __getitem__(self, part: tuple) -> Call:
        """A part of the batch and the heads."""
        split = {name: getattr(self, name) for name in _BY_HEAD}
        return dataclasses.replace(self, **{name: x[part] for name, x in split.items() if x is not None})


_BY_HEAD = ("q", "k", "v", "query_order", "key_order", "extra_k", "extra_v", "lists", "delta")
