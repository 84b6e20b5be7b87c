"""One attention call: PSA, or the dense attention it would have been, with the reason why.

ComfyUI calls the override for every attention of the model, cross-attention too. What PSA declines goes to the override
that was there before, or to the user's dense backend, with every argument as it came.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..kernels.attention import AttentionResult, pyramid_sparse_attention
from ..kernels.backends import BackendError, gradient_reason
from ..kernels.config import ConfigError, PyramidConfig
from ..kernels.levels import topk_ends
from ..sampling.run import Run, log
from . import core

RUN_KEY = "psa_run"
_WITHOUT_TRITON = "set backend to auto, or install Triton where it is missing (on Windows the package triton-windows)"


class PSAOverride:
    """The value of `transformer_options["optimized_attention_override"]`; holds no state of a run."""

    def __init__(self, previous: Callable[..., torch.Tensor] | None) -> None:
        self.previous = previous
        # Tracing would freeze the gating into a compiled graph. A decorator would load the compiler at import.
        self._untraced = torch.compiler.disable(self._attend)

    def __reduce__(self) -> tuple:
        """What it is made of: what the compiler wrapped cannot be sent to another process."""
        return PSAOverride, (self.previous,)

    def __call__(self, func: Callable[..., torch.Tensor], *args: Any, **kwargs: Any) -> torch.Tensor:
        """Attention of q, k, v [B, L, H*D], or [B, H, L, D] with `skip_reshape`; see ComfyUI's attention functions."""
        if len(args) >= 3 and args[0].shape != args[1].shape:  # cross-attention: a compiled model need not stop for it
            if not torch.compiler.is_compiling():
                _note_other(kwargs)
            return self._hand_on(func, *args, **kwargs)
        return self._untraced(func, *args, **kwargs)

    def _hand_on(self, func: Callable[..., torch.Tensor], *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.previous is not None:
            return self.previous(func, *args, **kwargs)
        return func(*args, **kwargs)

    def _attend(self, func: Callable[..., torch.Tensor], *args: Any, **kwargs: Any) -> torch.Tensor:
        run = _run_of(kwargs)
        if run is None or len(args) < 3:
            return self._hand_on(func, *args, **kwargs)
        if not is_self_attention(run, *args[:3], **kwargs):
            run.other_call()
            return self._hand_on(func, *args, **kwargs)
        run.begin_self_attention(core.block_index(kwargs["transformer_options"]))
        if not run.active:
            run.dense_call()
            return self._hand_on(func, *args, **kwargs)
        reason = decline_reason(run, *args, **kwargs)
        if reason is None:
            output = _sparse(run, *args, **kwargs)
            if not isinstance(output, str):
                return output
            reason = output
        run.fell_back(reason)
        return self._hand_on(func, *args, **kwargs)


def _run_of(kwargs: Mapping[str, Any]) -> Run | None:
    return (kwargs.get("transformer_options") or {}).get(RUN_KEY)


def _note_other(kwargs: Mapping[str, Any]) -> None:
    run = _run_of(kwargs)
    if run is not None:
        run.other_call()


def is_self_attention(run: Run, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **kwargs: Any) -> bool:
    """Whether the call is the model's self-attention over all its tokens (equal lengths, at least the video's)."""
    axis = 2 if kwargs.get("skip_reshape") else 1
    return q.shape == k.shape == v.shape and run.layout is not None and q.shape[axis] >= run.layout.length


def decline_reason(
    run: Run, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, mask: Any = None, *_: Any, **kwargs: Any
) -> str | None:
    """Why PSA leaves a self-attention call of an active step to dense attention; None when it takes it."""
    settings, layout = run.settings, run.layout
    if run.failure:
        return run.failure
    tokens = q.shape[2 if kwargs.get("skip_reshape") else 1]
    if mask is not None:
        return "the attention call carries a mask; bypass the node that sets it to have the call sparse"
    if tokens < settings.min_tokens:
        return (
            f"{tokens} tokens ({run.size}) are fewer than min_tokens {settings.min_tokens}, where dense is usually "
            f"faster; set min_tokens to {tokens} or less to have them sparse"
        )
    if tokens != layout.length:
        grid = "x".join(map(str, layout.grid))
        known = f"{layout.before} + {grid} + {layout.after} tokens"
        return (
            f"{tokens} tokens, but {known} are expected of this model: something else has added some; bypass the node "
            f"that does"
        )
    if tokens in run.context_tokens:
        return (
            f"the video and the conditioning both have {tokens} tokens, so self-attention cannot be told apart; sample "
            f"another length or size"
        )
    if layout.video < 2 * settings.config.block_q:
        return (
            f"{layout.video} video tokens ({run.size}) are fewer than two query blocks of {settings.config.block_q}; "
            f"sample a longer or larger video"
        )
    if not q.is_floating_point() or q.element_size() < 2:
        return f"q, k, v of type {str(q.dtype).removeprefix('torch.')} are not served; load the model in another type"
    if run.block in settings.dense_blocks:
        return f"block {run.block} is listed in dense_blocks"
    return gradient_reason(q, k, v) or run.out_of_reach.get((layout, run.config.sparsity))


def _sparse(
    run: Run, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, *_: Any, **kwargs: Any
) -> torch.Tensor | str:
    """PSA on one call; where it cannot be, the reason: this call's, or in `run.failure` that of the rest of the run."""
    if not kwargs.get("skip_reshape"):
        q, k, v = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    result = None
    while result is None:
        result = _try(run, q, k, v, kwargs)
    if isinstance(result, str):
        return result
    run.sparse_call(run.block, result)
    if kwargs.get("skip_output_reshape"):
        return result.output
    return result.output.transpose(1, 2).flatten(2)


def _try(
    run: Run, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Mapping[str, Any]
) -> AttentionResult | str | None:
    """PSA on q, k, v [B, H, L, D] in `run.parts` groups of heads, or the reason why it cannot be.

    None where it is to be tried again: there are more parts now, because memory was full. It returns before that,
    because an error that is being handled keeps what it was computing alive.
    """
    try:
        groups = list(zip(*(x.chunk(run.parts, 1) for x in (q, k, v)), strict=True))
        results: list[AttentionResult] = []
        # Groups write into one output: kept one by one and joined at the end, they would take its memory twice.
        output = None if len(groups) == 1 else q.new_empty(*(q.shape[i] for i in (0, 2, 1, 3))).transpose(1, 2)
        prompts = core.call_identity(call.get("transformer_options") or {})
        for number, part in enumerate(groups):
            place = run.block, prompts, run.layout, number, *part[0].shape[:2]
            kept = run.kept.lists(place)
            result = pyramid_sparse_attention(
                *part,
                run.config,
                layout=run.layout,
                order=run.order(q.device),
                scale=call.get("scale"),
                backend=run.settings.backend,
                lists=kept,
                centroids=run.kept.centroids(place),
            )
            run.kept.put(place, result, reused=kept is not None)
            if output is not None:
                heads = output.narrow(1, sum(other.output.shape[1] for other in results), result.output.shape[1])
                heads.copy_(result.output)
                result = dataclasses.replace(result, output=heads)
            results.append(result)
        return results[0] if output is None else _together(results, output)
    except BackendError as error:
        run.failure = f"{error}; {_WITHOUT_TRITON}" if run.settings.backend == "triton" else str(error)
    except ConfigError as error:
        reason = run.out_of_reach[run.layout, run.config.sparsity] = out_of_reach(run, error)
        return reason
    except Exception as error:  # whatever fails on a user's machine must end in dense attention, not in a dead workflow
        if not core.is_out_of_memory(error):
            run.failure = _failure(error)
            log.debug("PSA: the failure in full", exc_info=True)
        elif run.parts < q.shape[1]:
            run.parts = min(2 * run.parts, q.shape[1])
        else:
            run.failure = "PSA ran out of memory, even with one head at a time"
    if run.failure is not None:
        return run.failure
    log.warning("PSA: out of memory; going on in %d groups of heads", run.parts)
    run.kept.clear()  # it was of groups of another size
    core.free_cached_memory()
    return None


def _failure(error: Exception) -> str:
    """Why the rest of a run is dense after an error that nobody has foreseen, in its own words where it has some."""
    if isinstance(error, ImportError):
        missing = f"the package {error.name} is missing or broken" if error.name else "a library cannot be loaded"
        return f"{missing}; {_WITHOUT_TRITON}"
    words = next(iter(str(error).splitlines()), "")
    return (
        f"the kernels failed on this machine{f' ({words})' if words else ''}; the rest of this run is dense, the next "
        f"one tries again; please report it if it fails every time"
    )


def out_of_reach(run: Run, error: ConfigError) -> str:
    """Why a setting cannot be had on the current number of tokens, and which sparsity could."""
    config, layout = run.config, run.layout
    if error.field != "sparsity" or config.sparsity is None:
        return f"{error.field} {error.given} cannot be had on {layout.video} video tokens; allowed: {error.allowed}"
    blocks = -(-layout.video // config.block_kv)
    given = round(100 * config.sparsity)
    nearest = [*range(given, -1, -1), *range(given + 1, 100)]
    reached = next((percent for percent in nearest if _is_within_reach(config, blocks, percent / 100)), None)
    size = f"{layout.video} video tokens ({run.size})"
    here = f"a sparsity of {config.sparsity:.2f}" + (" in this step, with falling," if run.settings.falling else "")
    if reached is None:
        return f"{here} is out of reach for {size}; sample a longer or larger video"
    most = "most" if reached / 100 < config.sparsity else "least"
    return (
        f"{here} is out of reach for {size}: {reached / 100:.2f} is the {most} there; move the slider there, or sample "
        f"a longer or larger video"
    )


def _is_within_reach(config: PyramidConfig, blocks: int, sparsity: float) -> bool:
    try:
        topk_ends(blocks, dataclasses.replace(config, sparsity=sparsity))
    except ConfigError:
        return False
    return True


def _together(results: list[AttentionResult], output: torch.Tensor) -> AttentionResult:
    """Results of groups of heads as one, with the output that they share; lists and orders are the first group's."""
    density = torch.stack([result.density for result in results]).mean()
    return dataclasses.replace(results[0], output=output, density=density)
