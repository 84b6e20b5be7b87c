"""DoRA as PEFT trains it, as a ComfyUI weight adapter. Imports ComfyUI: import it inside functions.

ComfyUI's own `dora_scale` divides by the norm of the weight without the LoRA, PEFT by the norm of the weight with it.
"""

from __future__ import annotations

from typing import Any

import comfy.model_management
import torch
from comfy.weight_adapter.base import WeightAdapterBase


class PeftDora(WeightAdapterBase):
    """m (W + s B A) / |W + s B A|, with one norm and one m per output; strength goes from W to that.

    `weights` are up [out, r, ...], down [r, in, ...], alpha (a number or None) and the magnitude m [out] in any layout.
    """

    name = "peft_dora"

    def __init__(self, loaded_keys: set[str], weights: tuple[Any, ...]) -> None:
        self.loaded_keys = loaded_keys
        self.weights = weights

    def calculate_weight(
        self,
        weight: torch.Tensor,
        key: str,
        strength: float,
        strength_model: float,
        offset: Any,
        function: Any,
        intermediate_dtype: torch.dtype = torch.float32,
        original_weight: Any = None,
    ) -> torch.Tensor:
        """The patched weight; see ComfyUI's class."""
        up, down, magnitude = (
            comfy.model_management.cast_to_device(tensor, weight.device, intermediate_dtype)
            for tensor in (self.weights[0], self.weights[1], self.weights[3])
        )
        alpha = self.weights[2]
        scale = 1.0 if alpha is None else alpha / down.shape[0]
        product = torch.mm(up.flatten(start_dim=1), down.flatten(start_dim=1)).reshape(weight.shape)
        directed = weight.to(intermediate_dtype) + scale * product
        column = (-1, *[1] * (weight.dim() - 1))
        norm = directed.flatten(start_dim=1).norm(dim=1).reshape(column)
        target = directed * (magnitude.reshape(weight.shape[0]).reshape(column) / norm)
        weight += function((strength * (target - weight)).type(weight.dtype))
        return weight
