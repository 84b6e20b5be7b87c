"""`POST /psa/check`: what the page asks to show a node's mistakes before it runs, in the words of the node itself."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io


def refused(nodes: dict[str, type[io.ComfyNode]], request: Any) -> str | None:
    """The sentence for {"node": id, "inputs": {name: value, null where it comes over a link}}, or None."""
    if not isinstance(request, dict) or not isinstance(request.get("inputs"), dict):
        return None
    node = nodes.get(str(request.get("node")))
    answer = True if node is None else node.validate_inputs(**request["inputs"])
    return None if answer is True else str(answer)


def add_route(nodes: dict[str, type[io.ComfyNode]]) -> None:
    """Let the running server answer for `nodes`, by their id; nothing where there is none."""
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
        return web.json_response({"refused": refused(nodes, asked)})

    server.routes.post("/psa/check")(check)
