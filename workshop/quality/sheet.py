"""The contact sheet: a few frames of two clips, dense first, each setting below with its error."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from ...demo.scene import describe
from ..tools.pictures import DIFFERENCE_GAIN, INK, PAPER, font
from .demo_model import Clip

SIDE, GAP, MARGIN, HEAD, COLUMNS, CLIPS = 150, 4, 230, 34, 3, 2


class Sheet:
    """Collects small pictures, and writes one file a clip: `sheet-<clip>.jpg` in the folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._rows: list[tuple[str, np.ndarray]] = []

    def add(self, name: str, videos: torch.Tensor) -> None:
        """Keep some frames of videos uint8 [B, 3, F, H, W]."""
        videos = videos[:CLIPS]
        picked = np.linspace(0, videos.shape[2] - 1, COLUMNS).round().astype(int)
        self._rows.append((name, videos[:, :, picked].permute(0, 2, 3, 4, 1).cpu().numpy()))

    def write(self, clips: Sequence[Clip]) -> None:
        """Write the files; per row the frames and, amplified, their difference from dense."""
        for number, clip in enumerate(clips[:CLIPS]):
            sheet = Image.new(
                "RGB", (MARGIN + 2 * COLUMNS * (SIDE + GAP), HEAD + len(self._rows) * (SIDE + GAP)), PAPER
            )
            draw = ImageDraw.Draw(sheet)
            draw.text(
                (8, HEAD // 2),
                f"{describe(clip.scene)} Right: error, {DIFFERENCE_GAIN} times.",
                INK,
                font(15),
                anchor="lm",
            )
            dense = self._rows[0][1][number].astype(int)
            for row, (name, frames) in enumerate(self._rows):
                y = HEAD + row * (SIDE + GAP)
                draw.text((8, y + SIDE // 2), name, INK, font(15), anchor="lm")
                error = (np.abs(frames[number] - dense) * DIFFERENCE_GAIN).clip(0, 255).astype(np.uint8)
                for column, picture in enumerate([*frames[number], *error][: None if row else COLUMNS]):
                    thumbnail = Image.fromarray(picture).resize((SIDE, SIDE), Image.Resampling.LANCZOS)
                    sheet.paste(thumbnail, (MARGIN + column * (SIDE + GAP), y))
            sheet.save(self.folder / f"sheet-{number + 1}.jpg", quality=85)
