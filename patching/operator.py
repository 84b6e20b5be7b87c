"""The attention call as an operator of torch, so that a compiled graph holds it as one node and never breaks at it.

ComfyUI's compile nodes drop all guards on transformer_options: whatever is read from them while a graph is made stays
as it was then. So the operator only gets tensors and what is written in the model's code (`written.py`). When it runs,
it finds the rest through the `ModelCall` of this thread, which lasts as long as the model call: the override, and
through its options the run. Then it does what the override does without a compiler: dense, learning or sparse. Without
a model call of PSA it computes the dense attention that the model called.

The number of the block is taken from the options that the network works with. A network that is compiled as a whole
writes it there only after its graph has run; but then the number is part of the graph. If that graph broke somewhere
else, nobody can tell, so it breaks here too.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import torch

from ..sampling.operators import Operator, register
from . import core, written

CALL_KEY = "psa_call"
"""Key in transformer_options under which the network's wrapper finds the current model call."""

_IN_OPTIONS, _IN_GRAPH, _NOWHERE = "options", "graph", "nowhere"
"""Where the number of the block is, see above."""
_NOT_GIVEN = -1
"""Instead of the number of a block."""
_SCHEMA = (
    "(Tensor q, Tensor k, Tensor v, str place, Tensor[] tensors, SymInt[] integers, float[] floats, str words, "
    "SymInt block, str kind) -> Tensor"
)


@dataclasses.dataclass(eq=False)
class ModelCall:
    """One forward of the network, as operators in its graphs find it.

    Attributes:
        attend: computes a call as the override does, with ComfyUI's arguments of an override.
        given: the transformer_options that the call began with.
        options: those that the network works with, once they are known; it writes the number of the block there.
        traced: whether the network's own forward is compiled.
    """

    attend: Callable[..., torch.Tensor]
    given: dict[str, Any]
    options: dict[str, Any] | None = None
    traced: bool = False


_current: ContextVar[ModelCall | None] = ContextVar("psa_model_call", default=None)


@contextlib.contextmanager
def model_call(attend: Callable[..., torch.Tensor], options: dict[str, Any]) -> Iterator[None]:
    """Inside it, operators of this thread attend with `attend`, see `ModelCall`."""
    call = ModelCall(attend, options)
    options[CALL_KEY] = call
    token = _current.set(call)
    try:
        yield
    finally:
        _current.reset(token)
        options.pop(CALL_KEY, None)
        call.options = None  # they refer to the call


def note_options(executor: Any, *args: Any, **kwargs: Any) -> Any:
    """The wrapper around a network's forward, see `core.wrap_network`. It may be compiled with the network; then the
    call learns of the options only where the graph ends or breaks."""
    options = core.options_of(args, kwargs)
    call = options.get(CALL_KEY)
    if call is not None:
        call.options = options
        call.traced = torch.compiler.is_compiling()
    return executor(*args, **kwargs)


class GraphCall:
    """What a compiler traces instead of an attention call: the operator, or a break where a graph cannot hold it."""

    def __init__(self, attend: Callable[..., torch.Tensor]) -> None:
        # Decorators would load the compiler at import.
        self._untraced = torch.compiler.disable(attend)
        self._operator = attention_operator()
        self._where_is_block = torch.compiler.assume_constant_result(_where_is_block)
        self._place_of = torch.compiler.assume_constant_result(written.place_of)

    def __call__(self, func: Callable[..., torch.Tensor], *args: Any, **kwargs: Any) -> torch.Tensor:
        """One node of the graph, or a break."""
        operator, where_is_block, place_of = self._operator, self._where_is_block, self._place_of
        q, k, v, *others = args
        arguments = written.write(others, {name: kwargs[name] for name in kwargs if name != "transformer_options"})
        where = where_is_block()
        fits = q.shape == v.shape and where != _NOWHERE and not _needs_gradients(q, k, v)
        place = place_of(func) if fits and written.may_have_a_place(func) else ""
        if operator is None or arguments is None or not place:
            return self._untraced(func, *args, **kwargs)
        block = core.block_of(kwargs.get("transformer_options") or {}) if where == _IN_GRAPH else {}
        return operator(q, k, v, place, *arguments, block.get(core.BLOCK, _NOT_GIVEN), block.get(core.KIND, ""))


@functools.cache
def attention_operator() -> Operator | None:
    """The operator; None if torch is too old for it."""
    return register("attention", _attention, _like_attention, _SCHEMA)


def _attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    place: str,
    tensors: Sequence[torch.Tensor],
    integers: Sequence[int],
    floats: Sequence[float],
    words: str,
    block: int,
    kind: str,
) -> torch.Tensor:
    args, kwargs = written.read(tensors, integers, floats, words)
    func, call = written.at(place), _current.get()
    if call is None:
        output = func(q, k, v, *args, **kwargs)
    else:
        options = call.given if call.options is None else call.options
        if block != _NOT_GIVEN:
            options = options | {core.BLOCK: block, core.KIND: kind}
        output = call.attend(func, q, k, v, *args, **kwargs, transformer_options=options)
    return _as_promised(output, (q, k, v, *tensors))


def _like_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    place: str,
    tensors: Sequence[torch.Tensor],
    integers: Sequence[int],
    floats: Sequence[float],
    words: str,
    *_: Any,
) -> torch.Tensor:
    """An output of the right shape and strides: heads are next to each other in memory, in either form."""
    args, kwargs = written.read(tensors, integers, floats, words)
    heads, by_heads, keeps_heads = _form(*args, **kwargs)
    batch, tokens = q.shape[0], q.shape[2 if by_heads else 1]
    dim = q.shape[3] if by_heads else q.shape[2] // heads
    if keeps_heads:
        return q.new_empty(batch, tokens, heads, dim).transpose(1, 2)
    return q.new_empty(batch, tokens, heads * dim)


def _as_promised(output: torch.Tensor, given: Sequence[torch.Tensor]) -> torch.Tensor:
    """The output with the type and strides of `_like_attention`, in memory of its own, as every operator promises."""
    output = output.to(given[0].dtype)
    output = output.transpose(1, 2).contiguous().transpose(1, 2) if output.ndim == 4 else output.contiguous()
    storage = output.untyped_storage().data_ptr()
    return output.clone() if any(x.untyped_storage().data_ptr() == storage for x in given) else output


def _form(
    heads: int,
    mask: Any = None,
    attn_precision: Any = None,
    skip_reshape: bool = False,
    skip_output_reshape: bool = False,
    **_: Any,
) -> tuple[int, bool, bool]:
    """Number of heads, whether the input is [B, H, L, D] and not [B, L, H*D], and whether the output is."""
    return heads, skip_reshape, skip_output_reshape


def _needs_gradients(*tensors: torch.Tensor) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def _where_is_block() -> str:
    """Where the number of the block is when the graph runs that is being made. Its result is a constant of the graph,
    too: of a network that is compiled, a single block is never entered with another answer."""
    call = _current.get()
    if call is None:
        return _IN_OPTIONS
    if call.options is None:
        return _IN_GRAPH
    return _NOWHERE if call.traced else _IN_OPTIONS
