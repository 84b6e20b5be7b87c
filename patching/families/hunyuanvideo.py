"""HunyuanVideo 1.0 and 1.5 with their image-to-video and upscaling variants: joint attention over the text, with
everything that is joined to it, and the grid after it.

Double blocks come first, then single blocks, which ComfyUI counts from 0 again. The token refiners, which see the text
alone, stay dense.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ...kernels.order import TokenLayout
from ..core import network_of
from ..layout import ModelCall, count, grid_of
from ..support import Family, Support, Variant


def _read(network: Any, x: torch.Tensor, context: torch.Tensor, conds: Mapping[str, Any]) -> ModelCall | str:
    """The text is joined by txt_byt5 (glyphs) and clip_fea (the start image), both [B, L, C], and a reference image,
    ref_latent [B, C, T, H, W]."""
    if conds.get("attention_mask") is not None:
        return (
            "this prompt is padded, so the model masks a part of it in every attention call, which PSA leaves dense; "
            "encode the prompt with ComfyUI's own text node, which does not pad"
        )
    before = context.shape[1]
    joined = (conds.get("txt_byt5") if network.byt5_in is not None else None, conds.get("clip_fea"))
    before += sum(tokens.shape[1] for tokens in joined if tokens is not None)
    reference = conds.get("ref_latent")
    if reference is not None:
        before += count(grid_of(reference.shape[2:], network.patch_size))
    layout = TokenLayout(grid_of(x.shape[2:], network.patch_size), before)
    return ModelCall(layout, (context.shape[1],), first_blocks={"single": len(network.double_blocks)})


def _support(model: Any, config: Mapping[str, Any]) -> Support | str:
    if config.get("vec_in_dim") is None and config.get("vision_in_dim") is None:
        return "this model is HunyuanImage, which makes images; connect a video model to use PSA"
    network = network_of(model)
    name = f"HunyuanVideo {'1.0' if config.get('vision_in_dim') is None else '1.5'}, {config.get('num_heads')} heads"
    return Support(name, len(network.double_blocks) + len(network.single_blocks), _read)


FAMILY = Family(
    "HunyuanVideo",
    ("hunyuan_video",),
    _support,
    (
        Variant("1.0 T2V, I2V", before="text"),
        Variant("1.0 with a reference image", before="text, reference"),
        Variant("SkyReels I2V", before="text"),
        Variant("1.5 T2V, I2V", before="start image, glyphs, text"),
        Variant("1.5 upscaling", before="text"),
        Variant("padded prompts", psa="dense: the model masks the padding"),
    ),
)
