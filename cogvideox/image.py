"""Conditioning of the CogVideoX image-to-video models: the start image as a latent, and an empty video latent."""

from __future__ import annotations

from typing import Any

import torch

from ..choices.errors import InputError
from .run_inputs import LATENT_CHANNELS

NODE = "PSA CogVideoX Image To Video"
_SIZES = {"width": (16, 16384, 8, 0), "height": (16, 16384, 8, 0), "length": (1, 16384, 4, 1)}
"""Minimum, maximum and step: 8 pixels per latent pixel; 4 frames per latent frame, plus a single one at the start."""


def size_error(name: str, value: object) -> InputError | None:
    """What is wrong with a value of `width`, `height` or `length`: None, or an error that names the nearest values."""
    least, most, step, rest = _SIZES[name]
    if type(value) is not int or not least <= value <= most:
        allowed = f"{least} to {most}"
        return InputError(name, value, allowed, NODE, do=f"set {name} to a whole number from {allowed}")
    if value % step == rest % step:
        return None
    below = max(least, value - (value - rest) % step)
    allowed = "4n + 1 frames" if name == "length" else "multiples of 16 (or of 8)"
    return InputError(name, value, allowed, NODE, do=f"set {name} to {below} or {below + step}, the nearest")


def check_width(width: int) -> None:
    """Raise InputError if the VAE has no latent for this width."""
    _check_size("width", width)


def check_height(height: int) -> None:
    """As `check_width`."""
    _check_size("height", height)


def check_length(length: int) -> None:
    """Raise InputError if the VAE has no latent for this number of frames."""
    _check_size("length", length)


def _check_size(name: str, value: int) -> None:
    error = size_error(name, value)
    if error is not None:
        raise error


def image_to_video(
    positive: Any, negative: Any, vae: Any, start_image: torch.Tensor, width: int, height: int, length: int, batch: int
) -> tuple[Any, Any, dict[str, torch.Tensor]]:
    """Both conditionings with the image in the first latent frame, and zeros [B, 16, T, height/8, width/8] to sample.

    Args:
        start_image: [B, H, W, 3], only its first picture, resized to fill width x height; length: frames.

    Raises:
        InputError: the VAE has no latent for this size, or an input is of the wrong kind.
    """
    import comfy.model_management
    import comfy.utils
    import node_helpers

    for name, given, fits, allowed in (
        ("positive", positive, isinstance(positive, list), "CONDITIONING"),
        ("negative", negative, isinstance(negative, list), "CONDITIONING"),
        ("vae", vae, hasattr(vae, "encode"), "the CogVideoX VAE"),
        ("start_image", start_image, isinstance(start_image, torch.Tensor), "IMAGE"),
    ):
        if not fits:
            raise InputError(name, given, allowed, NODE, do=f"connect {allowed} to {name}")
    if start_image.ndim != 4 or start_image.shape[-1] < 3 or not start_image.numel():
        allowed = "a picture with three colours"
        raise InputError("start_image", start_image, allowed, NODE, do="connect Load Image to start_image")
    check_width(width)
    check_height(height)
    check_length(length)
    pixels = comfy.utils.common_upscale(start_image[:1, :, :, :3].movedim(-1, 1), width, height, "lanczos", "center")
    # The model pads the frames after the first with zeros, as diffusers does.
    image = vae.encode(pixels.movedim(1, -1))
    if image.ndim != 5 or image.shape[1] != LATENT_CHANNELS:
        given = f"a VAE with {image.shape[1]} channels"
        raise InputError("vae", given, "the CogVideoX VAE", NODE, do="load the CogVideoX VAE with Load VAE")
    given = {"concat_latent_image": image}
    positive, negative = (node_helpers.conditioning_set_values(cond, given) for cond in (positive, negative))
    shape = [batch, image.shape[1], (length - 1) // 4 + 1, height // 8, width // 8]
    return positive, negative, {"samples": torch.zeros(shape, device=comfy.model_management.intermediate_device())}
