"""The nodes of the pack: each a schema and one call down; no logic."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from ..loading.own_folders import register_own_folders
from .calibrate import PSACalibrate
from .check_route import add_route
from .cogvideox import (
    PSACogVideoXFix,
    PSACogVideoXImageToVideo,
    PSACogVideoXLoader,
    PSACogVideoXSampler,
    PSACogVideoXSigmas,
)
from .compare import PSACompare
from .demo import PSADemoScene
from .lora import PSALoraDownload, PSALoraLoader
from .patch import PSAPatch
from .pyramid import PSAPyramid
from .report import PSAReport


class PSAExtension(ComfyExtension):
    """What ComfyUI registers."""

    async def on_load(self) -> None:
        register_own_folders()
        add_route({"PSAPatch": PSAPatch, "PSAPyramid": PSAPyramid})

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [
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
            PSADemoScene,
        ]
