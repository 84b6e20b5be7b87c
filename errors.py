"""The error of a wrong node input, shared by everything that nodes call."""

from __future__ import annotations


class InputError(ValueError):
    """A wrong node input: names the node, the input, what was given and what is allowed."""

    def __init__(self, field: str, given: object, allowed: str, node: str = "PSA Patch") -> None:
        super().__init__(f"{node}, input {field}: {given!r} was given; allowed: {allowed}")
