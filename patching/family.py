"""Which models PSA serves, and which preset `auto` takes for them. A model it does not serve gets a reason.

Reads only what ComfyUI found out about the checkpoint (`model_config.unet_config`); nothing is guessed from names.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from ..cogvideox.corrections import missing_corrections
from .layout import CallReader, read_cogvideox_call, read_wan_call

# On the demo model topk 10/5/0/20 is 2 dB closer to dense than the budget mode of the per-size presets (README,
# Figures); until that is measured on real weights, `auto` takes it for every size.
_WAN_PRESET = "module-default"
_WAN_TYPES = ("t2v", "i2v")
_COGVIDEOX_PRESETS = {None: "cogvideox-5b", 2: "cogvideox1.5-5b"}
"""By temporal patch size. Ours share one pyramid; they differ in the published presets beside them."""


@dataclasses.dataclass(frozen=True)
class Family:
    """A model that PSA serves.

    Attributes:
        name: for messages; preset: the one of `auto`; blocks: its number of transformer blocks.
        read_call: where the tokens lie in a call of the model.
        advice: what the user should know about this model, as a sentence, or None.
    """

    name: str
    preset: str
    blocks: int
    read_call: CallReader
    advice: str | None = None


def find_family(model: Any) -> Family | str:
    """The family of a ComfyUI MODEL (ModelPatcher), or the reason why PSA cannot serve it, as a sentence."""
    config = getattr(getattr(model.model, "model_config", None), "unet_config", {})
    image_model = config.get("image_model")
    if image_model == "cogvideox":
        return _cogvideox(model, config)
    if image_model != "wan2.1":
        given = image_model or type(model.model).__name__
        return f"PSA serves Wan2.1, Wan2.2 and CogVideoX so far; this model is {given}"
    variant = config.get("model_type")
    if variant not in _WAN_TYPES or config.get("causal_ar"):
        return f"PSA serves the Wan variants {' and '.join(_WAN_TYPES)} so far; this one is {variant}"
    diffusion_model = model.get_model_object("diffusion_model")
    size = config.get("dim")
    name = f"Wan {variant}, hidden size {size}"
    return Family(name, _WAN_PRESET, len(diffusion_model.blocks), read_wan_call)


def _cogvideox(model: Any, config: dict[str, Any]) -> Family | str:
    temporal = config.get("patch_size_t")
    if temporal not in _COGVIDEOX_PRESETS:
        return f"PSA serves CogVideoX 1.0 and 1.5; this model has temporal patches of {temporal}"
    name = f"CogVideoX {'1.0' if temporal is None else '1.5'}, {config.get('num_attention_heads')} heads"
    blocks = len(model.get_model_object("diffusion_model").blocks)
    return Family(name, _COGVIDEOX_PRESETS[temporal], blocks, read_cogvideox_call, missing_corrections(model))
