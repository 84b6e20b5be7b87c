"""Makes a native CogVideoX MODEL compute what diffusers computes. Only a clone is changed; unloading it undoes it all.

It uses only ComfyUI's own means (object patches and one keyed wrapper). Weights are never touched.
"""

from __future__ import annotations

import logging
from typing import Any

import torch

from ..choices.errors import InputError, require_model
from .frames import pad_odd_frames
from .positions import positioned_patch_embed, rotary_embedder
from .run_inputs import check_run
from .schedule import make_sampling
from .variant import Variant, find_variant

KEY = "psa_cogvideox"
# Channels of the latent, and of latent plus start image. Inpainting models (VOID) have more, and use a core sampler.
_RELEASED_CHANNELS = (16, 32)

log = logging.getLogger("ComfyUI-PSA")


def is_corrected(model: Any) -> bool:
    """Whether a ComfyUI MODEL has these corrections."""
    return model.get_attachment(KEY) is not None


def missing_corrections(model: Any) -> str | None:
    """A sentence for the user if a CogVideoX MODEL should have the corrections and does not; otherwise None."""
    channels = model.model.model_config.unet_config.get("in_channels")
    if is_corrected(model) or channels not in _RELEASED_CHANNELS:
        return None
    return "this CogVideoX model has ComfyUI's own positions and schedule; put PSA CogVideoX Fix after its loader"


def correct_model(model: Any, variant: Variant | None = None, node: str = "PSA CogVideoX Fix") -> Any:
    """A clone of a CogVideoX MODEL with the positions, noise schedule and frame padding from its training.

    Args:
        model: ComfyUI's ModelPatcher. variant: None works it out from the model's sizes. node: named in the error.

    Raises:
        InputError: the model is not CogVideoX.
    """
    require_model(model, node)
    config = getattr(getattr(model.model, "model_config", None), "unet_config", {})
    if config.get("image_model") != "cogvideox":
        given = config.get("image_model") or type(model.model).__name__
        do = "connect a CogVideoX model, or leave out this node"
        raise InputError("model", given, "a CogVideoX model", node, do=do)
    corrected = model.clone()
    if is_corrected(model):
        log.info("PSA: the CogVideoX model is corrected already")
        return corrected
    variant = variant or find_variant(config)
    network = model.get_model_object("diffusion_model")
    _correct_positions(corrected, network, variant)
    corrected.add_object_patch("model_sampling", make_sampling(variant.schedule, model.model.model_config))
    _add_run_wrapper(corrected, variant, config)
    corrected.set_attachments(KEY, variant)
    log.info("PSA: %s: %s", variant.name, _summary(variant))
    warning = float16_warning(corrected, variant)
    if warning:
        log.warning("PSA: %s", warning)
    return corrected


def _correct_positions(patched: Any, network: Any, variant: Variant) -> None:
    prefix = "diffusion_model."
    patched.add_object_patch(prefix + "use_rotary_positional_embeddings", variant.rotary)
    if variant.rotary and variant.version == "1.0":
        embedder = rotary_embedder(variant, network.patch_size, network.attention_head_dim)
        patched.add_object_patch(prefix + "_get_rotary_emb", embedder)
    if variant.learned_positions or not variant.rotary:
        # ComfyUI's own positions are switched off and ours are used instead.
        patched.add_object_patch(prefix + "patch_embed.use_positional_embeddings", False)
        patched.add_object_patch(prefix + "patch_embed.use_learned_positional_embeddings", False)
        embedding = positioned_patch_embed(type(network.patch_embed), variant)
        patched.add_object_patch(prefix + "patch_embed.__class__", embedding)


def _add_run_wrapper(patched: Any, variant: Variant, config: dict[str, Any]) -> None:
    import comfy.patcher_extension

    def outer_sample(executor: Any, noise: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        check_run(variant, config, noise, executor.class_obj.conds)
        if variant.version == "1.5":
            return pad_odd_frames(executor, variant, noise, *args, **kwargs)
        return executor(noise, *args, **kwargs)

    kind = comfy.patcher_extension.WrappersMP.OUTER_SAMPLE
    patched.remove_wrappers_with_key(kind, KEY)
    patched.add_wrapper_with_key(kind, KEY, outer_sample)


def float16_warning(model: Any, variant: Variant) -> str | None:
    """A sentence if a model trained in bfloat16 will run in float16, whose range its numbers exceed; otherwise None.

    2B, the one without rotary positions, was trained in float16.
    """
    base = model.model
    computed = getattr(base, "manual_cast_dtype", None) or base.get_dtype()
    if computed != torch.float16 or not variant.rotary:
        return None
    return (
        f"{variant.name}: it is computed in float16, but was trained in bf16: the video may turn out black or broken. "
        "Take the model's bf16 file, or start ComfyUI with --bf16-unet (where the GPU has no bf16: --fp32-unet)"
    )


def _summary(variant: Variant) -> str:
    positions = "rotary positions" if variant.rotary else "sin-cos positions"
    if variant.learned_positions:
        positions += " and trained ones"
    return f"{positions}, noise schedule with SNR shift {variant.schedule['snr_shift_scale']:g}"
