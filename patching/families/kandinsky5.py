"""Kandinsky 5: self-attention over the video grid; the text is in cross-attention. Its text blocks stay dense."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ...kernels.order import TokenLayout
from ..core import network_of
from ..layout import ModelCall, grid_of
from ..support import Family, Support, Variant


def _read(network: Any, x: torch.Tensor, context: torch.Tensor, conds: Mapping[str, Any]) -> ModelCall:
    return ModelCall(TokenLayout(grid_of(x.shape[2:], network.patch_size)), (context.shape[1],))


def _support(model: Any, config: Mapping[str, Any]) -> Support | str:
    name = f"Kandinsky 5, hidden size {config.get('model_dim')}"
    return Support(name, len(network_of(model).visual_transformer_blocks), _read)


FAMILY = Family(
    "Kandinsky 5",
    ("kandinsky5",),
    _support,
    (
        Variant("Lite T2V, I2V", heads="64"),
        Variant("Pro T2V, I2V"),
    ),
)
