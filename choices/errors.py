"""The sentences for wrong inputs, shared by all code that nodes call."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from ..kernels.refusal import refusal, sentence

_MOST_CHOICES = 24


class NodeError(ValueError):
    """An error that ends a node: `told`, which starts with the node's name, and a sentence that says what to do, which
    must not be missing."""

    # ComfyUI shows a class as its module and name, and the module begins with the folder of the user's pack.
    __module__ = "builtins"
    __qualname__ = "Node stopped"

    def __init__(self, told: str, *, do: str) -> None:
        super().__init__(f"{told.rstrip('. ')}. {sentence(do)}")


class InputError(NodeError):
    """A wrong node input: node, input, what was given, what is allowed, and what to do.

    Attributes:
        field: the input, or several with commas between them.
    """

    __module__ = "builtins"
    __qualname__ = "Wrong input"

    def __init__(self, field: str, given: object, allowed: str, node: str = "PSA Patch", *, do: str) -> None:
        self.field = field
        super().__init__(f"{node}, input {refusal(field, given, allowed)}", do=do)

    @classmethod
    def of_choice(cls, field: str, given: object, choices: Iterable[object], node: str = "PSA Patch") -> InputError:
        """The error for a value that is not among the choices; for a long list it names the most similar ones."""
        names = [str(choice) for choice in choices]
        if not names:
            return cls(field, given, "an entry of its menu, which is empty", node, do="Press R to read the menu again")
        allowed, do = ", ".join(names), f"Set {field} to one of them"
        if len(names) > _MOST_CHOICES:
            near = difflib.get_close_matches(str(given)[:80], names, n=5, cutoff=0.3) or names[:5]
            allowed = f"{', '.join(near)}, and {len(names) - len(near)} more of its menu"
            do = f"Choose {field} from the menu"
        return cls(field, given, allowed, node, do=do)


def is_model(value: object) -> bool:
    """Whether a value is a MODEL of ComfyUI."""
    return all(hasattr(value, name) for name in ("model", "model_options", "clone", "get_model_object"))


def require_model(model: object, node: str = "PSA Patch") -> None:
    """Raise InputError if a node was given something other than a MODEL, which ComfyUI's API lets through."""
    if not is_model(model):
        raise InputError("model", model, "the MODEL output of a loader", node, do="connect a model loader to model")
