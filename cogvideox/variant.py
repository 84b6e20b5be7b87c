"""What a CogVideoX checkpoint needs besides its weights: which positions, which noise schedule, how an image is scaled.

ComfyUI reads a model's sizes from its weights and cannot see these. A diffusers folder has them in its configs; for a
bare file they follow from the released models (2B, 5B, 5B-I2V, 1.5-5B, 1.5-5B-I2V). No tensors, no ComfyUI here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

# The released 2B is the only model with 30 heads; it has no rotary positions and an SNR shift of 3.
_HEADS_OF_2B = 30


@dataclasses.dataclass(frozen=True)
class Variant:
    """One kind of CogVideoX model.

    Attributes:
        name: for messages.
        version: "1.0" or "1.5" (temporal patches).
        rotary: queries and keys are rotated by position; False for 2B, which adds sin-cos positions to its tokens.
        learned_positions: the checkpoint holds trained positions for its own video size (5B-I2V of 1.0).
        sample_height, sample_width, sample_frames: latent rows and columns, and pixel frames, of the training videos.
        spatial_scale, temporal_scale: divisors of the sin-cos positions.
        schedule: arguments for diffusers' CogVideoX schedulers that make the noise schedule.
        inverted_image_scale: the image latent is divided by the latent scale (1.5 I2V) instead of multiplied by it.
        from_image: the first frame is given (I2V).
    """

    name: str
    version: str
    rotary: bool
    learned_positions: bool
    sample_height: int = 60
    sample_width: int = 90
    sample_frames: int = 49
    spatial_scale: float = 1.875
    temporal_scale: float = 1.0
    schedule: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    inverted_image_scale: bool = False
    from_image: bool = False


def find_variant(
    unet_config: Mapping[str, Any],
    transformer: Mapping[str, Any] | None = None,
    scheduler: Mapping[str, Any] | None = None,
    vae: Mapping[str, Any] | None = None,
) -> Variant:
    """The variant of a model.

    Args:
        unet_config: what ComfyUI worked out from the weights.
        transformer, scheduler, vae: the config files of a diffusers folder, if there is one.

    Raises:
        ValueError: no CogVideoX model has a config like this, or one of its values; names the value.
    """
    transformer = _checked(transformer, "the config.json of its transformer")
    scheduler = _checked(scheduler, "its scheduler_config.json")
    vae = _checked(vae, "the config.json of its VAE")
    version = "1.0" if unet_config.get("patch_size_t") is None else "1.5"
    two_b = version == "1.0" and unet_config.get("num_attention_heads") == _HEADS_OF_2B
    rotary = transformer.get("use_rotary_positional_embeddings", not two_b)
    from_image = unet_config.get("in_channels") == 32
    size = {
        name: transformer[name] for name in ("sample_height", "sample_width", "sample_frames") if name in transformer
    }
    if version == "1.5" and not size:
        size = {"sample_height": 96, "sample_width": 170, "sample_frames": 81}
    return Variant(
        name=f"CogVideoX {version}, {unet_config.get('num_attention_heads')} heads" + ", from an image" * from_image,
        version=version,
        rotary=rotary,
        learned_positions=bool(unet_config.get("use_learned_positional_embeddings")),
        spatial_scale=transformer.get("spatial_interpolation_scale", 1.875),
        temporal_scale=transformer.get("temporal_interpolation_scale", 1.0),
        schedule=_schedule(scheduler, snr_shift_scale=1.0 if rotary else 3.0),
        inverted_image_scale=vae.get("invert_scale_latents", version == "1.5" and from_image),
        from_image=from_image,
        **size,
    )


_FLAG, _FORMULA = "true or false", "linear, scaled_linear, squaredcos_cap_v2"
# What we read from the configs -> minimum and maximum, or the choices; if both ends are whole, the value must be too.
_ALLOWED: Mapping[str, Any] = {
    "use_rotary_positional_embeddings": _FLAG,
    "sample_height": (2, 4096),
    "sample_width": (2, 4096),
    "sample_frames": (1, 4096),
    "spatial_interpolation_scale": (0.01, 100.0),
    "temporal_interpolation_scale": (0.01, 100.0),
    "invert_scale_latents": _FLAG,
    "num_train_timesteps": (2, 100_000),
    "beta_start": (1e-6, 0.999),
    "beta_end": (1e-6, 0.999),
    "beta_schedule": _FORMULA,
    "rescale_betas_zero_snr": _FLAG,
    "snr_shift_scale": (0.01, 100.0),
}


def _checked(config: Mapping[str, Any] | None, file: str) -> dict[str, Any]:
    """The entries of a config that are not null; ValueError if one that we use is impossible."""
    found = {name: value for name, value in (config or {}).items() if value is not None}
    for name, allowed in _ALLOWED.items():
        if name in found and not _fits(found[name], allowed):
            what = allowed if isinstance(allowed, str) else f"{allowed[0]:g} to {allowed[1]:g}"
            raise ValueError(f"{file} says {name}: {found[name]!r:.80}; allowed: {what}. Download that file again")
    return found


def _fits(value: object, allowed: Any) -> bool:
    if isinstance(allowed, str):
        return isinstance(value, bool) if allowed is _FLAG else value in allowed.split(", ")
    if isinstance(value, bool) or not isinstance(value, int if isinstance(allowed[0], int) else int | float):
        return False
    return allowed[0] <= value <= allowed[1]


def _schedule(scheduler: Mapping[str, Any], **defaults: Any) -> dict[str, Any]:
    """The schedule of the config file or, if there is none, of the released models."""
    released = {
        "num_train_timesteps": 1000,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "rescale_betas_zero_snr": True,
        **defaults,
    }
    prediction = scheduler.get("prediction_type", "v_prediction")
    if prediction != "v_prediction" or scheduler.get("trained_betas") is not None:
        raise ValueError(f"its scheduler config says {prediction!r} or lists betas; CogVideoX predicts v on a formula")
    return {name: scheduler.get(name, value) for name, value in released.items()}
