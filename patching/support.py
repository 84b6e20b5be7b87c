"""What a file in `families/` is made of: how PSA supports a model, a family of models, and its rows in the manual."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from ..choices.settings import AUTO_PRESETS
from ..sampling.run import log
from .layout import UNREADABLE, CallReader, ModelCall


@dataclasses.dataclass(frozen=True)
class Support:
    """How PSA supports a model.

    Attributes:
        name: for messages; blocks: its number of transformer blocks.
        read_call: where the tokens lie in a call of the model.
        preset: the one that `auto` takes.
        advice: one sentence that the user should know about this model, or None.
        assumed: whether nobody has checked on this model that its calls are as `read_call` says.
    """

    name: str
    blocks: int
    read_call: CallReader
    preset: str = AUTO_PRESETS[0]
    advice: str | None = None
    assumed: bool = False

    def read(self, network: Any, x: Any, context: Any, conds: Mapping[str, Any]) -> ModelCall | str:
        """`read_call`, whatever the inputs are: other nodes and newer cores may change any of them, and must not end a
        run."""
        try:
            return self.read_call(network, x, context, conds)
        except Exception:
            log.debug("PSA: why the inputs cannot be read", exc_info=True)
            return UNREADABLE


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
