"""While one self-attention module runs: answers the scaled_dot_product_attention that it calls, and nothing else.

A TorchFunctionMode of this thread, so nothing is patched. Attention backends that do not go through
scaled_dot_product_attention are not seen; their calls stay what they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from .state import CallState


class AttentionInterception(TorchFunctionMode):
    """Context manager around the self-attention of transformer block `block`."""

    def __init__(self, state: CallState, block: int) -> None:
        super().__init__()
        self.state = state
        self.block = block

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            output = self.state.attend(self.block, *args, **kwargs)
            if output is not None:
                return output
        return func(*args, **kwargs)
