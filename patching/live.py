"""What the page hears of a patched model: a sentence when the node runs, and the figures of every step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .patch import KEY, PatchHandle, patch_model
from .run import log

EVENT = "psa.step"


def patch_for_node(model: Any, node_id: str | None, **inputs: Any) -> tuple[Any, list[str]]:
    """`patch_model` for the node with that id, and what its page is told: why the model stays dense ("" where it does
    not), and the preset that was taken, which `auto` leaves to the model ("" where none was)."""
    patched = patch_model(model, on_step=step_sender(node_id), **inputs)
    handle: PatchHandle = patched.get_attachment(KEY)
    return patched, [handle.note, ""] if handle.settings is None else ["", handle.settings.preset]


def step_sender(node_id: str | None) -> Callable[[dict[str, Any]], None] | None:
    """Sends figures to the page that queued the prompt; None for a node without an id."""
    if node_id is None:
        return None

    def send(figures: dict[str, Any]) -> None:
        try:
            from server import PromptServer

            server = PromptServer.instance
            if server.client_id is not None:
                server.send_sync(EVENT, {"node": node_id, **figures}, server.client_id)
        except Exception:  # a display must never end a run
            log.debug("PSA: the figures of a step did not reach the page", exc_info=True)

    return send
