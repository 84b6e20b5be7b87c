"""One self-attention call of a run, for ComfyUI and diffusers alike: why it stays dense, or PSA with what earlier steps
kept, a few heads at a time if memory is short. A failure is returned as a reason, never raised as an error.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch

from ..kernels.attention import AttentionResult, pyramid_sparse_attention
from ..kernels.backends import gradient_reason
from ..kernels.config import ConfigError
from ..kernels.delta import GROUPS, measure_delta
from ..kernels.levels import BlockLists, SharedHeads, listed_blocks
from .correction import Loss, Memory
from .findings import listed
from .run import Run, log

WITHOUT_MEMORY = "PSA ran out of memory, even with one head at a time"
WITHOUT_ROOM = "the memory is full; set correction to eighth, or sample a shorter or smaller video"
_UNCORRECTED = "the run goes on without it, the next one tries again"
_PART_WITHOUT_ROOM = f"a part of the calls is not corrected: {WITHOUT_ROOM}"


@dataclasses.dataclass(frozen=True)
class Host:
    """What differs between the programs that run a model.

    Attributes:
        is_out_of_memory: whether an error means that the device's memory was full.
        free_cached_memory: gives unused memory back to the device.
        failure: what went wrong, as a sentence for the log; from the run, the error, and what becomes of the calls.
        memory: where corrections may be kept.
        stays_dense: what becomes of calls that failed.
    """

    is_out_of_memory: Callable[[BaseException], bool]
    free_cached_memory: Callable[[], None]
    failure: Callable[[Run, Exception, str], str]
    memory: Memory
    stays_dense: str


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
        return listed(settings.dense_blocks)
    return gradient_reason(q, k, v) or run.kept.refusal(run.cases(q))


def attend(
    run: Run,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    prompts: Sequence[Hashable],
    host: Host,
    scale: float | None = None,
    shared: SharedHeads | None = None,
) -> torch.Tensor | str:
    """PSA on q, k, v [B, H, L, D], and a record of it: the output [B, H, L, D], or the reason why there is none.

    Args:
        prompts: one for each batch entry, by which it is known again in later steps, however entries are batched there.
        shared: heads of the same call that other processes compute.
    """
    found = None
    while found is None:
        found = _try(run, q, k, v, prompts, host, scale, shared)
    if isinstance(found, str):
        return found
    output, results, corrected = found
    run.sparse_call(results, corrected)
    return output


def learn(
    run: Run,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dense: torch.Tensor,
    *,
    prompts: Sequence[Hashable],
    host: Host,
    scale: float | None = None,
    shared: SharedHeads | None = None,
) -> None:
    """Measure what PSA would have lost in a call with the dense output [B, H, L, D], and keep it for later steps.

    Whatever goes wrong, the call has its output; then there is no correction, for a reason that is logged.
    """
    losses, layout = run.losses, run.position.known_layout
    if not losses.on or losses.settings is None:
        return
    if run.position.in_last_step:  # its calls are dense, and nothing comes after it
        for piece in _pieces(run, q.shape, prompts):
            losses.drop(piece.place)
        run.record.learned_call(run.position, [q.new_zeros((), dtype=torch.float32)])
        return
    video = slice(layout.before, layout.before + layout.video)
    densities: list[torch.Tensor] = []
    try:
        for piece in _pieces(run, q.shape, prompts):
            (some_dense,) = piece.of(dense)
            beside = run, piece.of(q, k, v), piece.of_heads(shared), scale
            try:
                result, lists = _beside_dense(*beside)
                chosen = losses.size is not None
                while not chosen and run.choose_size(result.output[:, :, video], lists, len(q), host.memory):
                    result, lists = _beside_dense(*beside)
            except Exception as error:
                if host.is_out_of_memory(error):
                    raise
                _refuse(run, q, error, host)
                break
            densities.append(result.density)
            if losses.size is None:
                break
            sparse = result.output[:, :, video]
            group, gamma = GROUPS[losses.size], run.correction.gamma
            delta = measure_delta(some_dense[:, :, video], sparse, result.query_order, group, gamma)
            if not losses.put(piece.place, Loss(lists, delta)) and losses.without_room == 1:
                run.record.note([_PART_WITHOUT_ROOM])
    except Exception as error:
        log.debug("PSA: why there is no correction", exc_info=True)
        full = host.is_out_of_memory(error)
        run.give_up_correction(f"no correction: {WITHOUT_ROOM if full else host.failure(run, error, _UNCORRECTED)}")
    if losses.reason is not None:
        host.free_cached_memory()
    run.record.learned_call(run.position, densities)


def _beside_dense(
    run: Run, tensors: Sequence[torch.Tensor], shared: SharedHeads | None, scale: float | None
) -> tuple[AttentionResult, BlockLists | None]:
    """PSA on q, k, v beside the dense call, and the levels that are kept with what it lost, if any are."""
    q, k, v = tensors
    result = _call(run, q, k, v, scale, lists=None, shared=shared)
    if not run.correction.keep_levels:
        return result, None
    return result, result.lists.packed(listed_blocks(result.lists.shape[-1], run.config))


def _try(
    run: Run,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    prompts: Sequence[Hashable],
    host: Host,
    scale: float | None,
    shared: SharedHeads | None,
) -> tuple[torch.Tensor, list[AttentionResult], bool] | str | None:
    """PSA in pieces: the output, what each piece did, and whether all were corrected; or the reason why it failed.

    None if the caller should try again: without a correction if there was one, or in more pieces if memory is full. The
    retry happens outside of this function because an error keeps its tensors alive while it is being handled.
    """
    pieces = _pieces(run, q.shape, prompts)
    corrects = any(run.losses.has(piece.place) for piece in pieces)
    try:
        return _in_pieces(run, q, k, v, pieces, scale, shared)
    except Exception as error:  # whatever fails on a user's machine must end in dense attention, not in a dead workflow
        full = host.is_out_of_memory(error)
        if corrects or (full and run.losses):
            run.give_up_correction(
                f"no correction from here on: {WITHOUT_ROOM if full else host.failure(run, error, _UNCORRECTED)}"
            )
            log.debug("PSA: the failure in full", exc_info=True)
        elif full and run.kept.split(q.shape[1]):
            log.warning("PSA: out of memory; continuing with %d groups of heads", run.kept.groups)
        else:
            return _refuse(run, q, error, host)
    host.free_cached_memory()
    return None


def _refuse(run: Run, q: torch.Tensor, error: Exception, host: Host) -> str:
    """Leave calls like this one dense from now on, for the reason that is returned. Every block and step has such a
    call, and a compiler may take seconds to fail."""
    case, of_setting = run.cases(q)
    reason = WITHOUT_MEMORY if host.is_out_of_memory(error) else host.failure(run, error, host.stays_dense)
    run.kept.refuse(of_setting if isinstance(error, ConfigError) else case, reason)
    log.debug("PSA: the failure in full", exc_info=True)
    return reason


@dataclasses.dataclass(frozen=True)
class _Piece:
    """What is computed at a time. part: of the batch and the heads, None for the whole call; place: where it is known
    again in later steps; whole: whether it has all heads of the call."""

    part: tuple[slice, slice] | None
    place: Hashable
    whole: bool

    def of(self, *tensors: torch.Tensor) -> Sequence[torch.Tensor]:
        """The piece of tensors [B, H, ...]."""
        return tensors if self.part is None else [x[self.part] for x in tensors]

    def of_heads(self, shared: SharedHeads | None) -> SharedHeads | None:
        """The heads elsewhere that share this piece's budget: none if not even the heads here are together."""
        if shared is None or not self.whole:
            return None
        return dataclasses.replace(shared, entry=self.part[0].start or 0 if self.part else 0)


