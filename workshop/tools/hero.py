"""The README's picture: the demo's two videos side by side with their figures, and the seconds of a real model."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..table import read_rows
from .film import Tile, film, save
from .paths import ROOT

TIMES = ROOT / "workshop" / "results" / "model-gpu.csv"
SIDE = 400


def write_hero(path: Path, dense: np.ndarray, psa: np.ndarray, psnr: float, report: dict) -> None:
    """Write the picture, a looping WebP.

    Args:
        dense, psa: videos uint8 [F, H, W, 3].
        psnr: of the second against the first, in dB.
        report: PSA Report's JSON.
    """
    (name, all_of_it), (ours, figures) = captions(psnr, report)
    tiles = [Tile(name, all_of_it, dense), Tile(ours, figures, psa)]
    save(path, film(tiles, len(tiles), SIDE, speed()), words(psnr, report), quality=85)


def words(psnr: float, report: dict) -> str:
    """Every word on the picture, in one line. It is also written into the file, as its description."""
    return "; ".join([*map(": ".join, captions(psnr, report)), *speed()])


def captions(psnr: float, report: dict) -> list[tuple[str, str]]:
    """The name of each video and the figures below it."""
    target, computed = report.get("target_sparsity"), 100 * (1 - (report.get("saved") or 0.0))
    return [
        ("normal attention", "100 % of the attention"),
        ("PSA" if target is None else f"PSA {target:.2f}", f"{computed:.0f} % of the attention, {psnr:.1f} dB"),
    ]


def speed() -> list[str]:
    """The newest measured seconds of a step of Wan 1.3B, dense and with PSA at 0.85, in two lines."""
    rows = [row for row in read_rows(TIMES) if row["model"] == "wan2.1-1.3b" and row["dtype"] == "bfloat16"]
    newest = {row["method"]: row for row in rows if row["sparsity"] in ("0", "0.850")}
    normal, ours = (float(newest[method]["seconds_per_step"]) for method in ("dense", "psa-corrected"))
    return [
        f"A step of Wan 1.3B at 1280x720 on an H100: {normal:.2f} s with normal attention, {ours:.2f} s sparse",
        "Shown is the small model that comes with this pack, from the same noise.",
    ]
