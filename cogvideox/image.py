"""Conditioning of the CogVideoX image-to-video models: the start image as a latent, beside an empty video latent."""

from __future__ import annotations

from typing import Any

import torch

from ..errors import InputError


def image_to_video(
    positive: Any, negative: Any, vae: Any, start_image: torch.Tensor, width: int, height: int, length: int, batch: int
) -> tuple[Any, Any, dict[str, torch.Tensor]]:
    """Both conditionings with the image in their first latent frame, and zeros [B, 16, T, height/8, width/8] to sample.

    Args:
        start_image: [B, H, W, 3], resized to fill width x height, its first picture alone; length: frames.
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
            raise InputError(name, given, allowed, "PSA CogVideoX Image To Video", do=f"connect {allowed} to {name}")
    pixels = comfy.utils.common_upscale(start_image[:1, :, :, :3].movedim(-1, 1), width, height, "lanczos", "center")
    # The frames behind the first are left to the model, which pads them with zeros as diffusers does.
    image = vae.encode(pixels.movedim(1, -1))
    given = {"concat_latent_image": image}
    positive, negative = (node_helpers.conditioning_set_values(cond, given) for cond in (positive, negative))
    shape = [batch, image.shape[1], (length - 1) // 4 + 1, height // 8, width // 8]
    return positive, negative, {"samples": torch.zeros(shape, device=comfy.model_management.intermediate_device())}