def _pieces(run: Run, shape: Sequence[int], prompts: Sequence[Hashable]) -> list[_Piece]:
    """The pieces of a call on [B, H, L, D]: batch entry by batch entry if anything is kept, and groups of heads."""
    heads = shape[1]
    entries: list[tuple[slice, Hashable]] = [(slice(None), tuple(prompts))]
    if run.losses.on or run.kept.keeps(run.config.order):
        entries = [(slice(row, row + 1), prompt) for row, prompt in enumerate(prompts)]
    size = -(-heads // run.kept.groups)
    alone = size == heads and len(entries) == 1
    return [
        _Piece(
            None if alone else (rows, slice(first, first + size)),
            (run.position.block, prompt, run.position.layout, first, size),
            whole=size == heads,
        )
        for rows, prompt in entries
        for first in range(0, heads, size)
    ]


def _call(
    run: Run, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None, **kept: Any
) -> AttentionResult:
    return pyramid_sparse_attention(
        q,
        k,
        v,
        run.config,
        layout=run.position.layout,
        order=run.order(q.device),
        scale=scale,
        backend=run.settings.backend,
        **kept,
    )


def _in_pieces(
    run: Run,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pieces: list[_Piece],
    scale: float | None,
    shared: SharedHeads | None,
) -> tuple[torch.Tensor, list[AttentionResult], bool]:
    # One output for all pieces: joining separate outputs at the end would need the memory twice.
    output = q.new_empty(*(q.shape[i] for i in (0, 2, 1, 3))).transpose(1, 2)
    results: list[AttentionResult] = []
    corrected = True
    for piece in pieces:
        some_q, some_k, some_v, out = piece.of(q, k, v, output)
        loss = run.losses.get(piece.place)
        corrected &= loss is not None
        delta, lists = (None, None) if loss is None else (loss.delta, loss.lists)
        given = {"delta": delta, "out": out, "shared": piece.of_heads(shared)}
        if lists is not None:
            result = _call(run, some_q, some_k, some_v, scale, lists=lists, **given)
        else:
            lists, centroids = run.kept.lists(piece.place), run.kept.centroids(piece.place)
            result = _call(run, some_q, some_k, some_v, scale, lists=lists, centroids=centroids, **given)
            run.kept.put(piece.place, result, run.config, reused=lists is not None)
        results.append(result)
    return output, results, corrected
