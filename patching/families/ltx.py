"""LTX-Video 0.9 and LTX-2: self-attention over the video grid, one token for each latent pixel, and keyframe guides
after it. Attention of the audio, and between audio and video, stays dense.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ...kernels.order import TokenLayout
from ..core import network_of
from ..layout import ModelCall
from ..support import Family, Support, Variant


def _read(network: Any, x: torch.Tensor, context: torch.Tensor, conds: Mapping[str, Any]) -> ModelCall | str:
    """Guides are the latent's last frames; keyframe_idxs [B, 3, L, 2] has an entry for each of their tokens. The model
    leaves out tokens for which denoise_mask [B, 1, T, H, W] is below 0."""
    frames, height, width = x.shape[2:]
    keyframes = conds.get("keyframe_idxs")
    tokens = after = 0 if keyframes is None else keyframes.shape[2]
    if tokens:
        entries = conds.get("guide_attention_entries") or ()
        if any(entry["strength"] != 1.0 or entry.get("pixel_mask") is not None for entry in entries):
            return (
                "guides with a strength other than 1 or an attention_mask mask every attention call, which PSA leaves "
                "dense; in all LTXVAddGuide nodes, set strength to 1 and unplug attention_mask"
            )
        left_out = (conds["denoise_mask"][0] < 0).any(0).expand(x.shape[2:]).flatten()
        after -= int(left_out[-tokens:].sum())
        if tokens % (height * width) or left_out[:-tokens].any():
            return (
                "the guides do not cover whole frames, so PSA does not know where the video is; sample without guides"
            )
    layout = TokenLayout((frames - tokens // (height * width), height, width), after=after)
    return ModelCall(layout, (context.shape[1],), network.inner_dim)


def _support(model: Any, config: Mapping[str, Any]) -> Support | str:
    network = network_of(model)
    version = "2" if config.get("image_model") == "ltxav" else "Video"
    return Support(f"LTX {version}, {network.num_attention_heads} heads", len(network.transformer_blocks), _read)


FAMILY = Family(
    "LTX-Video, LTX-2",
    ("ltxv", "ltxav"),
    _support,
    (
        Variant("0.9 2B T2V, I2V", heads="64"),
        Variant("0.9 13B T2V, I2V"),
        Variant("2 with or without sound"),
        Variant("keyframe guides", after="guides", heads="64, 128"),
        Variant("guides with a strength or mask", after="guides", heads="64, 128", psa="dense: masks in every call"),
    ),
)
