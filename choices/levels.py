"""The inputs of the node PSA Pyramid as a preset: the value of the type PSA_PYRAMID.

Impossible combinations raise an error that names the node, the input, what was given and what is allowed; nothing is
clamped.
"""

from __future__ import annotations

import logging
from typing import Any

from ..kernels.config import ConfigError
from .errors import InputError
from .presets import OWN_SHAPE, Preset
from .user_presets import write_preset

log = logging.getLogger("ComfyUI-PSA")

NODE = "PSA Pyramid"
LEVELS = {"full": 1, "half": 2, "quarter": 4, "eighth": 8}
"""Slider -> pooling factor."""
_SLIDERS = ", ".join(LEVELS)
CAPS = {"similarity_half": 2, "similarity_quarter": 4, "similarity_eighth": 8}


def make_pyramid(*, save_as: str = "", **inputs: Any) -> Preset:
    """The levels from the inputs of the node, the same as for `check_pyramid`; saved as `save_as` if given.

    Raises:
        InputError: an input is wrong or the combination is impossible.
    """
    pyramid = check_pyramid(**inputs)
    if save_as.strip():
        path = write_preset(save_as, pyramid, about="A pyramid of the user's", made=f"saved by {NODE}", node=NODE)
        log.info("PSA: the pyramid is saved as %s", path)
    return pyramid


def check_pyramid(
    full: float,
    half: float,
    quarter: float,
    eighth: float,
    similarity_half: float,
    similarity_quarter: float,
    similarity_eighth: float,
    mode: str,
    as_written: bool,
    tail: bool,
    order: str,
    importance: str,
    block_q: int | str,
    block_kv: int | str,
    precision: str,
) -> Preset:
    """The levels that the inputs of the node describe; raises InputError if they are impossible."""
    levels = dict(zip(LEVELS, (full, half, quarter, eighth), strict=True))
    shares = {factor: levels[name] for name, factor in LEVELS.items() if levels[name] > 0}
    if not shares:
        raise _error(_SLIDERS, 0, "at least one level above 0: the video must be seen somehow", "raise a level")
    total = sum(shares.values())
    if total > 1 + 1e-6:
        raise _error(_SLIDERS, f"{total:.2f} in sum", "levels that add up to at most 1", "lower a level")
    similarities = dict(zip(CAPS, (similarity_half, similarity_quarter, similarity_eighth), strict=True))
    settings = {
        "mode": mode,
        "shares": shares,
        "tail": tail,
        "order": order,
        "importance": importance,
        "reduction": OWN_SHAPE["reduction"],
        "block_q": int(block_q),
        "block_kv": int(block_kv),
        "similarity_cap": _caps(shares, similarities),
        "precision": precision,
    }
    pyramid = Preset(NODE, "from the node PSA Pyramid", settings, as_written=as_written)
    try:
        pyramid.unscaled()  # only the levels; PSA Patch checks whether they can meet the slider
    except ConfigError as error:
        raise _error(error.field, error.given, error.allowed, error.do) from error
    return pyramid


def _caps(shares: dict[int, float], sliders: dict[str, float]) -> dict[int, float]:
    """Similarity caps by pooling factor; empty if there are none. A slider at 0 sets no limit for its level."""
    given = {factor: sliders[name] for name, factor in CAPS.items()}
    if not any(given.values()):
        return {}
    for name, factor in CAPS.items():
        if given[factor] and factor > max(shares):
            level = next(level for level, pooled in LEVELS.items() if pooled == factor)
            allowed = f"0 while no level is pooled that far ({level} and coarser are 0)"
            raise _error(name, given[factor], allowed, f"set {name} to 0 or raise {level}")
    # Every block passes -1; a level that is left out would be closed to all blocks.
    return {factor: cap or -1.0 for factor, cap in given.items() if factor <= max(shares)}


def _error(field: str, given: object, allowed: str, do: str) -> InputError:
    return InputError(field, given, allowed, NODE, do=do)
