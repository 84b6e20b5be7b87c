"""Compares two videos: PSNR, SSIM, LPIPS if its package is installed, and both side by side with their difference.

Frames are [F, H, W, C], see `frames.as_rgb`. Everything is done frame by frame, so a long video needs little memory.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from PIL import Image, ImageDraw

from .frames import as_rgb
from .likeness import load_lpips, psnr, ssim
from .paint import INK, PAPER, font


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Figures for two videos. `psnr`: in dB over all pixels of all frames, infinite if they are equal; `ssim`: the mean
    over the frames; `lpips`: likewise, None if it was not asked for; `frames`: (psnr, ssim) of every frame."""

    psnr: float
    ssim: float
    lpips: float | None
    frames: list[tuple[float, float]]


def compare(a: torch.Tensor, b: torch.Tensor, lpips: bool = False) -> Comparison:
    """Compare two videos of one size [F, H, W, C].

    Raises:
        ImportError: LPIPS was asked for and its package is missing.
    """
    distance = load_lpips() if lpips else None
    errors, rows, perceived = [], [], []
    for x, y in zip(a, b, strict=True):
        x, y = as_rgb(x).cpu(), as_rgb(y).cpu()
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
        x, y = as_rgb(x).cpu(), as_rgb(y).cpu()
        result[i, band.shape[0] :] = torch.cat([x, y, ((x - y).abs() * gain).clamp(0, 1)], 1)
    return result


def _title(text: str, width: int, height: int = 28) -> torch.Tensor:
    """A band with text [height, width, 3], in smaller letters if it would not fit."""
    band = Image.new("RGB", (width, height), PAPER)
    size = 16
    while size > 8 and font(size).getlength(text) > width - 12:
        size -= 1
    ImageDraw.Draw(band).text((6, height // 2), text, INK, font(size), anchor="lm")
    return torch.from_numpy(np.asarray(band).astype(np.float32) / 255)
