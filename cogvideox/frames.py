"""CogVideoX 1.5 takes latent frames in pairs: an odd number is made even by one extra frame in front, as in diffusers.

ComfyUI pads inside the model, at the end, with a copy of the first frame, which disturbs the end of the video. Our
extra frame is sampled like the others and dropped afterwards (diffusers' CogVideoXPipeline). The image latent of 1.5
I2V, which was trained without the latent scale, is handled here too, because it also changes a run's input.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .variant import Variant


def pad_odd_frames(
    executor: Any,
    variant: Variant,
    noise: torch.Tensor,
    latent_image: torch.Tensor,
    sampler: Any,
    sigmas: torch.Tensor,
    denoise_mask: torch.Tensor | None = None,
    callback: Callable[..., Any] | None = None,
    disable_pbar: bool = False,
    seed: int | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """OUTER_SAMPLE wrapper: samples [B, C, T, H, W] with an even T and returns the T that came in."""
    guider = executor.class_obj
    if variant.inverted_image_scale:
        scale = guider.model_patcher.model.latent_format.scale_factor
        guider.conds = {kind: [_unscaled_image(cond, scale) for cond in conds] for kind, conds in guider.conds.items()}
    if noise.ndim != 5 or noise.shape[2] % 2 == 0:
        return executor(noise, latent_image, sampler, sigmas, denoise_mask, callback, disable_pbar, seed, **kwargs)
    if "latent_shapes" in kwargs:
        kwargs["latent_shapes"] = [(*shape[:2], shape[2] + 1, *shape[3:]) for shape in kwargs["latent_shapes"]]
    if denoise_mask is not None and denoise_mask.shape[2] == noise.shape[2]:
        denoise_mask = _repeat_first(denoise_mask)
    visible = None
    if callback is not None:

        def visible(step: int, clean: torch.Tensor, x: torch.Tensor, steps: int) -> Any:
            return callback(step, clean[:, :, 1:], x[:, :, 1:], steps)

    samples = executor(
        _noise_in_front(noise, seed), _repeat_first(latent_image), sampler, sigmas, denoise_mask, visible, disable_pbar,
        seed, **kwargs,
    )  # fmt: skip
    return samples[:, :, 1:]


def front_noise(shape: tuple[int, ...], seed: int | None) -> torch.Tensor:
    """Noise of the extra frame, [B, C, 1, H, W] for a shape [B, C, T, H, W]; not the noise that `seed` makes."""
    generator = torch.Generator().manual_seed((seed or 0) + 1)
    return torch.randn((*shape[:2], 1, *shape[3:]), generator=generator)


def _noise_in_front(noise: torch.Tensor, seed: int | None) -> torch.Tensor:
    # All-zero noise (DisableNoise) means the latent is noisy already; then the extra frame must get none either.
    front = front_noise(noise.shape, seed).to(noise) if noise.any() else torch.zeros_like(noise[:, :, :1])
    return torch.cat([front, noise], 2)


def _repeat_first(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([x[:, :, :1], x], 2)


def _unscaled_image(cond: dict[str, Any], scale: float) -> dict[str, Any]:
    """ComfyUI will multiply the image latent by the latent scale; the model needs it divided by that scale."""
    image = cond.get("concat_latent_image")
    return cond if image is None else {**cond, "concat_latent_image": image / scale**2}
