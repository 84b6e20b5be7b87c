"""Two videos compared: PSNR, SSIM, LPIPS where its package is installed, and both side by side with their difference.

Frames are float [F, H, W, 3], 0..1. Everything goes frame by frame, so that a long video needs little memory.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

from .paint import INK, PAPER, font

SSIM_WINDOW = 7


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Figures of two videos. `psnr` in dB over all pixels of all frames, infinite where they are equal; `ssim` the mean
    over the frames; `lpips` the same, None where it was not asked for; `frames` (psnr, ssim) of every frame."""

    psnr: float
    ssim: float
    lpips: float | None
    frames: list[tuple[float, float]]


def compare(a: torch.Tensor, b: torch.Tensor, lpips: bool = False) -> Comparison:
    """Compare two videos of one shape [F, H, W, 3].

    Raises:
        ImportError: LPIPS is asked for and its package is missing.
    """
    distance = _lpips_model() if lpips else None
    errors, rows, perceived = [], [], []
    for x, y in zip(a, b, strict=True):
        x, y = x[..., :3].float().cpu(), y[..., :3].float().cpu()
        error = float(((x - y) ** 2).double().mean())
        errors.append(error)
        rows.append((psnr(error), ssim(x, y)))
        if distance is not None:
            first, second = (frame.permute(2, 0, 1)[None] * 2 - 1 for frame in (x, y))
            with torch.no_grad():
                perceived.append(float(distance(first, second)))
    mean_ssim = sum(value for _, value in rows) / len(rows)
    mean_lpips = sum(perceived) / len(perceived) if perceived else None
    return Comparison(psnr(sum(errors) / len(errors)), mean_ssim, mean_lpips, rows)


def psnr(error: float) -> float:
    """Peak signal to noise ratio in dB of a mean squared error on the scale 0..1."""
    return math.inf if error == 0 else -10 * math.log10(error)


def ssim(x: torch.Tensor, y: torch.Tensor) -> float:
    """Structural similarity of two frames [H, W, 3], 0..1 (Wang et al. 2004): windows of 7x7, mean over the channels.

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


def side_by_side(
    a: torch.Tensor, b: torch.Tensor, names: tuple[str, str], gain: float, found: Comparison
) -> torch.Tensor:
    """The videos and their absolute difference times `gain`, side by side under their names: [F, H+28, 3W, 3]."""
    height, width = a.shape[1:3]
    figures = f"PSNR {found.psnr:.2f} dB, SSIM {found.ssim:.4f}"
    if found.lpips is not None:
        figures += f", LPIPS {found.lpips:.4f}"
    titles = (*names, f"difference x{gain:g}: {figures}")
    band = torch.cat([_title(title, width) for title in titles], 1)
    result = a.new_empty((len(a), height + band.shape[0], 3 * width, 3), dtype=torch.float32, device="cpu")
    result[:, : band.shape[0]] = band
    for i, (x, y) in enumerate(zip(a, b, strict=True)):
        x, y = x[..., :3].float().cpu(), y[..., :3].float().cpu()
        result[i, band.shape[0] :] = torch.cat([x, y, ((x - y).abs() * gain).clamp(0, 1)], 1)
    return result


def _title(text: str, width: int, height: int = 28) -> torch.Tensor:
    """A band with words [height, width, 3], in smaller letters where they would not fit."""
    band = Image.new("RGB", (width, height), PAPER)
    size = 16
    while size > 8 and font(size).getlength(text) > width - 12:
        size -= 1
    ImageDraw.Draw(band).text((6, height // 2), text, INK, font(size), anchor="lm")
    return torch.from_numpy(np.asarray(band).astype(np.float32) / 255)


def _lpips_model() -> torch.nn.Module:
    try:
        import lpips
    except ImportError as error:
        raise ImportError("the package lpips is not installed; `pip install lpips` brings it") from error
    return lpips.LPIPS(net="alex", verbose=False).eval()
