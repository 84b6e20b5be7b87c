"""The vocabulary of the demo model: what a scene is, its sentence and its conditioning.

A scene is two moving objects over a drifting background. There is no text encoder: every attribute is one context
token. Cross-attention has no positions, so each token is one-hot in a dimension that belongs only to its (slot,
attribute, value). This is not a prompt parser. Needs torch only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch

VOCABULARY_VERSION = "1"
CONTEXT_WIDTH = 4096
"""Width of the Wan 2.1 text encoder's tokens, fixed by the architecture."""
CONTEXT_SCALE = 16.0
"""Length of a context token. A unit vector would give the text projection too little signal to learn from."""

SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "magenta", "white")
SIZES = ("small", "medium", "large")
TEXTURES = ("plain", "stripes", "dots")
DIRECTIONS = ("still", "right", "up-right", "up", "up-left", "left", "down-left", "down", "down-right")
BACKGROUNDS = ("clouds", "waves")
BACKGROUND_COLOURS = ("grey", "navy", "forest", "brown")


@dataclass(frozen=True)
class SceneObject:
    """One moving object. Every field holds a word from the vocabulary above."""

    shape: str = "circle"
    colour: str = "red"
    size: str = "medium"
    texture: str = "plain"
    direction: str = "right"


@dataclass(frozen=True)
class Background:
    """The drifting backdrop. Every field holds a word from the vocabulary above."""

    pattern: str = "clouds"
    colour: str = "grey"
    direction: str = "left"


@dataclass(frozen=True)
class Scene:
    """Two objects (the second one passes in front) and a background."""

    first: SceneObject = SceneObject()
    second: SceneObject = SceneObject(shape="square", colour="blue", direction="left")
    background: Background = Background()


OBJECT_WORDS = {
    "shape": SHAPES,
    "colour": COLOURS,
    "size": SIZES,
    "texture": TEXTURES,
    "direction": DIRECTIONS,
}
BACKGROUND_WORDS = {"pattern": BACKGROUNDS, "colour": BACKGROUND_COLOURS, "direction": DIRECTIONS}

Vocabulary = tuple[tuple[str, str, tuple[str, ...]], ...]
"""(slot, attribute, words) of every context token, in order."""

ATTRIBUTES: Vocabulary = (
    *(("first", name, words) for name, words in OBJECT_WORDS.items()),
    *(("second", name, words) for name, words in OBJECT_WORDS.items()),
    *(("background", name, words) for name, words in BACKGROUND_WORDS.items()),
)
"""The vocabulary of a scene."""

TOKEN_COUNT = len(ATTRIBUTES)


def scene_to_indices(scene: Scene) -> list[int]:
    """Return the word number of each attribute, in the order of `ATTRIBUTES`.

    Raises ValueError, naming the attribute, for a word that is not in the vocabulary.
    """
    indices = []
    for slot, name, words in ATTRIBUTES:
        value = getattr(getattr(scene, slot), name)
        if value not in words:
            raise ValueError(f"{slot} {name}: {value!r} is not one of {', '.join(words)}")
        indices.append(words.index(value))
    return indices


def scene_from_indices(indices: Sequence[int]) -> Scene:
    """Inverse of `scene_to_indices`."""
    if len(indices) != TOKEN_COUNT:
        raise ValueError(f"a scene has {TOKEN_COUNT} attributes, not {len(indices)}")
    slots: dict[str, dict[str, str]] = {field.name: {} for field in fields(Scene)}
    for (slot, name, words), index in zip(ATTRIBUTES, indices, strict=True):
        slots[slot][name] = words[int(index)]
    return Scene(SceneObject(**slots["first"]), SceneObject(**slots["second"]), Background(**slots["background"]))


def random_indices(count: int, generator: torch.Generator, vocabulary: Vocabulary = ATTRIBUTES) -> torch.Tensor:
    """Draw scenes with every attribute uniform: long [count, tokens] on the generator's device."""
    device = generator.device
    sizes = torch.tensor([len(words) for _, _, words in vocabulary], device=device)
    uniform = torch.rand(count, len(vocabulary), generator=generator, device=device)
    return torch.minimum((uniform * sizes).long(), sizes - 1)


def conditioning_from_indices(indices: torch.Tensor, vocabulary: Vocabulary = ATTRIBUTES) -> torch.Tensor:
    """Context tokens, float32 [B, tokens, CONTEXT_WIDTH], for word numbers, long [B, tokens]."""
    sizes = torch.tensor([len(words) for _, _, words in vocabulary], device=indices.device)
    dimension = indices + (torch.cumsum(sizes, 0) - sizes)
    context = torch.zeros(*indices.shape, CONTEXT_WIDTH, device=indices.device)
    return context.scatter_(2, dimension.unsqueeze(2), CONTEXT_SCALE)


def conditioning(scenes: Sequence[Scene]) -> torch.Tensor:
    """Context tokens of scenes: float32 [B, TOKEN_COUNT, CONTEXT_WIDTH], on the CPU.

    Raises ValueError, naming the attribute, for a word that is not in the vocabulary.
    """
    return conditioning_from_indices(torch.tensor([scene_to_indices(scene) for scene in scenes]))


def _describe_object(item: SceneObject) -> str:
    texture = {"plain": "", "stripes": "striped ", "dots": "dotted "}[item.texture]
    motion = "standing still" if item.direction == "still" else f"moving {item.direction}"
    return f"{item.size} {texture}{item.colour} {item.shape} {motion}"


def describe(scene: Scene) -> str:
    """An English sentence that says what the scene shows."""
    back = scene.background
    motion = "standing still" if back.direction == "still" else f"drifting {back.direction}"
    return (
        f"A {_describe_object(scene.first)} and a {_describe_object(scene.second)} "
        f"over {back.colour} {back.pattern} {motion}."
    )
