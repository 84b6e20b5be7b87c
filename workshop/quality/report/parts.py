"""What the sections of the page share: means over clips, spread, and plots."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from ..results import RunRow
from ..summary import Difference

ROOT = Path(__file__).resolve().parents[3]
RESULTS, PAGE, PICTURES = ROOT / "workshop" / "results", ROOT / "docs" / "quality.md", ROOT / "docs" / "quality"

Runs = dict[str, list[RunRow]]


def mean_of(runs: Runs, name: str) -> tuple[float, float] | None:
    """Mean PSNR and SSIM of a setting; None if it was not measured."""
    rows = runs.get(name)
    return (mean(row.psnr for row in rows), mean(row.ssim for row in rows)) if rows else None


def error_of(found: Difference) -> str:
    """The standard error of a difference as it is written after it; nothing if there is none."""
    return f" ± {found.psnr_error:.2f}" if math.isfinite(found.psnr_error) else ""


def clips_of(runs: Runs) -> int:
    """Number of clips."""
    return len({row.clip for rows in runs.values() for row in rows})


def label(axes, x: str, rows: Sequence[RunRow]) -> None:
    """Titles of a plot of PSNR, with `x` below it."""
    measured = [row for row in rows if row.psnr is not None]
    title = f"{measured[0].machine.split(',')[0]}, {len({row.clip for row in measured})} clips"
    axes.set(xlabel=x, ylabel="PSNR against dense, dB", title=title)
    axes.grid(True, alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8, loc="best")


def pyplot():
    """matplotlib's pyplot, which draws into files."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def save(figure, path: Path) -> None:
    """Write a plot and close it."""
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    pyplot().close(figure)
