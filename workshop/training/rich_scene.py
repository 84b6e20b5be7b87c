"""The large model's vocabulary: four things in front of a ridge and a backdrop, lighting, and a moving camera.

As in `demo/scene.py`, every attribute is one context token; an empty prompt is the same number of zero tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

from ...demo.scene import COLOURS, DIRECTIONS, SIZES, Vocabulary

CAMERAS = (
    *("still", "panning left", "panning right", "panning up", "panning down"),
    *("zooming in", "zooming out", "rolling left", "rolling right"),
)
LIGHTS = ("even light", "light from the left", "light from the right", "light from above", "a spotlight")
BACKDROPS = ("clouds", "waves", "bricks", "marble", "tiles", "dunes")
EARTHS = ("grey", "navy", "forest", "brown", "plum", "sand")
RIDGES = ("no ridge", "hills", "towers")
THINGS = ("nothing", "circle", "square", "triangle", "star", "ring", "cross", "hexagon", "diamond")
TEXTURES = ("plain", "striped", "dotted", "checked", "ringed", "marbled")
SPINS = ("steady", "spinning left", "spinning right")


@dataclass(frozen=True)
class View:
    """Everything but the things. Every field holds a word from the vocabulary above."""

    camera: str = "still"
    light: str = "even light"
    backdrop: str = "clouds"
    backdrop_colour: str = "grey"
    ridge: str = "no ridge"
    ridge_colour: str = "brown"


@dataclass(frozen=True)
class Thing:
    """One moving object; the shape `nothing` leaves it out. Every field holds a word from the vocabulary above."""

    shape: str = "nothing"
    colour: str = "red"
    size: str = "medium"
    texture: str = "plain"
    direction: str = "still"
    spin: str = "steady"


@dataclass(frozen=True)
class RichScene:
    """A view and up to four things, farthest first."""

    view: View = View()
    first: Thing = Thing("circle")
    second: Thing = Thing()
    third: Thing = Thing()
    fourth: Thing = Thing()


SLOTS = ("first", "second", "third", "fourth")
_VIEW_WORDS = {
    "camera": CAMERAS,
    "light": LIGHTS,
    "backdrop": BACKDROPS,
    "backdrop_colour": EARTHS,
    "ridge": RIDGES,
    "ridge_colour": EARTHS,
}
_THING_WORDS = {
    "shape": THINGS,
    "colour": COLOURS,
    "size": SIZES,
    "texture": TEXTURES,
    "direction": DIRECTIONS,
    "spin": SPINS,
}
RICH_ATTRIBUTES: Vocabulary = (
    *(("view", name, words) for name, words in _VIEW_WORDS.items()),
    *((slot, name, words) for slot in SLOTS for name, words in _THING_WORDS.items()),
)
"""The vocabulary of a rich scene."""


def _sentence_of(thing: Thing) -> str:
    texture = "" if thing.texture == "plain" else f"{thing.texture} "
    motion = "standing still" if thing.direction == "still" else f"moving {thing.direction}"
    spin = "" if thing.spin == "steady" else f", {thing.spin}"
    return f"a {thing.size} {texture}{thing.colour} {thing.shape} {motion}{spin}"


def describe_rich(scene: RichScene) -> str:
    """An English sentence describing the scene."""
    view = scene.view
    shown = [_sentence_of(thing) for slot in SLOTS if (thing := getattr(scene, slot)).shape != "nothing"]
    things = "; ".join(shown) or "nothing"
    ridge = "" if view.ridge == "no ridge" else f"{view.ridge_colour} {view.ridge} before "
    return f"{things}; over {ridge}{view.backdrop_colour} {view.backdrop}, {view.light}, camera {view.camera}"


RICH_SHEET = (
    RichScene(
        View("panning right", "light from the left", "bricks", "brown", "hills", "forest"),
        Thing("star", "yellow", "large", "plain", "up", "spinning left"),
        Thing("circle", "cyan", "medium", "striped", "left"),
        Thing("square", "red", "small", "checked", "still", "spinning right"),
    ),
    RichScene(
        View("zooming in", "even light", "marble", "plum", "towers", "grey"),
        Thing("ring", "white", "large", "plain", "right"),
        Thing("triangle", "green", "medium", "dotted", "down"),
        Thing("hexagon", "orange", "medium", "ringed", "left", "spinning left"),
        Thing("cross", "blue", "small", "plain", "up-right"),
    ),
    RichScene(
        View("panning up", "a spotlight", "tiles", "sand", "no ridge", "navy"),
        Thing("diamond", "magenta", "large", "marbled", "down-left"),
        Thing("square", "white", "medium", "striped", "right", "spinning right"),
    ),
    RichScene(
        View("rolling left", "light from above", "waves", "navy", "towers", "brown"),
        Thing("cross", "orange", "large", "checked", "still", "spinning right"),
        Thing("circle", "green", "small", "plain", "up-left"),
        Thing("star", "red", "medium", "dotted", "right"),
    ),
    RichScene(
        View("zooming out", "light from the right", "dunes", "sand", "hills", "plum"),
        Thing("hexagon", "cyan", "large", "plain", "left", "spinning left"),
        Thing("nothing"),
        Thing("ring", "yellow", "medium", "striped", "down"),
        Thing("triangle", "magenta", "medium", "ringed", "up"),
    ),
    RichScene(
        View("panning left", "even light", "clouds", "forest", "hills", "grey"),
        Thing("square", "blue", "large", "dotted", "up-right"),
        Thing("diamond", "white", "medium", "plain", "still", "spinning left"),
        Thing("circle", "red", "medium", "marbled", "down-right"),
        Thing("star", "orange", "small", "plain", "left"),
    ),
)
"""Scenes for the contact sheet and the quality measurements."""
