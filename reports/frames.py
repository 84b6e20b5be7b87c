"""Frames to draw on if there is no decoded video: the latent itself, in the colours of ComfyUI's previews."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


def as_rgb(images: torch.Tensor) -> torch.Tensor:
    """Pictures [..., 1, 3 or 4] as float [..., 3], 0..1: grey has three equal colours, what is transparent does not
    show, and no number is beyond black and white, as in a file."""
    colours = images[..., :3].float().clamp(0, 1)
    return colours.expand(*colours.shape[:-1], 3)


def video_frames(images: torch.Tensor | None, model: Any, samples: dict[str, Any]) -> np.ndarray | None:
    """Frames uint8 [F, H, W, 3]: `images` [F, H, W, C] 0..1 if given, else the latent; None if neither can be used."""
    if images is not None:
        return (as_rgb(images).nan_to_num(0) * 255).round().byte().cpu().numpy()
    latent = samples.get("samples")
    if not isinstance(latent, torch.Tensor) or latent.ndim != 5:
        return None
    latent = latent[0].detach().float().cpu()  # [C, T, H, W]
    factors = getattr(getattr(model.model, "latent_format", None), "latent_rgb_factors", None)
    if factors is not None and len(factors) == len(latent):
        picture = torch.einsum("cthw,cr->thwr", latent, torch.tensor(factors))
    else:
        picture = latent.mean(0)[..., None].expand(-1, -1, -1, 3)
    low, high = torch.quantile(picture.flatten()[:1_000_000], torch.tensor([0.01, 0.99]))
    return ((picture - low) / (high - low).clamp_min(1e-6) * 255).clamp(0, 255).byte().numpy()
