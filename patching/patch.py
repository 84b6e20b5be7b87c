"""Patch a loaded ComfyUI model with PSA, and take the patch off again: a clone is changed, never the model itself.

What the patch does while the model samples is in `handle.py` and `override.py`; what we assume about ComfyUI's insides
is in `core.py`.
"""

from __future__ import annotations

import uuid
from typing import Any

from ..choices.errors import require_model
from ..choices.settings import ANY_SPARSITY, AUTO, PatchSettings, make_settings
from ..sampling.run import log
from . import core
from .family import find_family
from .handle import CallListener, Listener, PatchHandle, SamplingWrapper
from .operator import note_options
from .override import PSAOverride
from .support import Support

KEY = "psa"
STOCK = "sparsity is 0: the model is the stock one"


def patch_model(
    model: Any, *, sparsity: float, on_step: Listener | None = None, on_end: Listener | None = None, **inputs: Any
) -> Any:
    """A clone of a ComfyUI MODEL that attends with PSA; unpatched, with one log line, if PSA does not support it.

    Args:
        model: ComfyUI's ModelPatcher; sparsity 0 returns the stock model.
        on_step: gets the figures of every step of every run, for a display. on_end: gets those of every
            finished run, see `handle.figures`.
        inputs: the other inputs of PSA Patch, see `choices.settings.PatchInputs`.

    Raises:
        InputError: an input is wrong; the error names it.
    """
    require_model(model)
    family = find_family(model, inputs.get("preset", AUTO))
    served: dict[str, Any] = {"auto": family.preset, "blocks": family.blocks} if isinstance(family, Support) else {}
    settings = make_settings(sparsity=sparsity or ANY_SPARSITY, **served, **inputs)
    if isinstance(family, str):
        log.warning("PSA: the model stays dense: %s", family)
        return _unpatched(model, family)
    if sparsity == 0:
        log.info("PSA: %s", STOCK)
        return _unpatched(model, STOCK)
    if settings.config.sparsity is None:
        log.info("PSA: the levels are used as written, so the sparsity slider (%.2f) has no effect", sparsity)
    log.info("PSA: %s: %s", family.name, settings)
    log.debug("PSA: %s", settings.config)
    if settings.dense_steps is not None:
        log.info("PSA: preset %s: dense steps: %d; start_percent has no effect", settings.preset, settings.dense_steps)
    if family.advice is not None:
        log.warning("PSA: %s", family.advice)
    return apply_patch(model, settings, family, on_step, on_end)


def apply_patch(
    model: Any,
    settings: PatchSettings,
    family: Support,
    on_step: Listener | None = None,
    on_end: Listener | None = None,
) -> Any:
    """A clone of `model` with the override and the wrappers; an earlier PSA patch on it is replaced."""
    patched = remove_patch(model)
    handle = PatchHandle("patched", settings)
    previous = core.get_override(patched)
    if previous is not None:
        log.info("PSA: the attention override that was there before computes what PSA leaves dense")
    patch = uuid.uuid4().hex
    override = PSAOverride(previous, patch=patch)
    core.set_override(patched, override)

    sampling = SamplingWrapper(patch, settings, family.blocks, handle, on_step, on_end)
    core.add_wrappers(patched, KEY, sampling=sampling, before_call=CallListener(family, override))
    core.wrap_network(patched, KEY, note_options)
    patched.set_attachments(KEY, handle)
    return patched


def remove_patch(model: Any) -> Any:
    """A clone of `model` without PSA; an override that was there before is put back."""
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
