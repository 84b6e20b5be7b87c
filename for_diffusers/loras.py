"""How strongly a transformer's LoRAs act in a call; scripts change it between two steps."""

from __future__ import annotations

from typing import Any


def lora_strengths(transformer: Any) -> tuple:
    """What PEFT adds to the weights, and how strongly: equal for two calls between which nothing has changed."""
    if not getattr(transformer, "peft_config", None):
        return ()
    return tuple(
        (tuple(layer.active_adapters), layer.disable_adapters, tuple(layer.merged_adapters), tuple(scaling.items()))
        for layer in transformer.modules()
        if isinstance(scaling := getattr(layer, "scaling", None), dict) and hasattr(layer, "merged_adapters")
    )
