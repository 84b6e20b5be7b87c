"""CogVideoX 1.0 and 1.5: one joint attention per block over the text and the grid after it, no cross-attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ...cogvideox.corrections import missing_corrections
from ...kernels.order import TokenLayout
from ..core import network_of
from ..layout import ModelCall, grid_of
from ..support import Family, Support, Variant

_PRESETS = {None: "cogvideox-5b", 2: "cogvideox1.5-5b"}
"""By temporal patch size. Our presets share the same levels; they differ in the published presets they go with."""


def _read(network: Any, x: torch.Tensor, context: torch.Tensor, conds: Mapping[str, Any]) -> ModelCall:
    """The text has 226 tokens, or a multiple if ComfyUI repeats a prompt."""
    patch = (network.patch_size_t or 1, network.patch_size, network.patch_size)
    return ModelCall(TokenLayout(grid_of(x.shape[2:], patch), before=context.shape[1]))


def _support(model: Any, config: Mapping[str, Any]) -> Support | str:
    temporal = config.get("patch_size_t")
    if temporal not in _PRESETS:
        return f"PSA supports CogVideoX 1.0 and 1.5; this model has temporal patches of {temporal}"
    name = f"CogVideoX {'1.0' if temporal is None else '1.5'}, {config.get('num_attention_heads')} heads"
    return Support(name, len(network_of(model).blocks), _read, _PRESETS[temporal], missing_corrections(model))


FAMILY = Family(
    "CogVideoX",
    ("cogvideox",),
    _support,
    (Variant("1.0 and 1.5, T2V and I2V", before="text", heads="64"),),
)
