"""Draws videos in tiles, each under its name and figures, and saves them as a looping WebP or as a still."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from comfyui_psa.reports.paint import INK, PAPER, QUIET, font

from .pictures import amplified_difference

FPS = 12
HEAD, FOOT, GAP = 48, 30, 4
_DESCRIPTION = 0x010E  # Exif's ImageDescription


class Tile(NamedTuple):
    """A video, uint8 [F, H, W, 3], its name, and a line of figures."""

    label: str
    figures: str
    frames: np.ndarray


def stacked(video: np.ndarray, dense: np.ndarray) -> np.ndarray:
    """The middle frame of a video and, below it, its amplified difference from dense: uint8 [1, 2 * H, W, 3]."""
    middle = len(video) // 2
    return np.concatenate([video[middle], amplified_difference(dense[middle], video[middle])])[None]


def film(tiles: Sequence[Tile], columns: int, side: int, footer: Sequence[str] = ()) -> list[Image.Image]:
    """The frames of a picture with all tiles, which have one shape.

    columns: tiles in a row. side: width of a tile in pixels. footer: lines below them.
    """
    count, height, width = tiles[0].frames.shape[:3]
    size = side, round(side * height / width)
    columns = min(columns, len(tiles))
    rows = math.ceil(len(tiles) / columns)
    ground = Image.new(
        "RGB", (columns * (side + GAP) - GAP, rows * (HEAD + size[1] + GAP) - GAP + FOOT * len(footer)), PAPER
    )
    draw = ImageDraw.Draw(ground)
    places = [(i % columns * (side + GAP), i // columns * (HEAD + size[1] + GAP)) for i in range(len(tiles))]
    for (x, y), tile in zip(places, tiles, strict=True):
        _line(draw, (x + 6, y + 15), tile.label, INK, 17, side - 12)
        _line(draw, (x + 6, y + 36), tile.figures, QUIET, 14, side - 12)
    for number, text in enumerate(footer, start=1):
        y = ground.height - FOOT * (len(footer) - number) - FOOT // 2
        _line(draw, (6, y), text, INK if number == 1 else QUIET, 20 if number == 1 else 15, ground.width - 12)
    pictures = [ground.copy() for _ in range(count)]
    for (x, y), tile in zip(places, tiles, strict=True):
        for picture, frame in zip(pictures, tile.frames, strict=True):
            picture.paste(Image.fromarray(frame).resize(size, Image.Resampling.LANCZOS), (x, y + HEAD))
    return pictures


def _line(
    draw: ImageDraw.ImageDraw, place: tuple[int, int], text: str, colour: tuple[int, int, int], size: int, width: int
) -> None:
    """Write a line, smaller if it is wider than `width`."""
    while size > 9 and draw.textlength(text, font(size)) > width:
        size -= 1
    draw.text(place, text, colour, font(size), anchor="lm")


def save(path: Path, pictures: Sequence[Image.Image], description: str, quality: int = 60) -> None:
    """Write the frames as a looping WebP, or the first one as a JPEG, by the path's ending; with the words on it.

    quality: of the WebP, up to 100.
    """
    exif = Image.Exif()
    exif[_DESCRIPTION] = description
    path.parent.mkdir(parents=True, exist_ok=True)
    first, *others = pictures
    if path.suffix == ".webp":
        timing = {"duration": round(1000 / FPS), "loop": 0}
        first.save(path, save_all=True, append_images=others, quality=quality, method=6, exif=exif, **timing)
    else:
        first.save(path, quality=85, exif=exif)


def description_of(path: Path) -> str:
    """The words that a picture was saved with."""
    with Image.open(path) as picture:
        return str(picture.getexif().get(_DESCRIPTION, ""))
