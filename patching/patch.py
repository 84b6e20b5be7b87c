"""Patch a loaded ComfyUI model with PSA, and take the patch off again: a clone is changed, never the model itself.

Two keyed wrappers carry the run: OUTER_SAMPLE makes it and drops it, DIFFUSION_MODEL tells it the step and the grid.
Everything that touches ComfyUI's internals for patching stands here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from ..errors import InputError
from .family import Family, find_family
from .layout import CallReader
from .maps import RunMaps
from .override import OVERRIDE_KEY, RUN_KEY, PSAOverride
from .report import make_report
from .run import Run, log
from .settings import PatchSettings, make_settings

KEY = "psa"
AUTO = "auto"
ANY_SPARSITY = 0.95  # one that every pyramid reaches, to judge the other inputs where the slider is 0


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
    family = find_family(model)
    if isinstance(family, str):
        make_settings(sparsity=sparsity or ANY_SPARSITY, preset="wan2.1-14b" if preset == AUTO else preset, **inputs)
        log.warning("PSA: the model stays dense: %s", family)
        return _unpatched(model, family)
    if inputs.get("psa_pyramid") is not None and preset != AUTO:
        raise InputError("preset", preset, f"{AUTO} while PSA Pyramid is connected, which takes the preset's place")
    preset = family.preset if preset == AUTO else preset
    if sparsity == 0:
        make_settings(sparsity=ANY_SPARSITY, preset=preset, blocks=family.blocks, **inputs)
        return _unpatched(model, "sparsity is 0: the model is the stock one")
    settings = make_settings(sparsity=sparsity, preset=preset, blocks=family.blocks, **inputs)
    if settings.config.sparsity is None:
        log.info("PSA: the levels are taken as they are written, the slider (%.2f) does not act", sparsity)
    log.info("PSA: %s, preset %s, %s", family.name, preset, settings.config)
    if family.advice is not None:
        log.warning("PSA: %s", family.advice)
    return apply_patch(model, settings, family, on_step)


def apply_patch(
    model: Any, settings: PatchSettings, family: Family, on_step: Callable[[dict[str, Any]], None] | None = None
) -> Any:
    """A clone of `model` with override and wrappers in place; an earlier PSA patch on it is replaced."""
    import comfy.patcher_extension

    patched = remove_patch(model)
    handle = PatchHandle("patched", settings)
    options = patched.model_options["transformer_options"]
    options[OVERRIDE_KEY] = PSAOverride(options.get(OVERRIDE_KEY))

    def outer_sample(executor: Any, *args: Any, **kwargs: Any) -> Any:
        guider = executor.class_obj
        sampling = guider.model_patcher.get_model_object("model_sampling")
        run = Run(
            settings,
            float(sampling.percent_to_sigma(settings.start_percent)),
            float(sampling.percent_to_sigma(settings.end_percent)),
            pictured_block=family.blocks // 2,
            on_step=on_step,
        )
        # The guider's options are a copy made for this run, so nothing of it outlives the run.
        guider.model_options["transformer_options"][RUN_KEY] = run
        try:
            return executor(*args, **kwargs)
        finally:
            guider.model_options["transformer_options"].pop(RUN_KEY, None)
            run.end()
            handle.report = make_report(run)
            handle.maps = None if run.maps is None else run.maps.to_host()

    wrappers = comfy.patcher_extension.WrappersMP
    patched.add_wrapper_with_key(wrappers.OUTER_SAMPLE, KEY, outer_sample)
    patched.add_wrapper_with_key(wrappers.DIFFUSION_MODEL, KEY, _model_call_wrapper(family.read_call))
    patched.set_attachments(KEY, handle)
    return patched


def remove_patch(model: Any) -> Any:
    """A clone of `model` without PSA: whatever override was there before is back."""
    import comfy.patcher_extension

    clone = model.clone()
    options = clone.model_options.setdefault("transformer_options", {})
    override = options.get(OVERRIDE_KEY)
    if isinstance(override, PSAOverride):
        if override.previous is None:
            del options[OVERRIDE_KEY]
        else:
            options[OVERRIDE_KEY] = override.previous
    wrappers = comfy.patcher_extension.WrappersMP
    for kind in (wrappers.OUTER_SAMPLE, wrappers.DIFFUSION_MODEL):
        clone.remove_wrappers_with_key(kind, KEY)
    clone.remove_attachments(KEY)
    return clone


def _unpatched(model: Any, note: str) -> Any:
    clone = remove_patch(model)
    clone.set_attachments(KEY, PatchHandle(note))
    return clone


def _model_call_wrapper(read_call: CallReader) -> Any:
    def diffusion_model(executor: Any, x: Any, timestep: Any, context: Any, *args: Any, **kwargs: Any) -> Any:
        """DIFFUSION_MODEL wrapper: tells the run its step and where the tokens lie."""
        options = kwargs.get("transformer_options")
        if options is None:
            options = next((arg for arg in args if isinstance(arg, dict)), {})
        run: Run | None = options.get(RUN_KEY)
        if run is not None:
            # One read from the device per model call; attention calls must not do it.
            sigma = float(options["sigmas"].flatten()[0])
            schedule = options.get("sample_sigmas")
            if not run.steps:
                run.plan(schedule, x.device)
            step = 0 if schedule is None else int((schedule > sigma * (1 + 1e-4)).sum())
            run.begin_model_call(sigma, step, *read_call(executor.class_obj, x, context, args, kwargs))
        return executor(x, timestep, context, *args, **kwargs)

    return diffusion_model
