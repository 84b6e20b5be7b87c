"""Mochi: joint attention over the grid and the text after it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ...kernels.order import TokenLayout
from ..core import network_of
from ..layout import ModelCall, grid_of
from ..support import Family, Support, Variant

_TEXT_TOKENS = 256
"""How much of the text Mochi uses if nothing says how long it is."""


def _read(network: Any, x: torch.Tensor, context: torch.Tensor, conds: Mapping[str, Any]) -> ModelCall:
    """Padding at the end of the text, from num_tokens on, is left out."""
    after = min(conds.get("num_tokens", _TEXT_TOKENS), context.shape[1])
    patch = (1, network.patch_size, network.patch_size)
    return ModelCall(TokenLayout(grid_of(x.shape[2:], patch), after=after))


def _support(model: Any, config: Mapping[str, Any]) -> Support | str:
    return Support(f"Mochi, {config.get('num_heads')} heads", len(network_of(model).blocks), _read)


FAMILY = Family(
    "Mochi",
    ("mochi_preview",),
    _support,
    (Variant("1 preview", after="text"),),
)
