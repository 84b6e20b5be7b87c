"""The nodes of the pack: schemas and one call downward each; no logic."""

from __future__ import annotations

import os

from comfy_api.latest import ComfyExtension, io

from .patch import PSAPatch
from .report import PSAReport


class PSAExtension(ComfyExtension):
    """What ComfyUI registers."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        nodes: list[type[io.ComfyNode]] = [PSAPatch, PSAReport]
        # The demo's conditioning means nothing to any other model, so only the demo lists it.
        if os.environ.get("COMFYUI_PSA_DEMO") == "1":
            from .demo import PSADemoScene

            nodes.append(PSADemoScene)
        return nodes
