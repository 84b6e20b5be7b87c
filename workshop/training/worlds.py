"""What a model's clips show: the vocabulary, how clips are drawn and rendered, and the scenes used for evaluation.

`shapes` belongs to the demo model, `rich` to the large one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...demo.scene import ATTRIBUTES, Vocabulary, conditioning_from_indices, describe, random_indices
from . import clips, rich_clips
from .clips import Parameters
from .rich_scene import RICH_ATTRIBUTES, RICH_SHEET, describe_rich
from .shapes_sheet import SHEET_SCENES

Render = Callable[..., torch.Tensor]
"""Renders clips [B, 3, frames, height, width] in -1..1; takes the arguments of `clips.render`."""


@dataclass(frozen=True)
class World:
    """Attributes:
    vocabulary: (slot, attribute, words) of every context token.
    sample: from word numbers [B, tokens] and a generator, draws what the scenes leave open.
    render: see `Render`.
    focus: positions [B, n, 2] of the objects, from parameters and times 0..1, [B].
    describe: turns a scene into a sentence.
    scenes: the scenes of the contact sheet and the quality measurements.
    """

    name: str
    vocabulary: Vocabulary
    sample: Callable[[torch.Tensor, torch.Generator], Parameters]
    render: Render
    focus: Callable[[Parameters, torch.Tensor], torch.Tensor]
    describe: Callable[[Any], str]
    scenes: Sequence[Any]

    def draw(self, count: int, generator: torch.Generator) -> torch.Tensor:
        """Word numbers of scenes with uniformly drawn attributes: long [count, tokens] on the generator's device."""
        return random_indices(count, generator, self.vocabulary)

    def context(self, indices: torch.Tensor) -> torch.Tensor:
        """Context tokens, float32 [B, tokens, 4096], for word numbers."""
        return conditioning_from_indices(indices, self.vocabulary)

    def indices(self, scenes: Sequence[Any]) -> torch.Tensor:
        """Word numbers of scenes: long [B, tokens].

        Raises:
            ValueError: a word is not in the vocabulary.
        """
        return torch.tensor([[words.index(_word(s, slot, name, words)) for slot, name, words in self.vocabulary]
                             for s in scenes])  # fmt: skip

    def conditioning(self, scenes: Sequence[Any]) -> torch.Tensor:
        """Context tokens of scenes, float32 [B, tokens, 4096]; an empty prompt is zeros of the same shape."""
        return self.context(self.indices(scenes))


def _word(scene: Any, slot: str, name: str, words: Sequence[str]) -> str:
    value = getattr(getattr(scene, slot), name)
    if value not in words:
        raise ValueError(f"{slot} {name}: {value!r} is not one of {', '.join(words)}")
    return value


def _focus_of_shapes(parameters: Parameters, time: torch.Tensor) -> torch.Tensor:
    return parameters["start"] + parameters["velocity"] * time.view(-1, 1, 1)


WORLDS = {
    world.name: world
    for world in (
        World("shapes", ATTRIBUTES, clips.sample_parameters, clips.render, _focus_of_shapes, describe, SHEET_SCENES),
        World(
            "rich",
            RICH_ATTRIBUTES,
            rich_clips.sample_rich_parameters,
            rich_clips.render_rich,
            rich_clips.focus_of_rich,
            describe_rich,
            RICH_SHEET,
        ),
    )
}
"""All worlds, by name."""
