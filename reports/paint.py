"""Colours, fonts and small charts that the pictures share. Pillow comes with ComfyUI."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

PAPER, INK, QUIET, GRID = (24, 25, 29), (236, 237, 240), (160, 164, 172), (62, 64, 71)
DENSE = (92, 95, 104)
# From dark violet through teal to yellow: lighter means more, even if the colours cannot be told apart.
_HEAT = np.array([(59, 28, 92), (52, 82, 139), (33, 139, 140), (94, 201, 98), (253, 231, 37)], dtype=np.float64)
# The same colours as in web/picture.js.
LEVELS = {
    1: (253, 231, 37),
    2: (94, 201, 98),
    4: (33, 145, 140),
    8: (59, 124, 196),
    16: (90, 85, 176),
    32: (109, 74, 160),
}
COARSE, UNSEEN = (125, 74, 150), (74, 76, 83)


def heat(values: np.ndarray | float) -> np.ndarray:
    """Colours of values 0..1: uint8 [..., 3]."""
    position = np.clip(values, 0, 1) * (len(_HEAT) - 1)
    low = np.minimum(np.floor(position).astype(int), len(_HEAT) - 2)
    share = np.asarray(position - low)[..., None]
    return (_HEAT[low] * (1 - share) + _HEAT[low + 1] * share).round().astype(np.uint8)


def level_colour(factor: int) -> tuple[int, int, int]:
    """Colour of a pooling factor; 0 is not seen at all."""
    return LEVELS.get(factor, COARSE) if factor else UNSEEN


def level_picture(factors: np.ndarray) -> np.ndarray:
    """Pooling factors [...] in their colours: uint8 [..., 3]."""
    found, place = np.unique(factors, return_inverse=True)
    return np.array([level_colour(int(factor)) for factor in found], np.uint8)[place.reshape(factors.shape)]


def over_frame(
    frames: np.ndarray | None, colours: np.ndarray, step: int, time: int, width: int, height: int
) -> Image.Image:
    """Colours uint8 [h, w, 3] of latent frame `step` of `time` over the frame of the video that it stands for, in grey.

    frames: uint8 [F, H, W, 3]; None leaves the colours alone. width, height: of the picture.
    """
    overlay = Image.fromarray(colours).resize((width, height), Image.Resampling.NEAREST)
    if frames is None:
        return overlay
    frame = round(step * (len(frames) - 1) / max(1, time - 1))
    grey = Image.fromarray(frames[frame]).convert("L").convert("RGB").resize((width, height))
    return Image.blend(grey, overlay, 0.5)


def level_name(factor: int) -> str:
    """The name of a pooling factor in pictures."""
    return {0: "not at all", 1: "in full"}.get(factor, f"at 1/{factor}")


def font(size: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    """Pillow's own font; if Pillow is old or built without FreeType, its small one."""
    try:
        return ImageFont.load_default(size)
    except (TypeError, OSError, ImportError):
        return ImageFont.load_default()


class Sheet:
    """A picture that grows downward: `y` is where the next thing goes."""

    def __init__(self, width: int, height: int, margin: int = 24) -> None:
        self.image = Image.new("RGB", (width, height), PAPER)
        self.draw = ImageDraw.Draw(self.image)
        self.width, self.margin, self.y = width, margin, margin

    def text(self, text: str, size: int = 15, colour: tuple = INK, x: int | None = None, advance: bool = True) -> None:
        """Write text, wrapped at the right edge."""
        x = self.margin if x is None else x
        letters = font(size)
        for line in wrap(text, letters, self.width - x - self.margin):
            self.draw.text((x, self.y), line, colour, letters)
            if advance:
                self.y += round(size * 1.35)

    def legend(self, entries: Sequence[tuple[tuple, str]], x: int, y: int, size: int = 13) -> int:
        """Coloured squares with labels, in a row; returns where the row ends."""
        letters = font(size)
        for colour, word in entries:
            self.draw.rectangle((x, y + 2, x + size - 2, y + size), fill=colour)
            self.draw.text((x + size + 5, y), word, INK, letters)
            x += size + 5 + round(letters.getlength(word)) + 18
        return x

    def stack(self, box: tuple[int, int, int, int], parts: Sequence[tuple[tuple, float]]) -> None:
        """A bar whose parts fill the box in proportion."""
        left, top, right, bottom = box
        total = sum(part for _, part in parts) or 1.0
        self.draw.rectangle(box, fill=GRID)
        start = float(left)
        for colour, part in parts:
            end = start + (right - left) * part / total
            if round(end) > round(start):
                self.draw.rectangle((round(start), top, round(end) - 1, bottom), fill=colour)
            start = end

    def cropped(self) -> Image.Image:
        """The picture down to `y`."""
        return self.image.crop((0, 0, self.width, min(self.image.height, self.y + self.margin)))


def wrap(text: str, letters: ImageFont.ImageFont | ImageFont.FreeTypeFont, width: float) -> list[str]:
    """Lines of at most `width` pixels, broken between words."""
    lines: list[str] = []
    for paragraph in text.split("\n"):
        line = ""
        for word in paragraph.split(" "):
            longer = f"{line} {word}" if line else word
            if line and letters.getlength(longer) > width:
                lines.append(line)
                line = word
            else:
                line = longer
        lines.append(line)
    return lines


def nice_step(most: float, parts: int = 4) -> float:
    """A round distance between ticks, so that about `parts` of them reach `most`."""
    if most <= 0:
        return 1.0
    raw = most / parts
    power = 10.0 ** math.floor(math.log10(raw))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw)
