"""The gallery: settings and rivals on the same noise, as looping pictures with their figures burnt in.

A picture is data: the settings that it shows, and a sentence about it. `tools/film.py` draws them, `report/gallery.py`
writes the page that shows them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..tools.film import Tile, film, save, stacked
from .demo_model import Clip
from .results import RunRow, read_runs
from .setting import Setting

COLUMNS, SIDE = 4, 240
"""Tiles in a row of a picture, and their width in pixels."""
DENSE, OURS = "dense", "PSA 0.85"
OFF, FULL, COARSE = "no correction", "blocks in full or not at all", "blocks at a quarter or not at all"
PUBLISHED, STEPS_LEFT = "published for Wan 1.3B", "35 % of the steps"
CACHE, SOL = "EasyCache, 0.3", "Sol-Attn, tau 1.5"


@dataclasses.dataclass(frozen=True)
class Picture:
    """What one file shows.

    Attributes:
        tiles: label -> name of the setting; settings that were not measured are left out.
        sentence: what to look for.
        still: one frame of every video with its error below, instead of a looping picture.
        first: only of the first clip.
    """

    name: str
    tiles: Mapping[str, str]
    sentence: str
    still: bool = False
    first: bool = False

    def file(self, model: str, clip: int) -> str:
        """Its file's name, for the number of a clip, from 1."""
        number = "" if self.first else f"-{clip}"
        return f"{model}{number}-{self.name}.{'jpg' if self.still else 'webp'}"


def _same(*names: str) -> dict[str, str]:
    return {name: name for name in names}


PICTURES = (
    Picture(
        "sparsity",
        _same(DENSE, "PSA 0.70", OURS, "PSA 0.95"),
        "Three places of the slider `sparsity`, all else at its default.",
    ),
    Picture(
        "rivals",
        _same(DENSE, OURS, OFF, PUBLISHED, FULL, CACHE, STEPS_LEFT, SOL),
        "PSA at 0.85 and what else one may do to pay less; what each is, the table below tells.",
    ),
    Picture(
        "tuning-sparsity",
        {"dense": DENSE, "0.70": "PSA 0.70", "0.85": OURS, "0.95": "PSA 0.95"},
        "`sparsity`: the middle frame, and below it four times its error.",
        still=True,
        first=True,
    ),
    Picture(
        "tuning-start",
        {"dense": DENSE, "0.10": "start_percent 0.10", "0.25": OURS, "0.40": "start_percent 0.40"},
        "`start_percent`, with `sparsity` at 0.85.",
        still=True,
        first=True,
    ),
    Picture(
        "tuning-correction",
        {"dense": DENSE, "off": OFF, "eighth": "correction eighth", "full": OURS},
        "`correction`, with `sparsity` at 0.85.",
        still=True,
        first=True,
    ),
    Picture(
        "tuning-levels",
        {"dense": DENSE, "in full or not at all": FULL, "at 1/4 or not at all": COARSE, "the pyramid": OFF},
        "What the levels of the pyramid are for: the same work at 0.85 spent in other ways, without the correction.",
        still=True,
        first=True,
    ),
)
"""All pictures, in the order of the page."""

ABOUT = {
    DENSE: "normal attention; the others are compared with it",
    OURS: "PSA Patch at its defaults",
    OFF: "PSA Patch at 0.85 with `correction` off",
    PUBLISHED: "the paper's preset `wan2.1-1.3b (published)` as it is, 30 % of the steps dense",
    FULL: "as without the correction, but with one level: plain block-sparse attention",
    COARSE: "the same with a quarter of the resolution as the only level",
    CACHE: "ComfyUI's EasyCache: some model calls are answered from the one before",
    STEPS_LEFT: "normal attention with fewer steps",
    SOL: "ComfyUI's own sparse attention by its documented rule, with 256 extra tokens, the first quarter dense",
    "start_percent 0.10": "PSA 0.85, but dense for a tenth of the schedule",
    "start_percent 0.40": "PSA 0.85, but dense for 40 % of the schedule",
    "correction eighth": "PSA 0.85 with an eighth of the correction's memory",
}
"""What the settings are, where the name does not say it."""


