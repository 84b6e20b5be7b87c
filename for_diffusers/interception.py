"""The `forward` of a self-attention module while PSA is on it: answers the scaled_dot_product_attention that it calls.

A TorchFunctionMode of this thread does it, so nothing of torch is patched. It is entered and left around `forward`
because hooks of a module cannot: torch does not run them after an interrupt. What does not go through
scaled_dot_product_attention (flex, sage, xformers) is not seen; it stays what it is, and that is said.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack, _pop_mode, _push_mode

from .state import Call, TransformerState

_FORWARD = "forward"


class AttentionInterception(TorchFunctionMode):
    """Context manager around one self-attention of transformer block `block`.

    Attributes:
        seen: whether an attention call has come by.
    """

    def __init__(self, state: TransformerState, call: Call, block: int) -> None:
        super().__init__()
        self.state, self.call, self.block = state, call, block
        self.seen = False

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            self.seen = True
            output = self.state.attend(self.call, self.block, *args, **kwargs)
            if output is not None:
                return output
        return func(*args, **kwargs)

    def __exit__(self, *_: Any) -> None:
        """Take this mode off the stack, wherever it is: others may have put theirs on it, or taken this one off."""
        if not any(mode is self for mode in _get_current_function_mode_stack()):
            return
        above = []
        while (mode := _pop_mode()) is not self:
            above.append(mode)
        for mode in reversed(above):
            _push_mode(mode)


class InterceptedForward:
    """Stands before the `forward` of a self-attention module until `remove`, whatever else is put around it."""

    def __init__(self, attention: torch.nn.Module, state: TransformerState, block: int) -> None:
        previous = attention.forward
        while isinstance(previous, InterceptedForward) and previous.state is None:
            previous = previous.previous  # one that was removed while something was around it
        functools.update_wrapper(self, previous, updated=())  # the signature is asked for
        self.attention, self.previous, self.block = attention, previous, block
        self.state: TransformerState | None = state
        self._replaced = attention.__dict__.get(_FORWARD)
        attention.forward = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the module's own `forward` returns."""
        state = self.state
        call = None if state is None else state.current_call()
        if call is None:
            return self.previous(*args, **kwargs)
        with AttentionInterception(state, call, self.block) as interception:
            output = self.previous(*args, **kwargs)
        state.end_attention(call, self.attention, interception.seen)
        return output

    def remove(self) -> None:
        """Take it away; where something has been put around it since, it stays and does nothing."""
        self.state = None
        if self.attention.__dict__.get(_FORWARD) is not self:
            return
        if self._replaced is None:
            del self.attention.forward
        else:
            self.attention.forward = self._replaced
