"""Whether a value is possible for an input, according to the node's own schema: numbers in their range, choices in
their menu, and for a link the kind of its value. ComfyUI checks less: it lets NaN pass in every range, and does not
check values from links at all.
"""

from __future__ import annotations

import difflib
import math
import numbers
from collections.abc import Callable, Container, Iterable
from typing import Any

import numpy as np
from comfy_api.latest import io

from ..choices.errors import InputError, is_model
from ..choices.presets import Preset
from ..kernels.refusal import shown

LINK = object()
"""Stands for the value of an input that comes over a link and is not known before the run."""


def _holds_numbers(value: object) -> bool:
    return all(getattr(value, "shape", (0,)))


def _is_conditioning(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(entry, list | tuple) and len(entry) == 2 for entry in value)


def _is_image(value: object) -> bool:
    *_, channels = shape = tuple(getattr(value, "shape", ())) or (0,)
    is_float = getattr(getattr(value, "dtype", None), "is_floating_point", False)
    return len(shape) == 4 and _holds_numbers(value) and channels in (1, 3, 4) and is_float


KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "MODEL": (is_model, "the MODEL output of a loader"),
    "CONDITIONING": (_is_conditioning, "the CONDITIONING of an encoded prompt"),
    "LATENT": (lambda value: isinstance(value, dict) and _holds_numbers(value.get("samples")), "a LATENT"),
    "IMAGE": (_is_image, "an IMAGE: pictures or frames as fractions from 0 to 1, with 1, 3 or 4 channels"),
    "VAE": (lambda value: hasattr(value, "encode") and not isinstance(value, str), "a VAE"),
    "PSA_PYRAMID": (lambda value: isinstance(value, Preset), "the output of PSA Pyramid"),
}
"""Type of a link -> whether a value is of that kind, and its name in a message."""


def check_values(node: str, specs: Iterable[io.Input], inputs: dict[str, Any], alone: Container[str] = ()) -> None:
    """Raise InputError for the first of `inputs` that its spec in the schema does not allow.

    Args:
        inputs: by name, without missing ones; `LINK` is not checked. alone: names of inputs whose ranges and menus a
            rule of the node checks, because it can say more.
    """
    for spec in specs:
        value = inputs.get(spec.id)
        if value is LINK or (value is None and (spec.optional or spec.id not in inputs)):
            continue
        kind = {io.Int.Input: int, io.Combo.Input: str}.get(type(spec))
        if spec.id in alone and type(value) is kind:
            continue
        if isinstance(spec, io.Int.Input | io.Float.Input):
            _check_number(node, spec, value)
        elif isinstance(spec, io.Combo.Input):
            _check_choice(node, spec, value)
        elif isinstance(spec, io.String.Input):
            _check_text(node, spec, value)
        elif isinstance(spec, io.Boolean.Input):
            if getattr(value, "shape", ()) or value not in (True, False):  # arrays are neither
                raise InputError(spec.id, value, "true or false", node, do=f"turn {spec.id} on or off")
        else:
            fits, allowed = KINDS.get(spec.get_io_type(), (lambda _: True, ""))
            if not fits(value):
                raise InputError(spec.id, value, allowed, node, do=f"connect {allowed.partition(':')[0]} to {spec.id}")


def as_plain(value: Any) -> Any:
    """A number or text in Python's own type, anything else as it is. Links bring numbers of other libraries, too, which
    look the same; what is made from them cannot be sent to the page as JSON, and ComfyUI ends with such a message."""
    if isinstance(value, np.generic):
        value = value.item()
    return float(value) if isinstance(value, numbers.Real) and not isinstance(value, int | float) else value


def name_unknown(node: str, given: Iterable[str], known: Iterable[str]) -> list[str]:
    """A sentence for every input in a prompt that the node does not have, for example after an update or a typo."""
    known = list(known)
    lines = []
    for name in given:
        if name in known:
            continue
        near = difflib.get_close_matches(name, known, n=1)
        do = f"rename it to {near[0]} if that is meant, or take it out" if near else "take it out"
        has = f"the node has {', '.join(known)}"
        lines.append(f"{node} has no input {shown(name)}, and its value is not used; {do}; {has}")
    return lines


def _check_number(node: str, spec: Any, value: Any) -> None:
    whole = isinstance(spec, io.Int.Input)
    least, most = (None if limit is None else _plain(limit) for limit in (spec.min, spec.max))
    # To Python True is a number, but to a library it is not a size or a count.
    fits = isinstance(value, numbers.Integral if whole else numbers.Real) and not isinstance(value, bool)
    if fits and math.isfinite(value):
        if (least is None or value >= least) and (most is None or value <= most):
            return
        best = least if least is not None and value < least else most
    else:
        best = _plain(spec.default)
    kind = "a whole number, " if whole and not fits else ""
    raise InputError(spec.id, value, f"{kind}{least} to {most}", node, do=f"set {spec.id} to {best}")


def _check_choice(node: str, spec: Any, value: object) -> None:
    # A prompt from Windows has another separator in the path of a file.
    if str(value).replace("\\", "/") not in {str(option).replace("\\", "/") for option in spec.options or ()}:
        raise InputError.of_choice(spec.id, value, spec.options or (), node)


def _check_text(node: str, spec: Any, value: object) -> None:
    try:
        if isinstance(value, str):
            value.encode()
            return
    except UnicodeEncodeError:
        pass
    raise InputError(spec.id, value, "text that can be written to a file", node, do=f"write {spec.id} again")


def _plain(number: float | int | None) -> float | int | None:
    return int(number) if isinstance(number, float) and number.is_integer() else number
