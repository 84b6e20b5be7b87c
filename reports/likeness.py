"""How alike two pictures are: PSNR, SSIM and LPIPS, defined here and nowhere else.

SSIM is that of Z. Wang et al. (2004), LPIPS that of R. Zhang et al. (2018), from its own package.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

SSIM_WINDOW = 7


def psnr(error: float) -> float:
    """Peak signal-to-noise ratio in dB for a mean squared error on the scale 0..1; infinite where there is no error."""
    return math.inf if error == 0 else -10 * math.log10(error)


def ssim(x: torch.Tensor, y: torch.Tensor) -> float:
    """Structural similarity of two frames [H, W, C], 0..1: windows of 7x7, mean over the channels, on their device.

    Sample covariance and no padding, as scikit-image computes it. Frames smaller than a window are one window.
    """
    window = (min(SSIM_WINDOW, x.shape[0]), min(SSIM_WINDOW, x.shape[1]))
    x, y = (frame.double().permute(2, 0, 1)[None] for frame in (x, y))
    count = window[0] * window[1]
    sample = count / max(1, count - 1)

    def mean(values: torch.Tensor) -> torch.Tensor:
        return F.avg_pool2d(values, window, stride=1)

    mean_x, mean_y = mean(x), mean(y)
    var_x, var_y = sample * (mean(x * x) - mean_x**2), sample * (mean(y * y) - mean_y**2)
    covariance = sample * (mean(x * y) - mean_x * mean_y)
    c1, c2 = 0.01**2, 0.03**2
    top = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    return float((top / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))).mean())


def load_lpips() -> torch.nn.Module:
    """The network: two batches of pictures [N, 3, H, W] in -1..1 -> their distances [N, 1, 1, 1].

    Raises:
        ImportError: its package is missing.
    """
    try:
        import lpips
    except ImportError as error:
        raise ImportError("the package lpips is not installed; `pip install lpips` brings it") from error
    return lpips.LPIPS(net="alex", verbose=False).eval()
