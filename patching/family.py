"""Which models PSA supports, and which preset `auto` takes for them. For any other model it gives a reason.

It only reads what ComfyUI worked out about the checkpoint; nothing is guessed from names. Every file in `families/` is
a family.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from typing import Any

from ..choices.settings import AUTO
from .core import is_video, unet_config
from .generic import GENERIC, plain_grid
from .support import Family, Support


@functools.cache
def families() -> tuple[Family, ...]:
    """All families, by the names of their files."""
    folder = importlib.import_module(".families", __package__)
    names = sorted(file.name for file in pkgutil.iter_modules(folder.__path__))
    return tuple(importlib.import_module(f".families.{name}", __package__).FAMILY for name in names)


def find_family(model: Any, preset: str = AUTO) -> Support | str:
    """How PSA supports a ComfyUI MODEL (ModelPatcher), or the reason why it does not, as a sentence.

    Args:
        preset: `generic` takes any video model for a plain grid, if it is of no family.
    """
    if not is_video(model):
        return "this model makes images or sound, and PSA is for video; connect a video model to use PSA"
    config = unet_config(model)
    image_model = config.get("image_model")
    for family in families():
        if image_model in family.image_models:
            return family.support(model, config)
    given = image_model or type(model.model).__name__
    if preset == GENERIC:
        return plain_grid(model)
    return (
        f"PSA supports {', '.join(family.name for family in families())} so far; this model is {given}; "
        f"set preset to {GENERIC} to try it on a video model that nobody named"
    )
