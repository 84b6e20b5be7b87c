"""The error of a wrong node input, shared by everything that nodes call."""

from __future__ import annotations


class InputError(ValueError):
    """A wrong node input: names the node, the input, what was given and what is allowed."""

    def __init__(self, field: str, given: object, allowed: str, node: str = "PSA Patch") -> None:
        super().__init__(f"{node}, input {field}: {given!r} was given; allowed: {allowed}")


def require_model(model: object, node: str = "PSA Patch") -> None:
    """Raise InputError where a node was given something else than a MODEL, which ComfyUI's API lets through."""
    if not all(hasattr(model, name) for name in ("model", "model_options", "clone", "get_model_object")):
        raise InputError("model", model, "the MODEL output of a loader", node)
