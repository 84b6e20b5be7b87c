"""Put PSA on a diffusers pipeline's transformers, and take it off again; no class, module or processor is replaced.

Each transformer gets hooks that read the step and the grid of a call. Each self-attention gets a `forward` in front of
its own, so that `interception.py` can compute its attention. Processors stay those of diffusers or of the user.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from numbers import Integral
from typing import Any

import torch

from ..choices.correction import CORRECTIONS, OFF
from ..choices.presets import load_presets
from ..choices.settings import AUTO, MOST_REUSE_STEPS, MOST_SPARSITY, PatchInputs, PatchSettings
from ..kernels.backends import BACKENDS
from ..kernels.falling import MOST_FALLING
from .arguments import ArgumentChecks, is_number, wrong
from .attention_backends import unseen_backend
from .interception import InterceptedForward
from .layout import MODELS, family_of, transformer_in
from .operator import Untraced
from .schedule import Schedule
from .state import TransformerState

_ATTRIBUTE = "_psa_applied"
_OUTSIDE = (
    "PSA reads the step before the transformer runs, so that cannot be in its graph; for fullgraph=True use "
    "pipe.transformer = torch.compile(pipe.transformer, ...) before apply_psa, or compile only the blocks"
)


@dataclasses.dataclass
class AppliedPSA:
    """What `apply_psa` did, and what came of it.

    Attributes:
        states: one for each transformer of the pipeline.
    """

    states: list[TransformerState]
    _patches: list[_Patch]

    @property
    def sparse_calls(self) -> int:
        """Number of self-attention calls that PSA has computed since it was applied."""
        return sum(state.totals().sparse for state in self.states)

    @property
    def dense_calls(self) -> int:
        """Number of self-attention calls that stayed dense: in the warm-up, and those in `fallbacks`."""
        return sum(state.totals().dense for state in self.states)

    @property
    def fallbacks(self) -> Counter[str]:
        """Why calls outside the warm-up stayed dense, and how many."""
        return sum((state.totals().fallbacks for state in self.states), Counter())

    def mean_sparsity(self) -> float | None:
        """Mean sparsity of the calls that PSA computed, None if there were none. Reads from the device."""
        totals = [state.totals() for state in self.states]
        densities = [float(total.sums[0]) for total in totals if total.sums is not None]
        return 1 - sum(densities) / sum(total.counted for total in totals) if densities else None

    def unranked_pairs(self) -> int:
        """Number of pairs of blocks whose importance was not a finite number; they ranked last. Reads from the device.

        If it is not 0, the model's own queries or keys are infinite or not a number.
        """
        sums = [state.totals().sums for state in self.states]
        return sum(int(found[1]) for found in sums if found is not None)

    def reports(self) -> list[dict[str, Any] | None]:
        """The figures of the last run of each transformer, as PSA Report shows them; `sampling/figures.py` lists them.

        None for a transformer that has not run yet. Reads from the device. The time of the last step ends when its
        forward returns, while a GPU may still be computing.
        """
        return [state.report() for state in self.states]

    def remove(self) -> None:
        """Take PSA off, unless something else has replaced it; the transformers are then as they were before."""
        for patch in self._patches:
            patch.remove()


class _Patch:
    """PSA on one transformer, which keeps a reference to it: hooks that report its calls, and a `forward` in front of
    each self-attention's own."""

    def __init__(self, transformer: Any, outermost: Any, state: TransformerState) -> None:
        """outermost: what the pipeline calls: the transformer, or what torch.compile or PEFT made of it. Hooks there
        are not part of a graph, and PEFT calls no others."""
        self.transformer, self.state = transformer, state
        self._parts = [
            outermost.register_forward_pre_hook(Untraced(state.begin_call, _OUTSIDE), with_kwargs=True),
            outermost.register_forward_hook(Untraced(state.end_call, _OUTSIDE), always_call=True),
        ]
        for index, attention in enumerate(MODELS[state.family].attentions(transformer)):
            self._parts.append(InterceptedForward(attention, state, index))
            if (reason := MODELS[state.family].refusal(transformer) or unseen_backend(attention)) is not None:
                state.tell(reason)
        transformer.__dict__[_ATTRIBUTE] = self

    def remove(self) -> None:
        """Take PSA off this transformer; calling it again does nothing."""
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
    correction: str = PatchInputs.correction,
    **changes: Any,
) -> AppliedPSA:
    """Let a diffusers pipeline attend with PSA. Calling it again replaces the earlier settings.

    Args:
        pipe: a pipeline with a transformer that PSA knows, see docs/diffusers.md, or the transformer (of Wan2.2, both
            experts are patched). They may be compiled, before or after; with fullgraph=True either before, by
            torch.compile, or only their blocks.
        sparsity: share of the attention work that is saved in the sparse steps, 0 to 0.97; 0 keeps every call dense.
        preset: a name from `choices.presets.load_presets`, or auto.
        warm_up: how many of the first steps stay dense: a share of the steps (a float) or their number (an int). A
            transformer without its pipeline knows no steps, so it must be 0 there. A preset with its own number of
            dense steps overrides it.
        dense_blocks: transformer blocks that stay dense. min_tokens: shorter sequences stay dense.
        backend: auto, triton or torch.
        falling: how far the density falls over the sparse steps, 0 to 0.8, see `kernels/falling.py`. A transformer
            without its pipeline knows no steps, so its density stays the same throughout.
        reuse_steps: levels are chosen once in so many steps and kept in between; 1 chooses them in every step. A
            transformer without its pipeline knows no steps, so it must be 1 there.
        correction: gives sparse steps back what sparsity lost in the last dense step: full, half, quarter or eighth of
            a byte per number, auto for the finest that fits the memory, off. A transformer without its pipeline knows
            no steps, so it has none.
        changes: other fields of `kernels.config.PyramidConfig`, such as block_kv.

    Returns:
        An object with the figures, and `remove()` to take PSA off again.

    Raises:
        TypeError: not a pipeline or transformer that PSA knows.
        ValueError: an input is wrong; the error says what was given, what is allowed and what to do.
    """
    transformers = find_transformers(pipe)
    knows_steps = getattr(pipe, "scheduler", None) is not None
    checked = ArgumentChecks("apply_psa")
    checked.number("sparsity", sparsity, 0, MOST_SPARSITY)
    checked.preset(preset, AUTO)
    checked.number("min_tokens", min_tokens, 0, None, whole=True)
    checked.choice("backend", backend, BACKENDS)
    checked.number("falling", falling, 0, MOST_FALLING)
    checked.number("reuse_steps", reuse_steps, 1, MOST_REUSE_STEPS, whole=True)
    checked.choice("correction", correction, CORRECTIONS)
    warm_up = _check_steps(warm_up, reuse_steps, correction, knows_steps)
    presets = load_presets()
    corrected = knows_steps and sparsity > 0
    planned = []
    for transformer, outermost in transformers:
        family = family_of(transformer) or ""
        checked.numbers("dense_blocks", dense_blocks, 0, len(MODELS[family].attentions(transformer)))
        chosen = presets[MODELS[family].preset(transformer) if preset == AUTO else preset]
        config = checked.config(chosen, sparsity or 0.5, changes, falling, reuse_steps)
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
            correction=chosen.correction_of_size(correction) if corrected else None,
        )
        planned.append((transformer, outermost, TransformerState(family, settings, schedule, off=sparsity == 0)))
    states = [state for *_, state in planned]
    for state in states:
        state.others = [other for other in states if other is not state]
    remove_psa(pipe)
    patches = [_Patch(*parts) for parts in planned]
    return AppliedPSA([patch.state for patch in patches], patches)


