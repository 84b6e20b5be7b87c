"""What the page is told about a patched model: a sentence when the node runs, the figures of every step and run, and
when another PSA Patch replaces a node's patch."""

from __future__ import annotations

import dataclasses
from typing import Any

from ..sampling.run import log
from .handle import PatchHandle
from .patch import KEY, STOCK

STEP_EVENT = "psa.step"
RUN_EVENT = "psa.run"
REPLACED_EVENT = "psa.replaced"


@dataclasses.dataclass(frozen=True)
class Sender:
    """Sends figures of a node to the page that queued the prompt, as one event. Can be sent to another process.

    Attributes:
        always: sent with the figures every time.
    """

    event: str
    node_id: str
    always: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __call__(self, figures: dict[str, Any]) -> None:
        """Send {"node": id, **always, **figures}."""
        try:
            from server import PromptServer

            server = PromptServer.instance
            if server.client_id is not None:
                server.send_sync(self.event, {"node": self.node_id, **self.always, **figures}, server.client_id)
        except Exception:  # a display must never end a run
            log.debug("PSA: figures did not reach the page", exc_info=True)


def asked_of(prompt: dict[str, Any] | None, node_id: str | None) -> dict[str, Any]:
    """The inputs of a node as the page queued them, by name. A wired input is None, except that a PSA Pyramid is given
    as its own inputs. This lets the page tell whether the figures of a run belong to the inputs that it shows."""
    nodes: dict[Any, Any] = prompt or {}
    inputs = nodes.get(node_id, {}).get("inputs", {})
    asked: dict[str, Any] = {}
    for name, value in inputs.items():
        wired = isinstance(value, list)
        source = nodes.get(str(value[0]), {}) if wired and value else {}
        pyramid = source.get("class_type") == "PSAPyramid" and name == "psa_pyramid"
        asked[name] = asked_of(prompt, str(value[0])) if pyramid else None if wired else value
    return asked


def listeners(node_id: str | None, asked: dict[str, Any] | None = None) -> dict[str, Any]:
    """The arguments for `patch_model` that send the figures of every step and run to the page of a node.

    `asked`, see `asked_of`, is sent with them: a page that was loaded later, or whose prompt ComfyUI had cached, hears
    nothing from the node itself.
    """
    if node_id is None:
        return {}
    always = {"asked": asked}
    return {"on_step": Sender(STEP_EVENT, node_id, always), "on_end": Sender(RUN_EVENT, node_id, always)}


def told(model: Any, patched: Any, node_id: str | None) -> list[str]:
    """What the page of a node is told once `model` has been `patched`: why the model stays dense ("" if it does not),
    and the preset that is used, since `auto` leaves that to the model ("" if there is none). If a sparsity of 0 is the
    reason, it is not told: the page knows, and the model is not at fault.

    If the model comes from another PSA Patch, the page is also told which node replaces that one on this branch.
    """
    earlier: PatchHandle | None = model.get_attachment(KEY)
    handle: PatchHandle = patched.get_attachment(KEY)
    handle.node = node_id
    before = None if earlier is None else earlier.node
    if before is not None and node_id is not None and before != node_id:
        log.info("PSA: PSA Patch #%s is replaced by PSA Patch #%s, which follows it", before, node_id)
        Sender(REPLACED_EVENT, before)({"by": node_id})
    if handle.settings is None:
        return ["" if handle.note == STOCK else handle.note, ""]
    return ["", handle.settings.preset]
