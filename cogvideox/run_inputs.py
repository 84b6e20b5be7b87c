"""Checks what a sampling run of CogVideoX gets before the model is loaded: sizes, prompt, start image.

What cannot work raises an error that says what does. What ComfyUI replaces or drops on its own is logged.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import torch

from ..choices.errors import InputError
from .variant import Variant

LATENT_CHANNELS = 16
_NODE = "PSA CogVideoX"
_IMAGE_NODE = "PSA CogVideoX Image To Video"

log = logging.getLogger("ComfyUI-PSA")


def check_run(variant: Variant, config: dict[str, Any], noise: torch.Tensor, conds: dict[str, list[dict]]) -> None:
    """Check the inputs of a run.

    Args:
        config: what ComfyUI worked out from the weights. noise: [B, 16, T, H, W] in latent rows and columns.
        conds: ComfyUI's conditionings by name, positive and negative.

    Raises:
        InputError: the latent or a prompt cannot be CogVideoX's, or the model cannot make this size.
    """
    if noise.ndim != 5 or noise.shape[1] != LATENT_CHANNELS:
        allowed = f"a latent with {LATENT_CHANNELS} channels and frames, rows, columns"
        raise InputError(
            "latent_image", noise, allowed, _NODE, do="connect Empty HunyuanVideo 1.0 Latent or your I2V node"
        )
    _check_size(variant, *noise.shape[3:])
    every = [cond for kind in conds.values() for cond in kind]
    _check_prompts(config.get("text_embed_dim"), every)
    _note_images(variant, noise, every)


def _check_size(variant: Variant, rows: int, columns: int) -> None:
    if not variant.learned_positions:
        return
    # ComfyUI pads an odd number of rows or columns by one.
    if (rows + rows % 2, columns + columns % 2) != (variant.sample_height, variant.sample_width):
        width, height = variant.sample_width * 8, variant.sample_height * 8
        allowed = f"{width}x{height} pixels, the only size that this model holds trained positions for"
        do = f"set width {width} and height {height} in {_IMAGE_NODE}"
        raise InputError("latent_image", f"{columns * 8}x{rows * 8} pixels", allowed, _NODE, do=do)


def _check_prompts(width: int | None, conds: Iterable[dict]) -> None:
    for cond in conds:
        text = cond.get("cross_attn")
        if width and isinstance(text, torch.Tensor) and text.shape[-1] != width:
            do = "encode it with the model's own text encoder: Load CLIP with t5xxl and type cogvideox"
            given = f"a prompt of width {text.shape[-1]}"
            raise InputError("positive or negative", given, f"width {width}", _NODE, do=do)


def _note_images(variant: Variant, noise: torch.Tensor, conds: list[dict]) -> None:
    images = [cond["concat_latent_image"] for cond in conds if cond.get("concat_latent_image") is not None]
    if images and not variant.from_image:
        log.warning("PSA: the start image is not used: %s makes videos from text; load an I2V model", variant.name)
    if not images and variant.from_image:
        log.warning("PSA: %s starts from an image and got none; add %s", variant.name, _IMAGE_NODE)
    for image in images if variant.from_image else ():
        if image.shape[-2:] != noise.shape[-2:]:
            given, wanted = (f"{size[-1] * 8}x{size[-2] * 8}" for size in (image.shape, noise.shape))
            log.warning(
                "PSA: the start image is %s and the video %s; ComfyUI stretches it, and it blurs. Set width and height "
                "of %s to the video's, or sample its own latent", given, wanted, _IMAGE_NODE,
            )  # fmt: skip
            break
