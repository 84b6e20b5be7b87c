"""Makes a native CogVideoX MODEL compute what diffusers computes: a clone is changed, unloading it undoes everything.

Only ComfyUI's own means are used (object patches and one keyed wrapper). Weights are never touched.
"""

from __future__ import annotations

import logging
from typing import Any

from ..errors import InputError, require_model
from .frames import pad_odd_frames
from .positions import positioned_patch_embed, rotary_embedder
from .schedule import make_sampling
from .variant import Variant, find_variant

KEY = "psa_cogvideox"
# Of the latent, and of latent and start image. Inpainting models (VOID) have more, and a sampler of the core.
_RELEASED_CHANNELS = (16, 32)

log = logging.getLogger("ComfyUI-PSA")


def is_corrected(model: Any) -> bool:
    """Whether a ComfyUI MODEL has these corrections."""
    return model.get_attachment(KEY) is not None


def missing_corrections(model: Any) -> str | None:
    """A sentence for the user of a CogVideoX MODEL that should have the corrections and does not; otherwise None."""
    channels = model.model.model_config.unet_config.get("in_channels")
    if is_corrected(model) or channels not in _RELEASED_CHANNELS:
        return None
    return "this CogVideoX model has ComfyUI's own positions and schedule; put PSA CogVideoX Fix behind its loader"


def correct_model(model: Any, variant: Variant | None = None, node: str = "PSA CogVideoX Fix") -> Any:
    """A clone of a CogVideoX MODEL with the positions, noise schedule and frame padding that it was trained with.

    Args:
        model: ComfyUI's ModelPatcher. variant: None takes it from the sizes of the model. node: for the error.

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
    if variant.version == "1.5":
        _add_frame_padding(corrected, variant)
    corrected.set_attachments(KEY, variant)
    log.info("PSA: %s: %s", variant.name, _summary(variant))
    return corrected


def _correct_positions(patched: Any, network: Any, variant: Variant) -> None:
    prefix = "diffusion_model."
    patched.add_object_patch(prefix + "use_rotary_positional_embeddings", variant.rotary)
    if variant.rotary and variant.version == "1.0":
        embedder = rotary_embedder(variant, network.patch_size, network.attention_head_dim)
        patched.add_object_patch(prefix + "_get_rotary_emb", embedder)
    if variant.learned_positions or not variant.rotary:
        # ComfyUI's own positions are switched off, ours come in their place.
        patched.add_object_patch(prefix + "patch_embed.use_positional_embeddings", False)
        patched.add_object_patch(prefix + "patch_embed.use_learned_positional_embeddings", False)
        embedding = positioned_patch_embed(type(network.patch_embed), variant)
        patched.add_object_patch(prefix + "patch_embed.__class__", embedding)


def _add_frame_padding(patched: Any, variant: Variant) -> None:
    import comfy.patcher_extension

    def outer_sample(executor: Any, *args: Any, **kwargs: Any) -> Any:
        return pad_odd_frames(executor, variant, *args, **kwargs)

    kind = comfy.patcher_extension.WrappersMP.OUTER_SAMPLE
    patched.remove_wrappers_with_key(kind, KEY)
    patched.add_wrapper_with_key(kind, KEY, outer_sample)


def _summary(variant: Variant) -> str:
    positions = "rotary positions" if variant.rotary else "sin-cos positions"
    if variant.learned_positions:
        positions += " and trained ones"
    return f"{positions}, noise schedule with SNR shift {variant.schedule['snr_shift_scale']:g}"
