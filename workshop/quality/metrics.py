"""What is measured between a sparse and a dense video; every figure is defined here and nowhere else.

Videos are uint8 [3, F, H, W] as decoded, before any video codec.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

SSIM_WINDOW = 7
_SSIM_C1, _SSIM_C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2


def psnr(dense: torch.Tensor, sparse: torch.Tensor) -> float:
    """dB over all pixels of all frames; infinite when equal."""
    error = float((dense.float() - sparse.float()).square().mean())
    return 10 * math.log10(255**2 / error) if error else math.inf


def ssim(dense: torch.Tensor, sparse: torch.Tensor) -> float:
    """Mean structural similarity of the frames, per colour channel, over windows of 7x7 (Z. Wang et al., 2004).

    The figure of scikit-image's `structural_similarity`, here on the device of the videos.
    """
    values = [
        _ssim(a[:, None].double(), b[:, None].double()) for a, b in zip(_frames(dense), _frames(sparse), strict=True)
    ]
    return sum(values) / len(values)


def flicker(dense: torch.Tensor, sparse: torch.Tensor) -> float:
    """Mean absolute change of the error from frame to frame, in 8-bit levels: what moves that should not."""
    error = sparse.float() - dense.float()
    return float(error.diff(dim=1).abs().mean())


def latent_error(dense: torch.Tensor, sparse: torch.Tensor) -> torch.Tensor:
    """Relative L2 error of latents [B, C, T, H, W]: float32 [B]."""
    return (sparse - dense).flatten(1).norm(dim=1) / dense.flatten(1).norm(dim=1)


def load_lpips(device: torch.device) -> Callable[[torch.Tensor, torch.Tensor], float] | None:
    """LPIPS (R. Zhang et al., 2018) over every fourth frame, where the package `lpips` and its weights are there."""
    if importlib.util.find_spec("lpips") is None:
        return None
    import lpips

    try:
        network = lpips.LPIPS(net="alex", verbose=False).to(device).eval()
    except Exception as error:
        print(f"LPIPS is left out: {error}")
        return None

    @torch.inference_mode()
    def measure(dense: torch.Tensor, sparse: torch.Tensor) -> float:
        a, b = (video[:, ::4].transpose(0, 1).float() / 127.5 - 1 for video in (dense, sparse))
        return float(network(a, b).mean())

    return measure


def _frames(video: torch.Tensor) -> torch.Tensor:
    return video.transpose(0, 1)


def _ssim(a: torch.Tensor, b: torch.Tensor) -> float:
    """Of one frame, [3, 1, H, W]; windows inside the frame only."""

    def mean(x: torch.Tensor) -> torch.Tensor:
        return F.avg_pool2d(x, SSIM_WINDOW, stride=1)

    unbiased = SSIM_WINDOW**2 / (SSIM_WINDOW**2 - 1)
    mean_a, mean_b = mean(a), mean(b)
    variance_a, variance_b = unbiased * (mean(a * a) - mean_a**2), unbiased * (mean(b * b) - mean_b**2)
    covariance = unbiased * (mean(a * b) - mean_a * mean_b)
    likeness = (2 * mean_a * mean_b + _SSIM_C1) * (2 * covariance + _SSIM_C2)
    likeness /= (mean_a**2 + mean_b**2 + _SSIM_C1) * (variance_a + variance_b + _SSIM_C2)
    return float(likeness.mean())
