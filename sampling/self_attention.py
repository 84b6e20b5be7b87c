"""One self-attention call of a run, for ComfyUI and diffusers alike: why it stays dense, or PSA with what earlier steps
kept, a few heads at a time if memory is short. A failure is returned as a reason, never raised as an error.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Hashable

import torch

from ..kernels.attention import AttentionResult, pyramid_sparse_attention
from ..kernels.backends import gradient_reason
from ..kernels.config import ConfigError
from .run import Run, log

WITHOUT_MEMORY = "PSA ran out of memory, even with one head at a time"


@dataclasses.dataclass(frozen=True)
class Host:
    """What differs between the programs that run a model.

    Attributes:
        is_out_of_memory: whether an error means that the device's memory was full.
        free_cached_memory: gives unused memory back to the device.
        failure: why calls stay dense after an error, as a sentence for the log.
    """

    is_out_of_memory: Callable[[BaseException], bool]
    free_cached_memory: Callable[[], None]
    failure: Callable[[Run, Exception], str]


def own_words(error: Exception) -> str:
    """What an error says, in one line.

    A compiler's error starts with a place in our code, such as `at 38:12:`, and ends with the reason; all others start
    with the reason.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    return lines[-1] if re.match(r"at \d+:\d+", lines[0]) else lines[0]


def decline_reason(run: Run, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> str | None:
    """Why PSA leaves a self-attention call q, k, v [B, H, L, D] of an active step dense; None if it takes it."""
    settings, position = run.settings, run.position
    layout, tokens = position.known_layout, q.shape[2]
    if tokens < settings.min_tokens:
        return (
            f"{tokens} tokens ({position.size}) are fewer than min_tokens {settings.min_tokens}, where dense is "
            f"usually faster; set min_tokens to {tokens} or less to make them sparse"
        )
    if tokens != layout.length:
        grid = "x".join(map(str, layout.grid))
        known = f"{layout.before} + {grid} + {layout.after} tokens"
        return (
            f"{tokens} tokens, but {known} are expected of this model: something else has added some; bypass the node "
            f"that does"
        )
    if tokens in position.context_tokens:
        return (
            f"the video and the conditioning both have {tokens} tokens, so PSA cannot tell self-attention from "
            f"cross-attention; sample another length or size"
        )
    if layout.video < 2 * settings.config.block_q:
        return (
            f"{layout.video} video tokens ({position.size}) are fewer than two query blocks of "
            f"{settings.config.block_q}; sample a longer or larger video"
        )
    if not q.is_floating_point() or q.element_size() < 2:
        given = str(q.dtype).removeprefix("torch.")
        return f"PSA does not support q, k, v of type {given}; load the model in another type"
    if position.block in settings.dense_blocks:
        return f"block {position.block} is listed in dense_blocks"
    return gradient_reason(q, k, v) or run.kept.refusal(run.cases(q))


def attend(
    run: Run,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    prompts: Hashable,
    host: Host,
    scale: float | None = None,
) -> torch.Tensor | str:
    """PSA on q, k, v [B, H, L, D], and a record of it: the output [B, H, L, D], or the reason why there is none.

    Args:
        prompts: tells the model calls of a step apart; the same in every step.
    """
    result = None
    while result is None:
        result = _try(run, q, k, v, prompts, host, scale)
    if isinstance(result, str):
        return result
    run.sparse_call(result)
    return result.output


def _try(
    run: Run, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, prompts: Hashable, host: Host, scale: float | None
) -> AttentionResult | str | None:
    """PSA in `run.kept.groups` groups of heads, or the reason why it failed.

    None if the caller should try again: memory was full, and there are more groups now. The retry happens outside of
    this function because an error keeps its tensors alive while it is being handled.
    """
    case, of_setting = run.cases(q)
    reason: str | None
    try:
        return _in_groups(run, q, k, v, prompts, scale)
    except Exception as error:  # whatever fails on a user's machine must end in dense attention, not in a dead workflow
        if not host.is_out_of_memory(error):
            reason = host.failure(run, error)
            case = of_setting if isinstance(error, ConfigError) else case
            log.debug("PSA: the failure in full", exc_info=True)
        else:
            reason = None if run.kept.split(q.shape[1]) else WITHOUT_MEMORY
    if reason is not None:
        # Not tried again: every block and step has a call, and a compiler may take seconds to fail.
        run.kept.refuse(case, reason)
        return reason
    log.warning("PSA: out of memory; continuing with %d groups of heads", run.kept.groups)
    host.free_cached_memory()
    return None


def _in_groups(
    run: Run, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, prompts: Hashable, scale: float | None
) -> AttentionResult:
    groups = list(zip(*(x.chunk(run.kept.groups, 1) for x in (q, k, v)), strict=True))
    results: list[AttentionResult] = []
    # Groups write into one output: joining separate outputs at the end would need the memory twice.
    output = None if len(groups) == 1 else q.new_empty(*(q.shape[i] for i in (0, 2, 1, 3))).transpose(1, 2)
    for number, (some_q, some_k, some_v) in enumerate(groups):
        place = run.position.block, prompts, run.position.layout, number, *some_q.shape[:2]
        kept = run.kept.lists(place)
        result = pyramid_sparse_attention(
            some_q,
            some_k,
            some_v,
            run.config,
            layout=run.position.layout,
            order=run.order(q.device),
            scale=scale,
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


def _together(results: list[AttentionResult], output: torch.Tensor) -> AttentionResult:
    """The results of all groups as one, with the output that they share; lists and orders are the first group's."""
    density = torch.stack([result.density for result in results]).mean()
    return dataclasses.replace(results[0], output=output, density=density)
