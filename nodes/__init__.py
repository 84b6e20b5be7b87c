"""The nodes of the pack: schemas and one call downward each; no logic."""

from __future__ import annotations

import os

from comfy_api.latest import ComfyExtension, io

from ..loading.lora_folders import register_own_folder
from .calibrate import PSACalibrate
from .cogvideox import (
    PSACogVideoXFix,
    PSACogVideoXImageToVideo,
    PSACogVideoXLoader,
    PSACogVideoXSampler,
    PSACogVideoXSigmas,
)
from .compare import PSACompare
from .lora import PSALoraDownload, PSALoraLoader
from .patch import PSAPatch
from .pyramid import PSAPyramid
from .report import PSAReport


class PSAExtension(ComfyExtension):
    """What ComfyUI registers."""

    async def on_load(self) -> None:
        register_own_folder()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        nodes: list[type[io.ComfyNode]] = [
            PSAPatch,
            PSAPyramid,
            PSAReport,
            PSACompare,
            PSACalibrate,
            PSACogVideoXLoader,
            PSACogVideoXFix,
            PSACogVideoXSigmas,
            PSACogVideoXSampler,
            PSACogVideoXImageToVideo,
            PSALoraLoader,
            PSALoraDownload,
        ]
        # The demo's conditioning means nothing to any other model, so only the demo lists it.
        if os.environ.get("COMFYUI_PSA_DEMO") == "1":
            from .demo import PSADemoScene

            nodes.append(PSADemoScene)
        return nodes
