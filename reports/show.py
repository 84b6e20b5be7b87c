"""The report of a run for the node PSA Report: JSON, and the picture for the chosen layer and head."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..choices.errors import InputError
from ..patching.handle import PatchHandle
from ..patching.patch import KEY
from ..sampling.findings import ranges
from ..sampling.maps import RunMaps
from .draw_report import draw_report
from .frames import video_frames

NODE = "PSA Report"
_LONGEST_NAME = 200
"""Longest file name in bytes: every file system allows 255, and a number and an extension are added."""


def show_report(
    model: Any, samples: dict[str, Any], layer: int, head: int, images: torch.Tensor | None
) -> tuple[str, torch.Tensor]:
    """JSON and picture (IMAGE [1, H, W, 3]) of the last run of a model from PSA Patch.

    Args:
        layer: index of a transformer block, -1 for the middle one; head: index of a head.

    Raises:
        InputError: there is no such layer or head.
    """
    # Without a handle, PSA Patch is bypassed or was never there. That must not stop a workflow.
    unpatched = "the model did not come from PSA Patch, or PSA Patch is bypassed: it is the stock one"
    handle: PatchHandle = model.get_attachment(KEY) or PatchHandle(unpatched)
    report = handle.report or {"note": handle.note if handle.settings is None else "the model has not sampled yet"}
    maps = {} if handle.maps is None else _maps(handle.maps, layer, head)
    on_frames = handle.maps is not None and handle.maps.whole
    picture = draw_report(report, frames=video_frames(images, model, samples) if on_frames else None, **maps)
    return json.dumps(report), to_image(picture)


def check_prefix(filename_prefix: str = "", node: str = NODE) -> None:
    """Raise InputError if ComfyUI would refuse to save a picture under this name, which it only says after the run."""
    import folder_paths

    output, prefix = Path(os.path.normpath(folder_paths.get_output_directory())), filename_prefix.strip()
    folder = Path(os.path.normpath(output / Path(os.path.normpath(prefix)).parent))
    parts = re.split(r"[\\/]", prefix)
    strange = any(len(part.encode()) > _LONGEST_NAME or any(ord(letter) < 32 for letter in part) for part in parts)
    if prefix and (strange or not folder.is_relative_to(output)):
        raise wrong_prefix(filename_prefix, node)


def wrong_prefix(filename_prefix: str, node: str) -> InputError:
    """The error for a name under which no picture can be saved."""
    allowed = "a name that can be saved in ComfyUI's output folder"
    do = "take a name such as psa/report, or leave it empty"
    return InputError("filename_prefix", filename_prefix, allowed, node, do=do)


def to_image(picture: Any) -> torch.Tensor:
    """A Pillow picture as ComfyUI's IMAGE [1, H, W, 3]."""
    return torch.from_numpy(np.asarray(picture.convert("RGB")).astype(np.float32) / 255)[None]


def _maps(maps: RunMaps, layer: int, head: int) -> dict[str, Any]:
    """The maps that `draw_report` draws over the video."""
    recorded = sorted(maps.blocks)
    if layer == -1:
        layer = recorded[len(recorded) // 2]
    if layer not in maps.blocks:
        raise InputError("layer", layer, f"-1 or a sparse layer: {ranges(recorded)}", NODE, do="set layer to -1")
    found = maps.blocks[layer]
    if head >= len(found.seen):
        raise InputError("head", head, f"0 to {len(found.seen) - 1}", NODE, do="set head to 0")
    seen, spot = maps.head(layer, head)
    part = "" if maps.whole else f", a part of the video of {'x'.join(map(str, maps.grid))} tokens"
    return {
        "seen": seen.numpy(),
        "spot": spot.numpy(),
        "spot_at": maps.spot,
        "where": f"layer {layer}, head {head}, step {maps.step + 1}{part}",
    }
