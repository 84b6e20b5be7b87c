"""How the default was chosen: whole runs, the time of ranking, single calls, and the random sample."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean, median

from ..matrix import CANDIDATES, LEAN, MIDDLE, WARM_UPS
from ..summary import difference
from ..times import TimeRow
from ..velocity import VelocityRow, mean_error
from .parts import Runs, clips_of, error_of, mean_of


def choice_section(choice: Runs, times: Sequence[TimeRow]) -> str:
    """How our default was chosen: importance, its reduction and the dense start, at equal compute and at equal time."""
    computes = (LEAN, MIDDLE, 0.5)
    lines = [
        "| importance | dense first | " + " | ".join(f"{c:.2f}" for c in computes) + " |",
        "|---" * (2 + len(computes)) + "|",
    ]
    for name in CANDIDATES:
        for start in WARM_UPS:
            cells = [mean_of(choice, f"{name}, from {start:.2f} @{c:.2f}") for c in computes]
            if any(cells):
                shown = " | ".join(f"{cell[0]:.2f}, {cell[1]:.4f}" if cell else "" for cell in cells)
                lines.append(f"| {name} | {start:.0%} | {shown} |")
    return f"""
## How the default was chosen

{clips_of(choice)} clips of the GPU run (`python dev.py quality --candidates`): PSNR in dB and SSIM by share of compute,
for the paper's recipe with other importance and dense steps. Two numbers after the name (`1.6 to 0.4`) mean that the
density of the sparse steps falls linearly, from the first multiple of its mean to the second.

{chr(10).join(lines)}

Ranking takes time that compute does not count. The table gives milliseconds per whole call on an H100, and the PSNR our
default ({OURS_IN_TIMES}) would reach in the time the other setting takes at 0.85, interpolated linearly between our
default's times at 0.85 and 0.90 (Wan 1.3B at 720p) and between the computes above:

{_equal_time(choice, times)}
"""


NOISE = "quality-noise-cpu.csv"
OURS_IN_TIMES = "pooled, mean"


def _equal_time(choice: Runs, times: Sequence[TimeRow]) -> str:
    ms = {(row.shape, row.setting, row.sparsity): row.ms for row in times}
    dense = {row.shape: row.dense_ms for row in times}
    small, large = dense
    lines = [
        f"| importance | 12 x 64800 x 128 at 0.85 (dense {dense[small]:.1f}) | 40 heads (dense {dense[large]:.1f}) | "
        "its PSNR at 0.36 | our default in its time |",
        "|---" * 5 + "|",
    ]
    for name in dict.fromkeys(row.setting for row in times):
        own = mean_of(choice, f"{name}, from 0.25 @{LEAN:.2f}")
        density = density_at(ms[small, name, 0.85], ms[small, OURS_IN_TIMES, 0.85], ms[small, OURS_IN_TIMES, 0.90])
        compute = 0.25 + 0.75 * density
        equal = _between(choice, f"{OURS_IN_TIMES}, from 0.25", compute)
        lines.append(
            f"| {name} | {ms[small, name, 0.85]:.1f} | {ms[large, name, 0.85]:.1f} | "
            f"{f'{own[0]:.2f}' if own else ''} | {f'{equal:.2f} (compute {compute:.3f})' if equal else ''} |"
        )
    return chr(10).join(lines)


def density_at(ms: float, ms_85: float, ms_90: float) -> float:
    """Density at which a call takes `ms`, interpolated from its times at sparsity 0.85 and 0.90."""
    return 0.15 + 0.05 * (ms - ms_85) / (ms_85 - ms_90)


def _between(runs: Runs, name: str, compute: float) -> float | None:
    """PSNR of a setting at a compute, interpolated between the computes at which it was measured."""
    points = [(c, mean_of(runs, f"{name} @{c:.2f}")) for c in (LEAN, MIDDLE, 0.5)]
    if any(found is None for _, found in points):
        return None
    (low, first), (high, second) = points[:2] if compute <= MIDDLE else points[1:]
    return first[0] + (second[0] - first[0]) * (compute - low) / (high - low)


def velocity_section(velocity: Sequence[VelocityRow]) -> str:
    """What ways of ranking blocks lose in single model calls."""
    names = list(dict.fromkeys(row.setting for row in velocity))
    lines = ["| importance | reduced by | error of the velocity | CPU seconds per call |", "|---|---|---|---|"]
    for name in sorted(names, key=lambda n: mean_error(velocity, n)):
        seconds = median(row.seconds for row in velocity if row.setting == name)
        kind, reduction = name.rsplit(", ", 1)
        lines.append(f"| {kind} | {reduction} | {mean_error(velocity, name):.4f} | {seconds:.2f} |")
    scenes, levels = len({row.clip for row in velocity}), len({row.sigma for row in velocity})
    sparsity = mean(row.sparsity for row in velocity)
    return f"""
## Single calls disagree

Relative error of the model's velocity in one call, on dense latents of {scenes} scenes at {levels} noise levels,
topk 10/5/0/20 in curve order at sparsity {sparsity:.2f} (`python dev.py quality --velocity`). Seconds are CPU seconds,
measured while other work was running.

{chr(10).join(lines)}

In single calls, max is closer than mean, for means of 8 as well as for the sample; in whole runs, mean is closer for
both. The video is what counts, so the whole runs decide. Clips differ: without the correction the demo's own (16
steps, CPU, slider 0.85, 2026-11-25) reaches 22.6 dB by mean and 26.2 dB by max with `start_percent` 0.25, and 30.8 and
27.2 dB with 0.30. With 0.25 and mean it shows a second square that the dense video does not have, even at the compute
that 0.30 takes (slider 0.78: 21.9 dB), so the demo's workflow uses 0.30.
"""


def noise_section(noise: Runs) -> str:
    """What a sample that is drawn anew in every step does to a run, beside one that stays."""
    lines = ["| sample | PSNR, SSIM of a run | flicker | PSNR, SSIM of the mean video |", "|---|---|---|---|"]
    for kind in ("fixed", "fresh"):
        runs = [rows for name, rows in noise.items() if name.startswith(f"{kind} sample ")]
        single = [row for rows in runs for row in rows]
        means = next(rows for name, rows in noise.items() if name == f"mean of {len(runs)} {kind} samples")
        lines.append(
            f"| {kind}, {len(runs)} draws | {mean(r.psnr for r in single):.2f}, {mean(r.ssim for r in single):.4f} | "
            f"{mean(r.flicker for r in single):.3f} | {mean(r.psnr for r in means):.2f}, "
            f"{mean(r.ssim for r in means):.4f} |"
        )
    control = difference(noise, f"radial mask @{LEAN:.2f}", f"random mask @{LEAN:.2f}")
    return f"""
## The same sample in every step, or a fresh one

The paper ranks blocks with a random sample. From `{NOISE}` ({clips_of(noise)} clips), the paper's recipe at a compute
of {LEAN:.2f}, with the same sample in every step or a fresh one in each. Flicker is the error in the change from frame
to frame. Averaging the videos of several draws removes the noise between draws; the error that remains is bias.

{chr(10).join(lines)}

Most of the error remains in the mean of the draws, so it does not come from randomness. We did not see that a fresh
sample is closer or flickers less.

As a control, a radial mask compared with a random one of the same size: {control.psnr:+.2f}{error_of(control)} dB."""
