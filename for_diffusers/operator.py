"""A self-attention's call of scaled_dot_product_attention as an operator of torch, for transformers that are compiled.

A graph is made once and runs in every step, so it must hold nothing that a step decides. The operator gets what
scaled_dot_product_attention gets. When it runs, it finds the call of the transformer that this thread is in, and does
what PSA does without a compiler: sparse, dense or learning. Outside of such a call it is the dense attention.

The number of the block comes as a tensor: a graph looks at the values of its tensors in every run, so that one graph
serves all blocks. A number would be part of the graph.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch

from ..sampling.operators import Operator, register

ATTENTION: Callable[..., torch.Tensor] = torch._C._nn.scaled_dot_product_attention
"""torch's own function, which a script's replacement of the one in `torch.nn.functional` may end up calling."""
current: ContextVar[Any] = ContextVar("psa_transformer", default=None)
"""For operators: the `TransformerState` of the transformer that this thread is in; it knows the call."""


class Untraced:
    """A function that compilers leave alone. It can be copied and sent to another process, unlike what torch makes.

    reason: a sentence for the compiler's error if it must not break a graph here.
    """

    def __init__(self, function: Callable[..., Any], reason: str) -> None:
        self.__wrapped__, self._reason = function, reason
        try:
            self._apart = torch.compiler.disable(function, reason=reason)
        except TypeError:  # an older torch gives no reasons
            self._apart = torch.compiler.disable(function)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._apart(*args, **kwargs)

    def __reduce__(self) -> tuple:
        return Untraced, (self.__wrapped__, self._reason)


@functools.cache
def attention_operator() -> Operator | None:
    """The operator; None if torch is too old for it."""
    return register("scaled_dot_product_attention", _attention, _like_attention)


def _attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    block: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    given = (attn_mask, dropout_p, is_causal)
    state = current.get()
    call = None if state is None else state.current_call()
    if state is None or call is None:
        output = ATTENTION(q, k, v, *given, scale=scale, enable_gqa=enable_gqa)
    else:
        call.attentions += 1
        output = state.attend(call, int(block), q, k, v, *given, scale=scale, enable_gqa=enable_gqa)
        if output is None:
            output = ATTENTION(q, k, v, *given, scale=scale, enable_gqa=enable_gqa)
            state.learn(call, output, q, k, v, *given, scale=scale, enable_gqa=enable_gqa)
    return output.transpose(1, 2).contiguous().transpose(1, 2)


def _like_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    """An output [B, H, L, D] whose heads are next to each other in memory, as PSA writes them."""
    batch, heads, tokens = q.shape[:3]
    return q.new_empty(batch, tokens, heads, v.shape[-1]).transpose(1, 2)
