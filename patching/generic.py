"""A video model that nobody named, with the preset `generic`: PSA assumes a plain grid and says so.

The assumption: in every block, self-attention is over the T x H x W patches of the latent and nothing else. Calls of
another length show that it is wrong; they stay dense.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..kernels.order import TokenLayout
from .core import network_of, unet_config
from .layout import ModelCall, grid_of
from .support import Support

GENERIC = "generic"
"""Name of the preset."""


def plain_grid(model: Any) -> Support | str:
    """How PSA would support any video MODEL, or the reason why it cannot, as a sentence."""
    network = network_of(model)
    name = unet_config(model).get("image_model") or type(network).__name__
    patch, blocks = _patch_size(network), _blocks(network)
    if patch is None or not blocks:
        return f"the network of this model ({name}) does not say what PSA needs to know: its patch size and its blocks"
    advice = (
        f"nobody has tried PSA on this model ({name}): it assumes that self-attention in all {blocks} blocks is over "
        f"the latent in patches of {'x'.join(map(str, patch))} (time, height, width) and nothing else; compare a video "
        f"with the dense one first"
    )
    return Support(f"a plain grid, {name}", blocks, _read, GENERIC, advice, assumed=True)


def _read(network: Any, x: torch.Tensor, context: Any, conds: Mapping[str, Any]) -> ModelCall | str:
    patch = _patch_size(network)
    if patch is None or x.ndim != 5 or x.shape[2] == 1:
        return "a single image is sampled, and PSA is for video; sample more frames, or leave out PSA Patch"
    contexts = (context.shape[1],) if isinstance(context, torch.Tensor) and context.ndim > 1 else ()
    return ModelCall(TokenLayout(grid_of(x.shape[2:], patch)), contexts)


def _patch_size(network: Any) -> tuple[int, int, int] | None:
    """(time, height, width) by the names that networks of ComfyUI use for it; None if there are none."""
    side = getattr(network, "patch_size", getattr(network, "patch_spatial", None))
    time = getattr(network, "patch_size_t", getattr(network, "patch_temporal", None)) or 1
    sizes = (side, side) if isinstance(side, int) else tuple(side or ())
    sizes = (time, *sizes) if len(sizes) == 2 else sizes
    return sizes if len(sizes) == 3 and all(isinstance(size, int) and size > 0 for size in sizes) else None


def _blocks(network: Any) -> int:
    """Number of transformer blocks: those of the longest stack."""
    stacks = (part for part in network.children() if isinstance(part, torch.nn.ModuleList | torch.nn.ModuleDict))
    return max(map(len, stacks), default=0)
