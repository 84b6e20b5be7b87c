"""MiniMax H3: one packed sequence of text, keyframes or references, audio, and the video at the end."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ...kernels.order import TokenLayout
from ..core import network_of
from ..layout import ModelCall, grid_of
from ..support import Family, Support, Variant


def _read(network: Any, x: torch.Tensor, context: torch.Tensor, conds: Mapping[str, Any]) -> ModelCall | str:
    """ComfyUI packs once per run and hands over where everything is: segments (start, stop, kind) of the layout."""
    grid = grid_of(x.shape[2:], network.patch_size)
    packed = (conds.get("minimax_payload") or {}).get("layout")
    start, stop, kind = (0, 0, "") if packed is None else packed.segments[-1]
    layout = TokenLayout(grid, before=start)
    if kind != "video" or stop - start != layout.video:
        return "this call is on another part of the video than ComfyUI packed; sample the whole video at once"
    return ModelCall(layout, (context.shape[1],))


def _support(model: Any, config: Mapping[str, Any]) -> Support | str:
    return Support(f"MiniMax H3, {config.get('num_attention_heads')} heads", len(network_of(model).blocks), _read)


FAMILY = Family(
    "MiniMax H3",
    ("minimax_h3",),
    _support,
    (
        Variant("T2V", before="text, sound"),
        Variant("with keyframes or references", before="text, keyframes or references, sound"),
    ),
)
