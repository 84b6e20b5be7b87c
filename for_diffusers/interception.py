"""The `forward` of a self-attention module with PSA on it: answers its calls of scaled_dot_product_attention.

A TorchFunctionMode of this thread does it, so nothing in torch is patched. It is entered and left around `forward`;
module hooks cannot do that, because torch does not run them after an interrupt. Attention that does not go through
scaled_dot_product_attention (flex, sage, xformers) is not seen. It stays as it is, and we report that.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack, _pop_mode, _push_mode

from ..kernels.backends import in_autocast
from .attention_backends import unseen_backend
from .operator import ATTENTION, Untraced, attention_operator
from .state import BYPASSED, Call, TransformerState

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

    def __torch_function__(self, func: Callable, _: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func is ATTENTION:
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


class GraphInterception(TorchFunctionMode):
    """What a compiler traces instead: the operator. See `AttentionInterception`."""

    def __init__(self, operator: Callable[..., torch.Tensor], block: torch.Tensor) -> None:
        super().__init__()
        self.operator, self.block = operator, block
        self.seen = False

    def __torch_function__(self, func: Callable, _: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func is ATTENTION:
            self.seen = True
            return attend_in_graph(self.operator, self.block, *args, **kwargs)
        if isinstance(func, types.FunctionType) and getattr(torch.Tensor, func.__name__, None) is func:
            # Compilers know tensors' own methods by name only, not the functions behind them.
            return getattr(args[0], func.__name__)(*args[1:], **kwargs)
        return func(*args, **kwargs)


def attend_in_graph(
    operator: Callable[..., torch.Tensor],
    block: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *args: Any,
    **kwargs: Any,
) -> torch.Tensor:
    """The operator, with the arguments of scaled_dot_product_attention."""
    return operator(*in_autocast(query, key, value), block, *args, **kwargs)


class InterceptedForward:
    """Wraps the `forward` of a self-attention module until `remove`, whatever else is put around it."""

    def __init__(self, attention: torch.nn.Module, state: TransformerState, block: int) -> None:
        previous = attention.forward
        while (owner := _owner(previous)) is not None and owner.state is None:
            previous = owner.previous  # one that was removed while something else wrapped it
        self.attention, self.block = attention, block
        self.previous: Callable[..., Any] = previous
        self.state: TransformerState | None = state
        self._seen_of: tuple = ()
        self._number = torch.tensor(block, device="cpu")
        self._operator = attention_operator()
        self._untraced = Untraced(
            self._intercept, "PSA computes no gradients, or this torch is too old for its operator"
        )
        self._untraced_end = Untraced(self._end_unseen, "PSA cannot see this self-attention")
        self._replaced = attention.__dict__.get(_FORWARD)
        # A method, not this object: compilers look at the code of a method, and every block has the same.
        attention.forward = types.MethodType(_forward_like(previous), self)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_operator": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _operator=attention_operator())

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module's own `forward` returns."""
        if not torch.compiler.is_compiling():
            return self._intercept(*args, **kwargs)
        if self._operator is None or torch.is_grad_enabled():
            return self._untraced(*args, **kwargs)
        interception = GraphInterception(self._operator, self._number)
        with interception:
            output = self.previous(*args, **kwargs)
        if not interception.seen:
            self._untraced_end()
        return output

    def _intercept(self, *args: Any, **kwargs: Any) -> Any:
        state = self.state
        call = None if state is None else state.current_call()
        if state is None or call is None:
            # A checkpoint of the activations computes a block again when the call is over, with gradients.
            if state is not None and not torch.is_grad_enabled():
                state.tell(BYPASSED)
            return self.previous(*args, **kwargs)
        with AttentionInterception(state, call, self.block) as interception:
            output = self.previous(*args, **kwargs)
        state.end_attention(call, self.attention, interception.seen or self._skips_attention())
        if interception.seen:
            self._seen_of = self._processor()
        return output

    def _skips_attention(self) -> bool:
        """Whether a call without attention has none: in others, the same processor attends where PSA sees it. Guidance
        by a weakened model does that."""
        return self._seen_of == self._processor() and unseen_backend(self.attention) is None

    def _processor(self) -> tuple[Any]:
        return (getattr(self.attention, "processor", None),)

    def _end_unseen(self) -> None:
        call = None if self.state is None else self.state.current_call()
        if self.state is not None and call is not None:
            self.state.end_attention(call, self.attention, False)

    def remove(self) -> None:
        """Remove it; if something has been put around it since, it stays there and does nothing."""
        self.state = None
        if _owner(self.attention.__dict__.get(_FORWARD)) is not self:
            return
        if self._replaced is None:
            del self.attention.forward
        else:
            self.attention.forward = self._replaced


def _forward_like(previous: Callable[..., Any]) -> Callable[..., Any]:
    """`InterceptedForward.forward` with the signature of `previous`; callers ask for it."""

    def forward(self: InterceptedForward, *args: Any, **kwargs: Any) -> Any:
        return self.forward(*args, **kwargs)

    signature = inspect.signature(previous)
    own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    forward.__dict__["__signature__"] = signature.replace(parameters=[own, *signature.parameters.values()])
    return forward


def _owner(forward: Any) -> InterceptedForward | None:
    owner = getattr(forward, "__self__", None)
    return owner if isinstance(owner, InterceptedForward) else None
