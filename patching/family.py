"""Which models PSA supports, and which preset `auto` takes for them. For any other model it gives a reason.

It only reads what ComfyUI worked out about the checkpoint; nothing is guessed from names. Every file in `families/` is
a family.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import pkgutil
from collections.abc import Callable, Mapping
from typing import Any

from ..choices.settings import AUTO_PRESETS
from .core import is_video, unet_config
from .layout import CallReader


@dataclasses.dataclass(frozen=True)
class Support:
    """How PSA supports a model.

    Attributes:
        name: for messages; blocks: its number of transformer blocks.
        read_call: where the tokens lie in a call of the model.
        preset: the one that `auto` takes.
        advice: one sentence that the user should know about this model, or None.
    """

    name: str
    blocks: int
    read_call: CallReader
    preset: str = AUTO_PRESETS[0]
    advice: str | None = None


@dataclasses.dataclass(frozen=True)
class Variant:
    """A row of the table of models in docs/compatibility.md, which `python dev.py docs` writes. Each has its test.

    Attributes:
        name: model and variant. heads: size of a head.
        before, grid, after: what is in the sequence: before the video, the video itself, after it.
        psa: sparse, or dense and why.
    """

    name: str
    before: str = "-"
    grid: str = "T x H x W"
    after: str = "-"
    heads: str = "128"
    psa: str = "sparse"


@dataclasses.dataclass(frozen=True)
class Family:
    """Models that share a network; `FAMILY` of a file in `families/`.

    Attributes:
        name: for messages.
        image_models: what ComfyUI calls its networks (`image_model`), by which it is recognised.
        support: support(model, config) of a ComfyUI MODEL and its config: how PSA supports it, or the reason why it
            does not, as a sentence.
        variants: for the manual, written as plain literals.
    """

    name: str
    image_models: tuple[str, ...]
    support: Callable[[Any, Mapping[str, Any]], Support | str]
    variants: tuple[Variant, ...]


@functools.cache
def families() -> tuple[Family, ...]:
    """All families, by the names of their files."""
    folder = importlib.import_module(".families", __package__)
    names = sorted(file.name for file in pkgutil.iter_modules(folder.__path__))
    return tuple(importlib.import_module(f".families.{name}", __package__).FAMILY for name in names)


def find_family(model: Any) -> Support | str:
    """How PSA supports a ComfyUI MODEL (ModelPatcher), or the reason why it does not, as a sentence."""
    if not is_video(model):
        return "this model makes images or sound, and PSA is for video; connect a video model to use PSA"
    config = unet_config(model)
    image_model = config.get("image_model")
    for family in families():
        if image_model in family.image_models:
            return family.support(model, config)
    given = image_model or type(model.model).__name__
    return f"PSA supports {', '.join(family.name for family in families())} so far; this model is {given}"
