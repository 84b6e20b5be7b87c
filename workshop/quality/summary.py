"""Conclusions from rows: paired differences over clips, verdicts, and the quick run's summary line."""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Iterable
from statistics import mean, stdev

from .claims import Claim
from .results import RunRow

PUBLISHED = " (published)"


@dataclasses.dataclass(frozen=True)
class Difference:
    """First minus second over the clips they share: mean and standard error, with the compute of each."""

    first: str
    second: str
    clips: int
    psnr: float
    psnr_error: float
    ssim: float
    computes: tuple[float, float]

    @property
    def verdict(self) -> str:
        """`holds` and `does not hold` need two standard errors."""
        if abs(self.psnr) <= 2 * self.psnr_error:
            return "no difference"
        return "holds" if self.psnr > 0 else "does not hold"


def by_setting(rows: Iterable[RunRow]) -> dict[str, list[RunRow]]:
    """The rows with measurements, by setting, in their original order."""
    found: dict[str, list[RunRow]] = defaultdict(list)
    for row in rows:
        if row.psnr is not None:
            found[row.setting].append(row)
    return dict(found)


def difference(runs: dict[str, list[RunRow]], first: str, second: str) -> Difference | None:
    """First minus second; None if one of them was not measured."""
    if first not in runs or second not in runs:
        return None
    others = {row.clip: row for row in runs[second]}
    pairs = [(row, others[row.clip]) for row in runs[first] if row.clip in others]
    # Equal videos have an infinite PSNR, which has no difference.
    pairs = [(a, b) for a, b in pairs if math.isfinite(a.psnr) and math.isfinite(b.psnr)]
    if not pairs:
        return None
    psnr = [a.psnr - b.psnr for a, b in pairs]
    error = stdev(psnr) / math.sqrt(len(psnr)) if len(psnr) > 1 else math.inf
    computes = pairs[0][0].compute, pairs[0][1].compute
    return Difference(first, second, len(pairs), mean(psnr), error, mean(a.ssim - b.ssim for a, b in pairs), computes)


def judge(runs: dict[str, list[RunRow]], claim: Claim) -> list[Difference]:
    """A claim's differences, one for each compute at which both settings were measured."""
    names = [(f"{claim.first} @{c:.2f}", f"{claim.second} @{c:.2f}") for c in claim.compute]
    found = (difference(runs, *pair) for pair in names or [(claim.first, claim.second)])
    return [d for d in found if d is not None]


def against_published(runs: dict[str, list[RunRow]]) -> list[Difference]:
    """Our default minus each published setting, at the published setting's compute."""
    presets = [name.removesuffix(PUBLISHED) for name in runs if name.endswith(PUBLISHED)]
    found = (difference(runs, f"default = {preset}", preset + PUBLISHED) for preset in presets)
    return [d for d in found if d is not None]


def quick_line(rows: Iterable[RunRow]) -> tuple[float, str]:
    """Our default minus the best published setting in dB at equal compute, and a sentence about it.

    The best is the one with the smallest margin to our default, each compared at its own compute.
    """
    found = against_published(by_setting(rows))
    if not found:
        return -math.inf, "Nothing was compared: no published setting was measured alongside our default."
    worst = min(found, key=lambda d: d.psnr)
    return worst.psnr, (
        f"Our default minus the best published setting at equal compute: {worst.psnr:+.2f} dB "
        f"({worst.second}, {worst.computes[1]:.3f} of the dense attention FLOPs, ours {worst.computes[0]:.3f}, "
        f"{worst.clips} clips, SSIM {worst.ssim:+.4f})"
    )
