"""An attention call written down in what a compiled graph can hold: tensors, numbers and words.

Tensors and numbers may change from run to run without a new graph. Words may not: they say what the model's code says,
such as `skip_reshape=True`, and which function computes the attention.
"""

from __future__ import annotations

import inspect
import itertools
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

_VARIABLE = {"tensor": torch.Tensor, "int": int, "float": float}
"""Kinds of arguments that may change without a new graph."""
_FIXED = {"None": None, "True": True, "False": False} | {
    str(value): value for value in vars(torch).values() if isinstance(value, torch.dtype)
}
"""All other arguments that can be written down, by their words."""

Written = tuple[list[torch.Tensor], list[int], list[float], str]
"""Tensors, integers and floats in order, and the words: "int,mask=tensor,skip_reshape=True"."""


def write(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Written | None:
    """The arguments of a call, or None if they cannot be written down. A compiler traces this."""
    values = [*args, *kwargs.values()]
    words = [_word(value) for value in values]
    if None in words:
        return None
    tensors, integers, floats = (
        [value for value, word in zip(values, words, strict=True) if word == wanted] for wanted in _VARIABLE
    )
    names = [""] * len(args) + [f"{name}=" for name in kwargs]
    return tensors, integers, floats, ",".join([f"{name}{word}" for name, word in zip(names, words, strict=True)])


def read(
    tensors: Sequence[torch.Tensor], integers: Sequence[int], floats: Sequence[float], words: str
) -> tuple[list[Any], dict[str, Any]]:
    """The arguments that `write` wrote: by position, and by name."""
    variable = {kind: iter(values) for kind, values in zip(_VARIABLE, (tensors, integers, floats), strict=True)}
    args, kwargs = [], {}
    for part in words.split(",") if words else ():
        name, _, word = part.rpartition("=")
        value = next(variable[word]) if word in variable else _FIXED[word]
        if name:
            kwargs[name] = value
        else:
            args.append(value)
    return args, kwargs


def _word(value: Any) -> str | None:
    if value is None or isinstance(value, bool | torch.dtype):
        return str(value)
    return next((kind for kind, one in _VARIABLE.items() if isinstance(value, one)), None)


def may_have_a_place(function: Any) -> bool:
    """Whether it is a function outside of all others, so that it may have a place. A compiler traces this; it fails to
    hand other functions to `place_of`."""
    return isinstance(function, types.FunctionType) and not function.__code__.co_flags & inspect.CO_NESTED


def place_of(function: types.FunctionType) -> str:
    """Where a function is found, as in pickle: module, name, and how many decorators are around it there; "" if it is
    not there."""
    for depth, found in enumerate(_found(function.__module__, function.__qualname__)):
        if found is function:
            return f"{function.__module__}:{function.__qualname__}:{depth}"
    return ""


def at(place: str) -> Callable[..., torch.Tensor]:
    """The function at a place."""
    module, name, depth = place.split(":")
    return next(itertools.islice(_found(module, name), int(depth), None))


def _found(module: str, name: str) -> Iterator[Any]:
    """What a module has under a name, then what that wraps, and so on."""
    found = sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    while found is not None:
        yield found
        found = getattr(found, "__wrapped__", None)
