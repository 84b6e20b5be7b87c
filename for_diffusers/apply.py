"""PSA on the transformers of a diffusers pipeline: comes and goes; no class, module or processor is replaced.

Each transformer gets hooks that learn step and grid of a call, each self-attention a `forward` before its own that lets
`interception.py` answer its attention while it runs. Processors stay diffusers' own, or whatever the user has set.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import torch

from ..choices.presets import load_presets
from ..choices.settings import AUTO, MOST_REUSE_STEPS, MOST_SPARSITY, PatchInputs, PatchSettings
from ..kernels.backends import BACKENDS
from ..kernels.config import ConfigError
from ..kernels.falling import check_falling
from ..kernels.refusal import refusal
from ..kernels.semantic import SEMANTIC_ORDERS
from .interception import InterceptedForward
from .layout import MODELS
from .schedule import Schedule
from .state import TransformerState

_ATTRIBUTE = "_psa_applied"


@dataclasses.dataclass
class AppliedPSA:
    """What `apply_psa` did, and what became of it.

    Attributes:
        states: one for each transformer of the pipeline.
    """

    states: list[TransformerState]
    _patches: list[_Patch]

    @property
    def sparse_calls(self) -> int:
        """Self-attention calls that PSA computed since it was applied."""
        return sum(state.totals().sparse for state in self.states)

    @property
    def dense_calls(self) -> int:
        """Self-attention calls that stayed dense: of the warm-up, and those in `fallbacks`."""
        return sum(state.totals().dense for state in self.states)

    @property
    def fallbacks(self) -> Counter[str]:
        """Why calls outside the warm-up stayed dense, and how many."""
        return sum((state.totals().fallbacks for state in self.states), Counter())

    def mean_sparsity(self) -> float | None:
        """Mean sparsity of the calls that PSA computed; reads from the device."""
        totals = [state.totals() for state in self.states]
        densities = [float(total.sums[0]) for total in totals if total.sums is not None]
        return 1 - sum(densities) / sum(total.sparse for total in totals) if densities else None

    def unranked_pairs(self) -> int:
        """Pairs of blocks whose importance was not a finite number, and which ranked last; reads from the device.

        More than none means that the model's own queries or keys are infinite or not a number.
        """
        sums = [state.totals().sums for state in self.states]
        return sum(int(found[1]) for found in sums if found is not None)

    def reports(self) -> list[dict[str, Any] | None]:
        """The figures of the last run of each transformer, as PSA Report shows them: `sampling/figures.py` names them.

        None where it has not run yet. Reads from the device. Seconds of the last step end when its forward returns,
        which a GPU does not wait for.
        """
        return [state.report() for state in self.states]

    def remove(self) -> None:
        """Take PSA away, where nothing has replaced it; the transformers are as they were."""
        for patch in self._patches:
            patch.remove()


class _Patch:
    """PSA on one transformer, which refers to it: hooks that tell its calls, and a `forward` before each
    self-attention's own."""

    def __init__(self, transformer: Any, state: TransformerState) -> None:
        self.transformer, self.state = transformer, state
        self._parts = [
            transformer.register_forward_pre_hook(state.begin_call, with_kwargs=True),
            transformer.register_forward_hook(state.end_call, always_call=True),
        ]
        for index, block in enumerate(MODELS[state.family].blocks(transformer)):
            self._parts.append(InterceptedForward(block.attn1, state, index))
        transformer.__dict__[_ATTRIBUTE] = self

    def remove(self) -> None:
        """Once is enough, and as often as you like."""
        for part in self._parts:
            part.remove()
        self._parts.clear()
        self.state.forget()
        if self.transformer.__dict__.get(_ATTRIBUTE) is self:
            del self.transformer.__dict__[_ATTRIBUTE]


def apply_psa(
    pipe: Any,
    sparsity: float = PatchInputs.sparsity,
    preset: str = PatchInputs.preset,
    *,
    warm_up: float | int = PatchInputs.start_percent,
    dense_blocks: tuple[int, ...] = (),
    min_tokens: int = PatchInputs.min_tokens,
    backend: str = PatchInputs.backend,
    falling: float = PatchInputs.falling,
    reuse_steps: int = PatchInputs.reuse_steps,
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
        reuse_steps: levels are chosen in every such step and kept in between; 1 chooses them in every step. A
            transformer without its pipeline knows no steps: there it must be 1.
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
    if not 0 <= sparsity <= MOST_SPARSITY:
        raise _error("sparsity", sparsity, f"0 to {MOST_SPARSITY}")
    presets = load_presets()
    if preset != AUTO and preset not in presets:
        raise _error("preset", preset, f"{AUTO}, {', '.join(presets)}")
    knows_steps = getattr(pipe, "scheduler", None) is not None
    if warm_up < 0 or (isinstance(warm_up, float) and warm_up > 1):
        raise _error("warm_up", warm_up, "a share from 0.0 to 1.0 or a step count")
    if warm_up and not knows_steps:
        raise _error("warm_up", warm_up, "0, a bare transformer knows no steps")
    if not 1 <= reuse_steps <= MOST_REUSE_STEPS:
        raise _error("reuse_steps", reuse_steps, f"1 to {MOST_REUSE_STEPS}")
    if reuse_steps > 1 and not knows_steps:
        raise _error("reuse_steps", reuse_steps, "1, a bare transformer knows no steps")
    planned = []
    for transformer in transformers:
        family = type(transformer).__name__
        chosen = presets[MODELS[family].preset(transformer) if preset == AUTO else preset]
        try:
            config = chosen.config(sparsity or 0.5, **changes)
            check_falling(falling, config)
        except (ConfigError, TypeError) as error:
            raise ValueError(f"apply_psa, {error}") from error
        if reuse_steps > 1 and config.order in SEMANTIC_ORDERS:
            raise _error("reuse_steps", reuse_steps, f"1 with the order {config.order}, whose blocks change every step")
        steps = warm_up if chosen.dense_steps is None else chosen.dense_steps
        schedule = Schedule(pipe, steps) if knows_steps else None
        settings = PatchSettings(
            config=config,
            preset=chosen.name,
            start_percent=0.0,
            end_percent=1.0,
            dense_steps=None,
            dense_blocks=frozenset(dense_blocks),
            min_tokens=min_tokens,
            backend=backend,
            verbose=False,
            reuse_steps=reuse_steps,
            falling=falling,
        )
        planned.append((transformer, TransformerState(family, settings, schedule, off=sparsity == 0)))
    remove_psa(pipe)
    patches = [_Patch(transformer, state) for transformer, state in planned]
    return AppliedPSA([patch.state for patch in patches], patches)


def remove_psa(pipe: Any) -> bool:
    """Take PSA off a pipeline or transformer; whether it was there."""
    found = [patch for t in _transformers(pipe) if (patch := t.__dict__.get(_ATTRIBUTE)) is not None]
    for patch in found:
        patch.remove()
    return bool(found)


def _error(argument: str, given: object, allowed: str) -> ValueError:
    return ValueError(f"apply_psa, {refusal(argument, given, allowed)}")


def _transformers(pipe: Any) -> list[Any]:
    candidates = (
        [pipe]
        if isinstance(pipe, torch.nn.Module)
        else [getattr(pipe, name, None) for name in ("transformer", "transformer_2")]
    )
    # By identity: a pipeline may hold one transformer under both names.
    found = list({id(one): one for one in candidates if type(one).__name__ in MODELS}.values())
    if not found:
        allowed = f"a pipeline with {', '.join(MODELS)}"
        raise TypeError(str(_error("pipe", type(pipe).__name__, allowed)))
    return found