def remove_psa(pipe: Any) -> bool:
    """Take PSA off a pipeline or transformer; returns whether it was there."""
    found = [
        patch for t, _ in find_transformers(pipe, "remove_psa") if (patch := t.__dict__.get(_ATTRIBUTE)) is not None
    ]
    for patch in found:
        patch.remove()
    return bool(found)


def _check_steps(warm_up: object, reuse_steps: int, correction: str, knows_steps: bool) -> float | int:
    """`warm_up` as an int for a number of steps and a float for a share; raises ValueError for what is no such number,
    and for what a transformer without its pipeline cannot do."""
    if is_number(warm_up, Integral):
        given: float | int = int(warm_up)  # type: ignore[call-overload]
        fits = given >= 0
    else:
        given = float(warm_up) if is_number(warm_up) else -1.0  # type: ignore[arg-type]
        fits = 0 <= given <= 1
    if not fits:
        do = "pass 0.25 for a quarter of the steps, or 4 for four steps"
        raise _error("warm_up", warm_up, "a share from 0.0 to 1.0 or a number of steps", do)
    if not knows_steps:
        do = "pass the pipeline, or leave it out"
        if given:
            raise _error("warm_up", warm_up, "0, a bare transformer knows no steps", "pass the pipeline, or warm_up=0")
        if reuse_steps > 1:
            raise _error("reuse_steps", reuse_steps, "1, a bare transformer knows no steps", do)
        if correction not in (AUTO, OFF):
            raise _error("correction", correction, "auto or off, a bare transformer knows no steps", do)
    return given


def _error(argument: str, given: object, allowed: str, do: str) -> ValueError:
    return wrong("apply_psa", argument, given, allowed, do)


def find_transformers(pipe: Any, asked_by: str = "apply_psa") -> list[tuple[Any, Any]]:
    """The transformers of a pipeline, each with what the pipeline calls: itself, or a module that holds it, such as
    torch.compile makes.

    Raises:
        TypeError: it has none that PSA knows. asked_by: the function that the error names.
    """
    candidates = (
        [pipe]
        if isinstance(pipe, torch.nn.Module)
        else [getattr(pipe, name, None) for name in ("transformer", "transformer_2")]
    )
    pairs = [(transformer_in(outermost), outermost) for outermost in candidates]
    # By identity: a pipeline may hold one transformer under both names.
    found = list({id(one): (one, outermost) for one, outermost in pairs if one is not None}.values())
    if not found:
        allowed = f"a pipeline with {', '.join(MODELS)}"
        raise TypeError(str(wrong(asked_by, "pipe", type(pipe).__name__, allowed, "pass such a pipeline")))
    return found
