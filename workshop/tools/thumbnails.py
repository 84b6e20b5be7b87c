"""The pictures that ComfyUI shows next to the templates: `workflows/NAME.jpg`.

The demo's comes from a run, half dense and half PSA. The other models cannot run without their weights, so they get a
card with their title and the default pyramid: nothing is shown that was not computed here.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from comfyui_psa.reports.paint import font, level_colour

from .pictures import INK, PAPER, QUIET

SIZE = (512, 384)
# The default pyramid at sparsity 0.85: share of the block pairs, pooling factor.
BAR = ((0.10, 1), (0.05, 2), (0.20, 8), (0.65, 0))


def split_frame(dense: np.ndarray, psa: np.ndarray, title: str) -> Image.Image:
    """The middle frame of two videos, uint8 [F, H, W, 3]: the left half dense, the right half PSA."""
    middle = len(dense) // 2
    width = dense.shape[2]
    joined = np.concatenate([dense[middle, :, : width // 2], psa[middle, :, width // 2 :]], axis=1)
    picture = Image.fromarray(joined).resize((SIZE[0], round(SIZE[0] * joined.shape[0] / width)))
    top = max(0, (picture.height - SIZE[1]) // 2)
    picture = picture.crop((0, top, SIZE[0], top + SIZE[1]))
    draw = ImageDraw.Draw(picture)
    draw.line((SIZE[0] // 2, 0, SIZE[0] // 2, SIZE[1]), PAPER, 2)
    for place, text in ((SIZE[0] // 4, "dense"), (3 * SIZE[0] // 4, title)):
        draw.rectangle((place - 90, 12, place + 90, 44), fill=INK)
        draw.text((place, 28), text, PAPER, font(18), anchor="mm")
    return picture


def card(title: str) -> Image.Image:
    """A card for a template whose model is not in this repository."""
    picture = Image.new("RGB", SIZE, INK)
    draw = ImageDraw.Draw(picture)
    draw.text((32, 60), "Pyramid Sparse Attention", QUIET, font(20))
    y = 100
    for line in title.split(", "):
        draw.text((32, y), line, PAPER, font(34))
        y += 46
    left, right, y = 32, SIZE[0] - 32, 270
    for share, factor in BAR:
        end = left + (SIZE[0] - 64) * share
        draw.rectangle((left, y, min(end, right), y + 34), fill=level_colour(factor))
        left = end
    draw.text((32, y + 50), "85 % of the attention work saved in the sparse steps", PAPER, font(18))
    return picture


def write_cards(folder: Path) -> list[Path]:
    """Write a card for every workflow in `folder` without a picture, except the demo's; returns the new files."""
    written = []
    for path in sorted(folder.glob("*.json")):
        target = path.with_suffix(".jpg")
        if not target.exists() and path.stem != "psa_demo":
            notes = [n for n in json.loads(path.read_text(encoding="utf-8"))["nodes"] if n["type"] == "MarkdownNote"]
            title = notes[0]["widgets_values"][0].splitlines()[0].lstrip("# ")
            card(title.split(" (")[0]).save(target, quality=85)
            written.append(target)
    return written
