"""The `forward` of a self-attention module with PSA on it: answers its calls of scaled_dot_product_attention.

A TorchFunctionMode of this thread does it, so nothing in torch is patched. It is entered and left around `forward`;
module hooks cannot do that, because torch does not run them after an interrupt. Attention that does not go through
scaled_dot_product_attention (flex, sage, xformers) is not seen. It stays as it is, and we report that.
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
    """Context manager around one self-attention in transformer block `block`.

    Attributes:
        seen: whether there was an attention call.
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
            output = func(*args, **kwargs)
            self.state.learn(self.call, output, *args, **kwargs)
            return output
        return func(*args, **kwargs)

    def __exit__(self, *_: Any) -> None:
        """Remove this mode from the stack, wherever it is: others may have pushed theirs on top, or popped this one."""
        if not any(mode is self for mode in _get_current_function_mode_stack()):
            return
        above = []
        while (mode := _pop_mode()) is not self:
            above.append(mode)
        for mode in reversed(above):
            _push_mode(mode)


class InterceptedForward:
    """Wraps the `forward` of a self-attention module until `remove`, whatever else is put around it."""

    def __init__(self, attention: torch.nn.Module, state: TransformerState, block: int) -> None:
        previous = attention.forward
        while isinstance(previous, InterceptedForward) and previous.state is None:
            previous = previous.previous  # one that was removed while something else wrapped it
        functools.update_wrapper(self, previous, updated=())  # callers ask for the signature
        self.attention, self.block = attention, block
        self.previous: Callable[..., Any] = previous
        self.state: TransformerState | None = state
        self._replaced = attention.__dict__.get(_FORWARD)
        attention.forward = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the module's own `forward` returns."""
        state = self.state
        call = None if state is None else state.current_call()
        if state is None or call is None:
            return self.previous(*args, **kwargs)
        with AttentionInterception(state, call, self.block) as interception:
            output = self.previous(*args, **kwargs)
        state.end_attention(call, self.attention, interception.seen)
        return output

    def remove(self) -> None:
        """Remove it; if something has been put around it since, it stays there and does nothing."""
        self.state = None
        if self.attention.__dict__.get(_FORWARD) is not self:
            return
        if self._replaced is None:
            del self.attention.forward
        else:
            self.attention.forward = self._replaced
