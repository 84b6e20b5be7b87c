"""`POST /psa/check`: the page asks, while a slider moves, what a node's inputs mean or why it would refuse them.

The node's own functions answer in their own words; the page computes nothing.
"""

from __future__ import annotations

import logging
from typing import Any

from comfy_api.latest import io

from ..choices.errors import InputError
from ..choices.picture import patch_figures, pyramid_figures, pyramid_of

log = logging.getLogger("ComfyUI-PSA")


def answer(nodes: dict[str, type[io.ComfyNode]], asked: Any) -> dict[str, Any]:
    """What a node would do: {"refused": a sentence or None, "figures": those of `choices/picture.py` or None}.

    Args:
        asked: {"node": its id, "inputs": {name: what its widget shows}, "linked": [inputs that come over a wire]}. Of
            PSA Patch also "pyramid", the same of a connected PSA Pyramid, and "auto", the preset that `auto` was; of
            PSA Pyramid also "sparsity", that of the PSA Patch that it feeds.
    """
    refused, figures = None, None
    try:
        inputs, pyramid = asked["inputs"], None
        wired = set(asked.get("linked", ()))
        if asked.get("pyramid") is not None:
            of_pyramid = answer(nodes, asked["pyramid"])
            if of_pyramid["figures"] is None:
                return of_pyramid
            pyramid = pyramid_of(asked["pyramid"]["inputs"])
            wired |= set(asked["pyramid"].get("linked", ()))
        known = inputs | dict.fromkeys(asked.get("linked", ())) | ({"psa_pyramid": pyramid} if pyramid else {})
        valid = nodes[asked["node"]].validate_inputs(**known)
        if valid is not True:
            refused = str(valid)
        elif asked["node"] == "PSAPyramid":
            figures = pyramid_figures(inputs, asked.get("sparsity"))
        elif pyramid is not None or "psa_pyramid" not in wired:
            figures = patch_figures(inputs, pyramid, asked.get("auto", ""))
    except InputError as error:
        # If a value comes over a link, the widget may show something other than what the node will get.
        refused = None if wired & inputs.keys() else str(error)
    except Exception:  # the request is not from a page of this version
        log.debug("PSA: the page asked what cannot be answered", exc_info=True)
    return {"refused": refused, "figures": figures}


def add_route(nodes: dict[str, type[io.ComfyNode]]) -> None:
    """Let the running server answer for `nodes`, by their id; does nothing if there is no server."""
    try:
        from aiohttp import web
        from server import PromptServer
    except ImportError:
        return
    server = getattr(PromptServer, "instance", None)
    if server is None:
        return

    async def check(request: Any) -> Any:
        try:
            asked = await request.json()
        except ValueError:
            asked = None
        return web.json_response(answer(nodes, asked))

    server.routes.post("/psa/check")(check)
