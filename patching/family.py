"""Which models PSA supports, and which preset `auto` takes for them. For any other model it gives a reason.

It only reads what ComfyUI worked out about the checkpoint; nothing is guessed from names.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from ..cogvideox.corrections import missing_corrections
from .core import is_causal_wan, network_of, unet_config
from .layout import (
    CallReader,
    read_animate_call,
    read_cogvideox_call,
    read_humo_call,
    read_s2v_call,
    read_scail_call,
    read_vace_call,
    read_wan_call,
)

# On the demo model topk 10/5/0/20 is 2 dB closer to dense than the budget mode of the per-size presets
# (docs/performance.md). `auto` takes it for every size until this is measured on real weights.
_WAN_PRESET = "module-default"
WAN_READERS: dict[str, CallReader] = {
    "t2v": read_wan_call,
    "i2v": read_wan_call,
    "camera": read_wan_call,
    "camera_2.2": read_wan_call,
    "wandancer": read_wan_call,
    "vace": read_vace_call,
    "animate": read_animate_call,
    "humo": read_humo_call,
    "s2v": read_s2v_call,
    "scail": read_scail_call,
    "scail2": read_scail_call,
}
"""By ComfyUI's name of the Wan variant. First-last frame, Fun, Phantom and in-context references are t2v or i2v."""
_COGVIDEOX_PRESETS = {None: "cogvideox-5b", 2: "cogvideox1.5-5b"}
"""By temporal patch size. Our presets share the same levels; they differ in the published presets they go with."""


@dataclasses.dataclass(frozen=True)
class Family:
    """A model that PSA supports.

    Attributes:
        name: for messages; preset: the one that `auto` takes; blocks: its number of transformer blocks.
        read_call: where the tokens lie in a call of the model.
        advice: one sentence that the user should know about this model, or None.
    """

    name: str
    preset: str
    blocks: int
    read_call: CallReader
    advice: str | None = None


def find_family(model: Any) -> Family | str:
    """The family of a ComfyUI MODEL (ModelPatcher), or the reason why PSA does not support it, as a sentence."""
    config = unet_config(model)
    image_model = config.get("image_model")
    if image_model == "cogvideox":
        return _cogvideox(model, config)
    if image_model != "wan2.1":
        given = image_model or type(model.model).__name__
        return f"PSA supports Wan2.1, Wan2.2 and CogVideoX so far; this model is {given}"
    if is_causal_wan(model):
        return "this Wan model is autoregressive: it samples frame by frame with a cache, which PSA does not support"
    variant = config.get("model_type")
    if variant not in WAN_READERS:
        return f"PSA supports the Wan variants {', '.join(WAN_READERS)} so far; this one is {variant}"
    name = f"Wan {variant}, hidden size {config.get('dim')}"
    return Family(name, _WAN_PRESET, len(network_of(model).blocks), WAN_READERS[variant])


def _cogvideox(model: Any, config: Any) -> Family | str:
    temporal = config.get("patch_size_t")
    if temporal not in _COGVIDEOX_PRESETS:
        return f"PSA supports CogVideoX 1.0 and 1.5; this model has temporal patches of {temporal}"
    name = f"CogVideoX {'1.0' if temporal is None else '1.5'}, {config.get('num_attention_heads')} heads"
    blocks = len(network_of(model).blocks)
    return Family(name, _COGVIDEOX_PRESETS[temporal], blocks, read_cogvideox_call, missing_corrections(model))
