"""Which models PSA serves, and which preset `auto` takes for them. A model it does not serve gets a reason.

Reads only what ComfyUI found out about the checkpoint (`model_config.unet_config`); nothing is guessed from names.
"""

from __future__ import annotations

import dataclasses
from typing import Any

# On the demo model topk 10/5/0/20 is 2 dB closer to dense than the budget mode of the per-size presets (README,
# Figures); until that is measured on real weights, `auto` takes it for every size.
_WAN_PRESET = "module-default"
_WAN_TYPES = ("t2v", "i2v")


@dataclasses.dataclass(frozen=True)
class Family:
    """A model that PSA serves: a name for messages, the preset of `auto`, its number of transformer blocks."""

    name: str
    preset: str
    blocks: int


def find_family(model: Any) -> Family | str:
    """The family of a ComfyUI MODEL (ModelPatcher), or the reason why PSA cannot serve it, as a sentence."""
    config = getattr(getattr(model.model, "model_config", None), "unet_config", {})
    image_model = config.get("image_model")
    if image_model != "wan2.1":
        return f"PSA serves Wan2.1 and Wan2.2 so far; this model is {image_model or type(model.model).__name__}"
    variant = config.get("model_type")
    if variant not in _WAN_TYPES or config.get("causal_ar"):
        return f"PSA serves the Wan variants {' and '.join(_WAN_TYPES)} so far; this one is {variant}"
    diffusion_model = model.get_model_object("diffusion_model")
    size = config.get("dim")
    name = f"Wan {variant}, hidden size {size}"
    return Family(name, _WAN_PRESET, len(diffusion_model.blocks))
