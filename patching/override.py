"""One attention call: PSA, or the dense attention that it would be without PSA, with the reason why.

ComfyUI calls the override for all attention of the model, including cross-attention. What PSA declines goes to the
override that was there before, or to the user's dense backend, with all arguments unchanged.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ..kernels.backends import BackendError
from ..kernels.broken import KernelError
from ..kernels.config import ConfigError
from ..kernels.levels import can_meet
from ..sampling.correction import Memory
from ..sampling.findings import NO_PLAIN_GRID
from ..sampling.run import Run
from ..sampling.self_attention import Host, attend, decline_reason, learn, own_words
from . import core
from .operator import GraphCall

RUN_KEY = "psa_run"
Dense = Callable[..., torch.Tensor]
_WITHOUT_TRITON = "set backend to auto, or install Triton where it is missing (on Windows the package triton-windows)"


class PSAOverride:
    """The value of `transformer_options["optimized_attention_override"]`; holds no state of a run."""

    def __init__(self, previous: Dense | None, host: Host | None = None, patch: str = "") -> None:
        """host: the program that runs the model, by default ComfyUI; another one for experiments without it.

        patch: it acts in runs of this patch only. Another node's override may call that of an earlier patch, which must
        leave alone what the latest one has handed on.
        """
        self.previous, self.host, self.patch = previous, host or COMFYUI, patch
        self._in_graph = GraphCall(self.attend)

    def __reduce__(self) -> tuple:
        """Made again: what the compiler wrapped cannot be sent to another process."""
        return PSAOverride, (self.previous, self.host, self.patch)

    def __call__(self, func: Dense, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Attention of q, k, v [B, L, H*D], or [B, H, L, D] with `skip_reshape`; see ComfyUI's attention functions."""
        if not torch.compiler.is_compiling():
            return self.attend(func, *args, **kwargs)
        if len(args) < 3 or args[0].shape != args[1].shape:  # cross-attention: a compiler knows it better than we do
            return self._hand_on(func, *args, **kwargs)
        return self._in_graph(func, *args, **kwargs)

    def container_function(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The same for q, k, v in containers (see `core.dense_attention`). What PSA leaves alone stays in them, so that
        the dense attention frees them as early as without PSA."""
        wrapped, func = core.dense_attention()
        if torch.compiler.is_compiling():
            return self(func, *_taken(args), **kwargs)
        seen = [*(container.peek() for container in args[:3]), *args[3:]]
        run, preferred = self._run_that_acts(seen, kwargs), _preferred(seen, kwargs)
        del seen
        if run is not None:
            return self._act(run, func, *_taken(args), **kwargs)
        if self.previous is None:
            return (preferred or wrapped)(*args, **kwargs)
        consume = getattr(self.previous, "container_function", None)
        return self.previous(func, *_taken(args), **kwargs) if consume is None else consume(*args, **kwargs)

    def attend(self, func: Dense, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The same as a call outside of a compiler's trace."""
        run = self._run_that_acts(args, kwargs)
        return self._hand_on(func, *args, **kwargs) if run is None else self._act(run, func, *args, **kwargs)

    def _run_that_acts(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Run | None:
        """The run, if PSA computes this call or learns from it; a call that it leaves alone is counted."""
        run: Run | None = (kwargs.get("transformer_options") or {}).get(RUN_KEY)
        if run is None or run.patch != self.patch or len(args) < 3:
            return None
        if not is_self_attention(run, *args[:3], **kwargs):
            run.record.other_call()
            return None
        run.begin_self_attention(core.block_index(kwargs["transformer_options"], run.position.first_blocks))
        if run.position.active or run.learns:
            return run
        run.record.dense_call()
        return None

    def _hand_on(self, func: Dense, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.previous is not None:
            return self.previous(func, *args, **kwargs)
        return (_preferred(args, kwargs) or func)(*args, **kwargs)

    def _act(self, run: Run, func: Dense, *args: Any, **kwargs: Any) -> torch.Tensor:
        """PSA, or a dense call that it learns from."""
        call = _read(run, *args, **kwargs)
        if run.learns:
            return self._learn(run, call, func, *args, **kwargs)
        with core.outside_malloc_graph():
            output = call if isinstance(call, str) else self._sparse(run, call, **kwargs)
        if isinstance(output, str):
            run.record.fell_back(output)
            return self._hand_on(func, *args, **kwargs)
        return output

    def _learn(self, run: Run, call: _Call | str, func: Dense, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The dense call, of which PSA measures what it would lose."""
        if isinstance(call, str) and run.position.active:
            run.record.fell_back(call)
        else:
            run.record.dense_call()
        output = self._hand_on(func, *args, **kwargs)
        if not isinstance(call, str):
            dense = output if kwargs.get("skip_output_reshape") else _by_heads(output, call.q.shape[1])
            seen = run, call.q, call.k, call.v, dense
            with core.outside_malloc_graph():
                learn(*seen, prompts=call.prompts, host=self.host, scale=kwargs.get("scale"))
        return output

    def _sparse(self, run: Run, call: _Call, **kwargs: Any) -> torch.Tensor | str:
        """PSA on one call, or the reason why the call stays dense."""
        output = attend(run, call.q, call.k, call.v, prompts=call.prompts, host=self.host, scale=kwargs.get("scale"))
        if isinstance(output, str) or kwargs.get("skip_output_reshape"):
            return output
        return output.transpose(1, 2).flatten(2)


def _preferred(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Dense | None:
    """What the checkpoint wants a dense call computed with, if anything."""
    functions = core.preferred_in_block(kwargs.get("transformer_options") or {})
    if not functions:
        return None
    return functions[0 if args[0].shape == args[1].shape else -1]


def _taken(args: Sequence[Any]) -> list[Any]:
    """The arguments with q, k, v taken out of their containers."""
    return [*(container.take() for container in args[:3]), *args[3:]]


def is_self_attention(run: Run, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **kwargs: Any) -> bool:
    """Whether the call is the model's self-attention over all its tokens: equal lengths, at least the video's, and not
    those of another sequence; and as wide as the video's, if the model has other attention."""
    position = run.position
    if not q.shape == k.shape == v.shape or position.layout is None:
        return False
    tokens, width = (q.shape[2], q.shape[1] * q.shape[3]) if kwargs.get("skip_reshape") else q.shape[1:]
    expected = position.layout.length
    if tokens < expected or (tokens > expected and tokens in position.context_tokens):
        return False
    return position.width in (None, width)


@dataclasses.dataclass(frozen=True)
class _Call:
    """A call that PSA can compute: q, k, v [B, H, L, D], and what each batch entry is computed for."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    prompts: list[tuple]


def _read(
    run: Run, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, mask: Any = None, *_: Any, **kwargs: Any
) -> _Call | str:
    """The call as PSA sees it, or the reason why it stays dense."""
    if mask is not None:
        return "the attention call has a mask; bypass the node that sets it to make the call sparse"
    if not kwargs.get("skip_reshape"):
        q, k, v = (_by_heads(x, heads) for x in (q, k, v))
    reason = _wrong_assumption(run, q) or decline_reason(run, q, k, v)
    if reason is not None:
        return reason
    return _Call(q, k, v, core.prompts_of(kwargs.get("transformer_options") or {}, q.shape[0]))


def _wrong_assumption(run: Run, q: torch.Tensor) -> str | None:
    """What is wrong with the layout that was assumed for a model that PSA does not know; None if nothing is."""
    tokens, expected = q.shape[2], run.position.known_layout.length
    if not run.record.assumed or tokens == expected:
        return None
    return f"self-attention is over {tokens} tokens and not {expected}, {NO_PLAIN_GRID}"


def _by_heads(x: torch.Tensor, heads: int) -> torch.Tensor:
    """[B, L, H*D] -> [B, H, L, D], a view."""
    batch, tokens, width = x.shape
    return x.view(batch, tokens, heads, width // heads).transpose(1, 2)


def failure(run: Run, error: Exception, then: str) -> str:
    """What went wrong, in the error's own words if it has any; `then`: what becomes of the calls."""
    if isinstance(error, ConfigError):
        return out_of_reach(run, error)
    if isinstance(error, BackendError):
        return f"{error}; {_WITHOUT_TRITON}" if run.settings.backend == "triton" else str(error)
    if isinstance(error, KernelError):
        return str(error)
    if isinstance(error, ImportError):
        missing = f"the package {error.name} is missing or broken" if error.name else "a library cannot be loaded"
        return f"{missing}; {_WITHOUT_TRITON}"
    words = own_words(error)
    cause = f"the kernels failed on this machine{f' ({words})' if words else ''}"
    return f"{cause}; {then}; please report it if it fails every time"


MEMORY = Memory(core.free_for_run, core.free_on_host, core.pin, core.unpin)
_STAYS_DENSE = "this size stays dense for the rest of the run, the next one tries again"
COMFYUI = Host(core.is_out_of_memory, core.free_cached_memory, failure, MEMORY, _STAYS_DENSE)


def out_of_reach(run: Run, error: ConfigError) -> str:
    """Why a setting is impossible with the current number of tokens, and the nearest sparsity that is possible."""
    config, layout = run.config, run.position.known_layout
    if error.field != "sparsity" or config.sparsity is None:
        return f"{error.field} {error.given} is not possible with {layout.video} video tokens; allowed: {error.allowed}"
    blocks = -(-layout.video // config.block_kv)
    given = round(100 * config.sparsity)
    nearest = [*range(given, -1, -1), *range(given + 1, 100)]
    possible = (n for n in nearest if can_meet(blocks, dataclasses.replace(config, sparsity=n / 100)))
    reached = next(possible, None)
    size = f"{layout.video} video tokens ({run.position.size})"
    here = f"a sparsity of {config.sparsity:.2f}" + (" in this step, with falling," if run.settings.falling else "")
    if reached is None:
        return f"{here} is out of reach for {size}; sample a longer or larger video"
    most = "most" if reached / 100 < config.sparsity else "least"
    return (
        f"{here} is out of reach for {size}: {reached / 100:.2f} is the {most} there; move the slider there, or sample "
        f"a longer or larger video"
    )
