"""Metrics that compare a sparse video with a dense one.

Videos are uint8 [3, F, H, W] as decoded, before any video codec.
PSNR, SSIM and LPIPS are PSA Compare's (`reports/likeness.py`), computed on the videos' device: scikit-image would take
a second of CPU time for every clip of a GPU run. Tests check them against scikit-image.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch

from ...reports import likeness


def psnr(dense: torch.Tensor, sparse: torch.Tensor) -> float:
    """dB over all pixels of all frames; infinite if the videos are equal."""
    return likeness.psnr(float((dense.float() - sparse.float()).square().mean(dtype=torch.float64)) / 255**2)


def ssim(dense: torch.Tensor, sparse: torch.Tensor) -> float:
    """Mean over the frames."""
    pairs = zip(*(video.permute(1, 2, 3, 0).double() / 255 for video in (dense, sparse)), strict=True)
    values = [likeness.ssim(a, b) for a, b in pairs]
    return sum(values) / len(values)


def flicker(dense: torch.Tensor, sparse: torch.Tensor) -> float:
    """Mean absolute change of the error between frames, in 8-bit levels: movement that should not be there."""
    error = sparse.float() - dense.float()
    return float(error.diff(dim=1).abs().mean())


def latent_error(dense: torch.Tensor, sparse: torch.Tensor) -> torch.Tensor:
    """Relative L2 error of latents [B, C, T, H, W]: float32 [B]."""
    return (sparse - dense).flatten(1).norm(dim=1) / dense.flatten(1).norm(dim=1)


def load_lpips(device: torch.device) -> Callable[[torch.Tensor, torch.Tensor], float] | None:
    """LPIPS over every fourth frame, or None unless the package `lpips` and its weights are available."""
    if importlib.util.find_spec("lpips") is None:
        return None
    try:
        network = likeness.load_lpips().to(device)
    except Exception as error:
        print(f"LPIPS is not measured: {error}")
        return None

    @torch.inference_mode()
    def measure(dense: torch.Tensor, sparse: torch.Tensor) -> float:
        a, b = (video[:, ::4].transpose(0, 1).float() / 127.5 - 1 for video in (dense, sparse))
        return float(network(a, b).mean())

    return measure
