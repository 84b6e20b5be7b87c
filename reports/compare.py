"""Checks two IMAGE batches for the node PSA Compare, compares them and puts them side by side."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math

import torch

from ..choices.errors import InputError
from ..sampling.findings import ranges
from .draw_compare import compare, side_by_side

NODE = "PSA Compare"


def compare_images(
    images_a: torch.Tensor, images_b: torch.Tensor, name_a: str, name_b: str, difference_gain: float, lpips: bool
) -> tuple[torch.Tensor, float, float, str]:
    """Side by side [F, H+28, 3W, 3], PSNR, SSIM and all figures as JSON (infinite PSNR as null).

    Raises:
        InputError: the videos differ in shape, or LPIPS is not available.
    """
    for name, images in (("images_a", images_a), ("images_b", images_b)):
        if not hasattr(images, "shape"):
            raise InputError(name, images, "IMAGE", NODE, do=f"connect a video or pictures to {name}")
        if not torch.isfinite(images).all():
            frames = ranges([i for i, frame in enumerate(images) if not torch.isfinite(frame).all()])
            do = "sample the video again, in bf16 where it was fp16"
            raise InputError(name, f"NaN or infinite numbers in frames {frames}", "finite pictures", NODE, do=do)
    if not math.isfinite(difference_gain):
        raise InputError("difference_gain", difference_gain, "1 to 32", NODE, do="set difference_gain to 4")
    given, allowed = tuple(images_b.shape[:3]), tuple(images_a.shape[:3])
    if given != allowed:
        do = "give both videos the same size and number of frames"
        raise InputError("images_b", _shape(given), f"{_shape(allowed)}, the shape of images_a", NODE, do=do)
    check_lpips(lpips)
    found = compare(images_a, images_b, lpips)
    picture = side_by_side(images_a, images_b, (name_a, name_b), difference_gain, found)
    figures = dataclasses.asdict(found) | {
        "psnr": _finite(found.psnr),
        "frames": [{"psnr": _finite(psnr), "ssim": ssim} for psnr, ssim in found.frames],
    }
    return picture, found.psnr, found.ssim, json.dumps(figures)


def check_lpips(lpips: bool) -> None:
    """Raise InputError if LPIPS is asked for and its package is missing."""
    if lpips and importlib.util.find_spec("lpips") is None:
        do = "turn lpips off, or install its package: pip install lpips"
        raise InputError("lpips", True, "off, or on where its package is installed", NODE, do=do)


def _shape(shape: tuple[int, ...]) -> str:
    return f"{shape[0]} frames of {shape[2]}x{shape[1]}"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
