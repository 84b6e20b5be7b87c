"""Cosmos Predict 2: self-attention over the video grid; the text is in cross-attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ...kernels.order import TokenLayout
from ..core import network_of
from ..layout import ModelCall, grid_of
from ..support import Family, Support, Variant


def _read(network: Any, x: torch.Tensor, context: torch.Tensor, conds: Mapping[str, Any]) -> ModelCall:
    patch = (network.patch_temporal, network.patch_spatial, network.patch_spatial)
    return ModelCall(TokenLayout(grid_of(x.shape[2:], patch)), (context.shape[1],))


def _support(model: Any, config: Mapping[str, Any]) -> Support | str:
    return Support(f"Cosmos Predict 2, {config.get('num_heads')} heads", len(network_of(model).blocks), _read)


FAMILY = Family(
    "Cosmos Predict 2",
    ("cosmos_predict2",),
    _support,
    (Variant("T2V, I2V"),),
)
