"""The contact sheet: a few frames of two clips, dense first, then each setting with its error."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..tools.pictures import DIFFERENCE_GAIN, amplified_difference, contact_sheet
from .demo_model import Clip

SIDE, COLUMNS, CLIPS = 150, 3, 2


class Sheet:
    """Collects small pictures and writes one file per clip: `sheet-<clip>.jpg` in the folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._rows: list[tuple[str, np.ndarray]] = []

    def add(self, name: str, videos: torch.Tensor) -> None:
        """Keep a few frames of the videos, uint8 [B, 3, F, H, W]."""
        videos = videos[:CLIPS]
        picked = np.linspace(0, videos.shape[2] - 1, COLUMNS).round().astype(int)
        self._rows.append((name, videos[:, :, picked].permute(0, 2, 3, 4, 1).cpu().numpy()))

    def write(self, clips: Sequence[Clip], describe: Callable[[Any], str]) -> None:
        """Write the files. Each row shows the frames and their amplified difference from dense; `describe` turns a
        scene into a sentence."""
        for number, clip in enumerate(clips[:CLIPS]):
            (first, videos), *others = self._rows
            dense = videos[number]
            rows = [(first, dense)]
            rows += [(name, [*frames[number], *amplified_difference(dense, frames[number])]) for name, frames in others]
            title = f"{describe(clip.scene)} Right: {DIFFERENCE_GAIN} times the error."
            contact_sheet(rows, SIDE, title).save(self.folder / f"sheet-{number + 1}.jpg", quality=85)
