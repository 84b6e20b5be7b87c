"""The pictures that ComfyUI shows next to the templates: `workflows/NAME.jpg`.

The demo's comes from a run, half dense and half PSA. The other models cannot run without their weights, so they get a
card with their title and the pyramid that they set: nothing is shown that was not computed here.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from comfyui_psa.choices.picture import patch_figures
from comfyui_psa.reports.paint import font, level_colour

from .pictures import INK, PAPER, QUIET
from .workflow import NOTES, load_workflow

SIZE = (512, 384)
PATCH = ("PSAPatch",)
"""The node whose first two widgets are sparsity and preset."""


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


def card(title: str, sparsity: float, preset: str) -> Image.Image:
    """A card for a template whose model is not in this repository: its title, and what its PSA Patch sees and saves."""
    found = patch_figures({"sparsity": sparsity, "preset": preset})
    picture = Image.new("RGB", SIZE, INK)
    draw = ImageDraw.Draw(picture)
    draw.text((32, 60), "Pyramid Sparse Attention", QUIET, font(20))
    y = 100
    for line in title.split(", "):
        draw.text((32, y), line, PAPER, font(34))
        y += 46
    left, right, y = 32, SIZE[0] - 32, 270
    for factor, share in found["shares"].items():
        end = left + (SIZE[0] - 64) * share
        draw.rectangle((left, y, min(end, right), y + 34), fill=level_colour(int(factor)))
        left = end
    saved = f"{100 * found['sparsity']:.0f} % of the attention work saved in the sparse steps"
    draw.text((32, y + 50), saved, PAPER, font(18))
    return picture


def write_cards(folder: Path) -> list[Path]:
    """Write a card for every workflow in `folder` without a picture, except the demo's; returns the new files."""
    written = []
    for path in sorted(folder.glob("*.json")):
        target = path.with_suffix(".jpg")
        if not target.exists() and path.stem != "psa_demo":
            nodes = load_workflow(path)["nodes"]
            note, patch = (next(n["widgets_values"] for n in nodes if n["type"] in kinds) for kinds in (NOTES, PATCH))
            title = note[0].splitlines()[0].lstrip("# ")
            card(title.split(" (")[0], *patch[:2]).save(target, quality=85)
            written.append(target)
    return written
