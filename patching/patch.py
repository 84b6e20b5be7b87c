"""Patch a loaded ComfyUI model with PSA, and take the patch off again: a clone is changed, never the model itself.

Two keyed wrappers carry the run: the one around sampling makes it and drops it, the one around a model call tells it
the step and the grid. What is assumed about ComfyUI's insides stands in `core.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from ..errors import InputError, require_model
from . import core
from .family import Family, find_family
from .layout import CallReader
from .maps import RunMaps
from .override import RUN_KEY, PSAOverride
from .report import make_report, summary
from .run import Run, is_active, log
from .settings import PatchSettings, make_settings

KEY = "psa"
AUTO = "auto"
ONE_PYRAMID = "set preset to auto or unplug PSA Pyramid"
STOCK = "sparsity is 0: the model is the stock one"
ANY_SPARSITY = 0.95  # one that every pyramid reaches, to judge the other inputs where the slider is 0

_SCHEDULE_BEGINS = 0.005
"""Percent before which a run counts as begun at the schedule's beginning."""


@dataclasses.dataclass
class PatchHandle:
    """Attached to the patched model and shared by its clones: what was set, and the report of the last run."""

    note: str
    settings: PatchSettings | None = None
    report: dict[str, Any] | None = None
    maps: RunMaps | None = None


def patch_model(
    model: Any,
    *,
    sparsity: float,
    preset: str,
    on_step: Callable[[dict[str, Any]], None] | None = None,
    **inputs: Any,
) -> Any:
    """A clone of a ComfyUI MODEL that attends with PSA; unpatched, with one log line, where PSA cannot serve it.

    Args:
        model: ComfyUI's ModelPatcher; sparsity 0 returns the stock model. preset: a name or `auto`.
        on_step: gets the figures of every step of every run, for a display.
        inputs: the other inputs of `settings.make_settings`.

    Raises:
        InputError: an input is wrong, naming it.
    """
    require_model(model)
    family = find_family(model)
    if isinstance(family, str):
        make_settings(sparsity=sparsity or ANY_SPARSITY, preset="wan2.1-14b" if preset == AUTO else preset, **inputs)
        log.warning("PSA: the model stays dense: %s", family)
        return _unpatched(model, family)
    if inputs.get("psa_pyramid") is not None and preset != AUTO:
        allowed = f"{AUTO} while PSA Pyramid is connected, which takes the preset's place"
        raise InputError("preset", preset, allowed, do=ONE_PYRAMID)
    preset = family.preset if preset == AUTO else preset
    if sparsity == 0:
        make_settings(sparsity=ANY_SPARSITY, preset=preset, blocks=family.blocks, **inputs)
        log.info("PSA: %s", STOCK)
        return _unpatched(model, STOCK)
    settings = make_settings(sparsity=sparsity, preset=preset, blocks=family.blocks, **inputs)
    if settings.config.sparsity is None:
        log.info("PSA: the levels are taken as they are written, the slider (%.2f) does not act", sparsity)
    log.info("PSA: %s: %s", family.name, settings)
    log.debug("PSA: %s", settings.config)
    if settings.dense_steps is not None:
        log.info("PSA: preset %s: dense steps: %d; start_percent does not act", preset, settings.dense_steps)
    if family.advice is not None:
        log.warning("PSA: %s", family.advice)
    return apply_patch(model, settings, family, on_step)


def apply_patch(
    model: Any, settings: PatchSettings, family: Family, on_step: Callable[[dict[str, Any]], None] | None = None
) -> Any:
    """A clone of `model` with override and wrappers in place; an earlier PSA patch on it is replaced."""
    patched = remove_patch(model)
    handle = PatchHandle("patched", settings)
    previous = core.get_override(patched)
    if previous is not None:
        log.info("PSA: the attention override that was there before computes what PSA leaves dense")
    core.set_override(patched, PSAOverride(previous))

    def outer_sample(executor: Any, *args: Any, **kwargs: Any) -> Any:
        guider = executor.class_obj
        run = Run(
            settings,
            _sigma_start(settings, guider, core.run_sigmas(args, kwargs)),
            core.percent_to_sigma(guider, settings.end_percent),
            pictured_block=family.blocks // 2,
            on_step=on_step,
        )
        options = core.run_options(guider)
        options[RUN_KEY] = run
        completed = False
        try:
            output = executor(*args, **kwargs)
            completed = True
            return output
        finally:
            options.pop(RUN_KEY, None)
            _close(run, handle, completed)

    core.add_wrappers(patched, KEY, sampling=outer_sample, before_call=_before_call(family.read_call))
    patched.set_attachments(KEY, handle)
    return patched


def _close(run: Run, handle: PatchHandle, completed: bool) -> None:
    """End a run and keep its report. It waits for the device, where an error of before may come up; a run that went
    well must not fail by its report, and one that failed must fail by its own error."""
    try:
        run.end()
        if completed:
            _warn_if_unreached(run)
        handle.report = make_report(run)
        if completed and handle.report["steps"]:
            log.info("PSA: %s", summary(handle.report))
        handle.maps = None if run.maps is None else run.maps.to_host()
    except Exception as error:
        handle.report = handle.maps = None
        log.warning("PSA: no report of this run: %s: %s", type(error).__name__, error)


def _warn_if_unreached(run: Run) -> None:
    """Say so when all that PSA was to serve in a run went past it, which no single call can notice."""
    reason = None
    active = [step for step in run.steps if is_active(step.sigma, run.sigma_start, run.sigma_end)]
    if not run.steps:
        reason = "no call of the model came to PSA in this run: a cache or a compiled model answered all of them"
    elif not any(step.densities or step.dense_calls for step in active or run.steps):
        reason = (
            "no self-attention came to PSA in this run: a node has put its own attention in front and computes it all; "
            "wire PSA Patch behind that node; Model Sparse Attention always goes to the front, bypass it"
        )
    if reason is not None:
        log.warning("PSA: %s", reason)
        run.fallbacks[reason] += 1


def _sigma_start(settings: PatchSettings, guider: Any, sigmas: list[float]) -> float:
    """The noise level at which PSA begins. A preset that counts steps counts them where the schedule begins: the second
    of two samplers that share one schedule, and an image that is only reworked, have no dense steps."""
    if settings.dense_steps is None:
        return core.percent_to_sigma(guider, settings.start_percent)
    if sigmas[0] < core.percent_to_sigma(guider, _SCHEDULE_BEGINS):
        return sigmas[0]
    return sigmas[min(settings.dense_steps, len(sigmas) - 1)]


def remove_patch(model: Any) -> Any:
    """A clone of `model` without PSA: whatever override was there before is back."""
    clone = model.clone()
    override = core.get_override(clone)
    if isinstance(override, PSAOverride):
        core.set_override(clone, override.previous)
    core.remove_wrappers(clone, KEY)
    clone.remove_attachments(KEY)
    return clone


def _unpatched(model: Any, note: str) -> Any:
    clone = remove_patch(model)
    clone.set_attachments(KEY, PatchHandle(note))
    return clone


def _before_call(read_call: CallReader) -> Any:
    def before_call(network: Any, x: Any, context: Any, options: dict[str, Any], conds: dict[str, Any]) -> None:
        """Tells the run its step and where the tokens lie."""
        run: Run | None = options.get(RUN_KEY)
        if run is not None:
            run = options[RUN_KEY] = run.part(core.worker_of(options))
            if not run.steps:
                run.plan(options.get("sample_sigmas"), x.device)
            sigma = core.current_sigma(options)
            run.begin_model_call(sigma, core.current_step(options, sigma), *read_call(network, x, context, conds))

    return before_call
