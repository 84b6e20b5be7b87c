"""PSA on the transformers of a diffusers pipeline: hooks that come and go; no class, module or processor is replaced.

Each transformer gets a hook that learns step and grid of a call, each self-attention one that lets `interception.py`
answer its attention while it runs. Processors stay diffusers' own, or whatever the user has set.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import torch

from ..errors import refusal
from ..kernels.backends import BACKENDS
from ..kernels.config import ConfigError
from ..kernels.falling import check_falling
from ..kernels.presets import load_presets
from .interception import AttentionInterception
from .layout import MODELS, TransformerFamily
from .state import CallState

_ATTRIBUTE = "_psa_applied"


@dataclasses.dataclass
class AppliedPSA:
    """What `apply_psa` did, and what became of it.

    Attributes:
        states: one for each transformer of the pipeline.
    """

    states: list[CallState]
    _hooks: list[Any]
    _owners: list[Any]

    @property
    def sparse_calls(self) -> int:
        """Self-attention calls that PSA computed since it was applied."""
        return sum(state.sparse_calls for state in self.states)

    @property
    def dense_calls(self) -> int:
        """Self-attention calls that stayed dense: of the warm-up, and those in `fallbacks`."""
        return sum(state.dense_calls for state in self.states)

    @property
    def fallbacks(self) -> Counter[str]:
        """Why calls outside the warm-up stayed dense, and how many."""
        return sum((state.fallbacks for state in self.states), Counter())

    def mean_sparsity(self) -> float | None:
        """Mean sparsity of the calls that PSA computed; reads from the device."""
        sums = [float(state.density) for state in self.states if state.density is not None]
        return 1 - sum(sums) / self.sparse_calls if sums else None

    def remove(self) -> None:
        """Take every hook away; the transformers are as they were."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        for owner in self._owners:
            if owner.__dict__.get(_ATTRIBUTE) is self:
                del owner.__dict__[_ATTRIBUTE]


def apply_psa(
    pipe: Any,
    sparsity: float = 0.85,
    preset: str = "auto",
    *,
    warm_up: float | int = 0.25,
    dense_blocks: tuple[int, ...] = (),
    min_tokens: int = 12288,
    backend: str = "auto",
    falling: float = 0.0,
    **changes: Any,
) -> AppliedPSA:
    """Let a diffusers pipeline attend with PSA. Applying it again replaces the setting.

    Args:
        pipe: a CogVideoX, Wan2.1 or Wan2.2 pipeline (both experts are patched), or one of their transformers.
        sparsity: share of the attention work that is saved in the sparse steps, 0 to 0.97; 0 keeps every call dense.
        preset: a name of `kernels.presets.load_presets`, or auto.
        warm_up: how many of the first steps stay dense: a share of the steps (a float) or their number (an int). A
            transformer without its pipeline knows no steps: there it must be 0. Presets that state steps win.
        dense_blocks: transformer blocks that stay dense. min_tokens: shorter sequences stay dense.
        backend: auto, triton or torch.
        falling: how far the density falls over the sparse steps, 0 to 0.8, see `kernels/falling.py`; a transformer
            without its pipeline knows no steps and keeps it.
        changes: other fields of `kernels.config.PyramidConfig`, such as block_kv.

    Returns:
        What was done, with figures and `remove()`.

    Raises:
        TypeError: not a pipeline or transformer that PSA knows.
        ValueError: an input is wrong; it says what was given and what is allowed.
    """
    transformers = _transformers(pipe)
    if backend not in BACKENDS:
        raise _error("backend", backend, ", ".join(BACKENDS))
    if not 0 <= sparsity <= 0.97:
        raise _error("sparsity", sparsity, "0 to 0.97")
    presets = load_presets()
    if preset != "auto" and preset not in presets:
        raise _error("preset", preset, f"auto, {', '.join(presets)}")
    scheduler = getattr(pipe, "scheduler", None)
    if warm_up < 0 or (isinstance(warm_up, float) and warm_up > 1):
        raise _error("warm_up", warm_up, "a share from 0.0 to 1.0 or a step count")
    if warm_up and scheduler is None:
        raise _error("warm_up", warm_up, "0, a bare transformer knows no steps")
    planned = []
    for transformer in transformers:
        family = MODELS[type(transformer).__name__]
        chosen = presets[family.preset(transformer) if preset == "auto" else preset]
        try:
            config = chosen.config(sparsity or 0.5, **changes)
            check_falling(falling, config)
        except (ConfigError, TypeError) as error:
            raise ValueError(f"apply_psa, {error}") from error
        steps = warm_up if chosen.dense_steps is None or scheduler is None else chosen.dense_steps
        state = CallState(
            config, scheduler, steps, frozenset(dense_blocks), min_tokens, backend, falling, off=sparsity == 0
        )
        planned.append((transformer, family, state))
    remove_psa(pipe)
    hooks = [hook for transformer, family, state in planned for hook in _add_hooks(transformer, family, state)]
    applied = AppliedPSA([state for *_, state in planned], hooks, [*transformers])
    for owner in transformers:
        owner.__dict__[_ATTRIBUTE] = applied
    return applied


def remove_psa(pipe: Any) -> bool:
    """Take PSA off a pipeline or transformer; whether it was there."""
    found = {id(applied): applied for t in _transformers(pipe) if (applied := t.__dict__.get(_ATTRIBUTE)) is not None}
    for applied in found.values():
        applied.remove()
    return bool(found)


def _error(argument: str, given: object, allowed: str) -> ValueError:
    return ValueError(f"apply_psa, {refusal(argument, given, allowed)}")


def _transformers(pipe: Any) -> list[Any]:
    candidates = (
        [pipe]
        if isinstance(pipe, torch.nn.Module)
        else [getattr(pipe, name, None) for name in ("transformer", "transformer_2")]
    )
    found = [candidate for candidate in candidates if type(candidate).__name__ in MODELS]
    if not found:
        allowed = f"a pipeline with {', '.join(MODELS)}"
        raise TypeError(f"apply_psa, pipe: {type(pipe).__name__} was given; allowed: {allowed}")
    return found


def _add_hooks(transformer: Any, family: TransformerFamily, state: CallState) -> list[Any]:
    def before_call(_: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        state.begin_call(*family.read_call(transformer, args, kwargs))

    hooks = [transformer.register_forward_pre_hook(before_call, with_kwargs=True)]
    for index, block in enumerate(family.blocks(transformer)):
        interception = AttentionInterception(state, index)

        def enter(*_: Any, interception: AttentionInterception = interception) -> None:
            interception.__enter__()

        def leave(*_: Any, interception: AttentionInterception = interception) -> None:
            interception.__exit__(None, None, None)

        hooks.append(block.attn1.register_forward_pre_hook(enter))
        hooks.append(block.attn1.register_forward_hook(leave, always_call=True))
    return hooks