def gallery() -> list[Setting]:
    """The settings that the pictures show, beside dense."""

    def psa(name: str, **node: Any) -> Setting:
        return Setting(name, "gallery", {"sparsity": 0.85, "correction": "full"} | node, sheet=True)

    def rival(name: str, node: Mapping[str, Any] | None = None, **prototype: Any) -> Setting:
        return Setting(name, "rivals", node or {}, prototype=prototype, sheet=True)

    return [
        *(psa(f"PSA {sparsity:.2f}", sparsity=sparsity) for sparsity in (0.85, 0.70, 0.95)),
        psa(OFF, correction="off"),
        *(psa(f"start_percent {start:.2f}", start_percent=start) for start in (0.10, 0.40)),
        psa("correction eighth", correction="eighth"),
        psa(FULL, correction="off", pyramid="1: 1.0"),
        psa(COARSE, correction="off", pyramid="4: 1.0"),
        rival(PUBLISHED, {"preset": "wan2.1-1.3b (published)", "start_percent": 0.30, "sparsity": 0.85}),
        rival(CACHE, easycache=0.3),
        rival(STEPS_LEFT, steps=0.35),
        rival(SOL, {"order": "raster"}, sol=1.5, extra=256),
    ]


def computed(row: RunRow) -> str:
    """What a run computed, as the pictures and the page say it."""
    calls = row.forwards is not None and row.forwards < 1
    return f"{100 * (row.compute or 0):.0f} % of the {'model calls' if calls else 'attention'}"


def figures(row: RunRow) -> str:
    """What a run computed, and how near it is to dense."""
    if row.setting == DENSE or row.psnr is None:
        return computed(row)
    return f"{computed(row)}, {'equal' if math.isinf(row.psnr) else f'{row.psnr:.1f} dB'}"


def words(picture: Picture, rows: Sequence[RunRow], clip: str) -> list[tuple[str, str, str]]:
    """(setting, label, figures) of every tile of a picture of a clip; rows: of a run of `gallery()`."""
    found = {row.setting: row for row in rows if row.clip == clip}
    return [(name, label, figures(found[name])) for label, name in picture.tiles.items() if name in found]


def text_of(picture: Picture, rows: Sequence[RunRow], clip: str) -> str:
    """Every word on a picture, in one line. It is also written into the file, as its description."""
    return "; ".join(f"{label}: {text}" for _, label, text in words(picture, rows, clip))


class Gallery:
    """Keeps the videos of a run and draws the pictures of its settings into a folder; used like `Sheet`."""

    def __init__(self, folder: Path, model: str) -> None:
        self.folder, self.model = folder, model
        self._videos: dict[str, np.ndarray] = {}

    def add(self, name: str, videos: torch.Tensor) -> None:
        """Keep the videos of a setting, uint8 [B, 3, F, H, W]."""
        self._videos[name] = videos.permute(0, 2, 3, 4, 1).cpu().numpy()

    def write(self, clips: Sequence[Clip], _: Callable[[Any], str]) -> None:
        """Write the files; the figures are those of the folder's `runs.csv`."""
        rows = read_runs(self.folder)
        for number, clip in enumerate(clips):
            for picture in PICTURES:
                if not (picture.first and number):
                    self._draw(picture, rows, number, clip.name)

    def _draw(self, picture: Picture, rows: Sequence[RunRow], number: int, clip: str) -> None:
        found = words(picture, rows, clip)
        dense = self._videos[DENSE][number]
        tiles = []
        for name, label, text in found:
            video = self._videos[name][number]
            tiles.append(Tile(label, text, stacked(video, dense) if picture.still else video))
        save(
            self.folder / picture.file(self.model, number + 1), film(tiles, COLUMNS, SIDE), text_of(picture, rows, clip)
        )
