"""What is lost at a share of the compute, and against the published presets."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from ..matrix import ALL, FRONT
from ..results import RunRow
from ..summary import PUBLISHED, by_setting, difference
from .choice import OURS_IN_TIMES
from .parts import PICTURES, Runs, clips_of, error_of, label, mean_of, pyplot, save

NAMES = {
    "default": "our default",
    "paper": "paper's recipe",
    "paper, mean": "paper's recipe, mean instead of max",
    "pooled by max": "our default, max instead of mean",
    "block-sparse": "block-sparse (rival)",
    "radial mask": "radial mask (rival)",
    "PSA-3": "PSA-3 (15/10/20)",
    "budget 70/10/10, raster": "budget 70/10/10, raster",
}


def answers(gpu: Runs) -> str:
    """What each method loses at 1.5x, 2x and 3x less attention compute, in sentences."""
    text = ["## Loss at 1.5x, 2x and 3x less attention compute"]
    for times, compute in ((1.5, FRONT[2]), (2, FRONT[1]), (3, FRONT[0])):
        text.append(f"- **{times:g}x** (compute {compute:.2f}): {_answer(gpu, compute)}")
    text.append("PSNR in dB and SSIM by share of compute, averaged over the clips.")
    text.append(_front_table("GPU, four clips", gpu))
    text.append(
        "![Quality against compute](quality/compute.png)\n\n![Quality against time](quality/time.png)\n\n"
        "Time is CPU time of the torch backend. On a GPU, the demo's 9216 tokens are too few for meaningful times;\n"
        "for calls at real sizes see [Performance](performance.md).\n\n"
        "Below are rows from the GPU run's contact sheets. The radial mask is our own, in blocks of 128 by 64 in\n"
        "raster order; it follows the idea of Radial Attention (arXiv 2506.19852), but not its code."
    )
    for path in sorted(PICTURES.glob("side-by-side-*.jpg")):
        text.append(f"![Frames, and their error amplified](quality/{path.name})")
    return "\n\n".join([text[0], "\n".join(text[1:4]), *text[4:]])


def _answer(gpu: Runs, compute: float) -> str:
    parts, recipe = [], f"paper @{compute:.2f}"
    ours, found = mean_of(gpu, f"default @{compute:.2f}"), mean_of(gpu, recipe)
    if ours:
        parts.append(f"our default keeps {ours[0]:.1f} dB, SSIM {ours[1]:.3f}")
    if found:
        kept = f"{found[0]:.1f} dB, SSIM {found[1]:.3f}"
        parts.append(f"the paper's recipe, which ranks with four times as many scores, keeps {kept}")
    for rival in ("block-sparse", "radial mask"):
        lost = difference(gpu, f"{rival} @{compute:.2f}", f"default @{compute:.2f}")
        if lost:
            parts.append(f"{_article(rival)} loses {-lost.psnr:.1f} dB more than our default")
    measured = [name for name in gpu if name.endswith(f" @{compute:.2f}")]
    best = max(measured, key=lambda name: mean_of(gpu, name)[0])
    parts.append(f"the closest of {len(measured)} settings is `{best}` with {mean_of(gpu, best)[0]:.1f} dB")
    return ";\n  ".join(parts) + "."


def _article(rival: str) -> str:
    return "plain block-sparse attention" if rival == "block-sparse" else "a radial mask"


def _front_table(title: str, runs: Runs) -> str:
    computes = sorted(ALL, reverse=True)
    lines = [f"| {title} | " + " | ".join(f"{c:.2f}" for c in computes) + " |", "|---" * (len(computes) + 1) + "|"]
    for name, shown in NAMES.items():
        cells = [mean_of(runs, f"{name} @{c:.2f}") for c in computes]
        if any(cells):
            lines.append(f"| {shown} | " + " | ".join(f"{c[0]:.1f}, {c[1]:.3f}" if c else "" for c in cells) + " |")
    return "\n".join(lines)


def published(choice: Runs, gpu: Runs, cpu: Runs) -> str:
    """Every published preset beside our default at its compute."""
    lines = ["| published preset | compute | PSNR, SSIM | against it | dB | SSIM | run |", "|---" * 7 + "|"]
    for runs, ours in ((choice, f"{OURS_IN_TIMES}, from 0.25"), (gpu, "default"), (cpu, "default")):
        where = f"{'CPU' if runs is cpu else 'GPU'}, {clips_of(runs)} clips"
        for name in runs:
            found = difference(runs, f"{ours} = {name.removesuffix(PUBLISHED)}", name)
            if not name.endswith(PUBLISHED) or found is None:
                continue
            own = mean_of(runs, name)
            lines.append(
                f"| {name.removesuffix(PUBLISHED)} | {found.computes[1]:.3f} | {own[0]:.1f}, {own[1]:.3f} | "
                f"our default | {found.psnr:+.2f}{error_of(found)} | {found.ssim:+.4f} | {where} |"
            )
    return (
        "## Against the published presets, each at its own compute\n\n"
        "Positive means that our default is closer to dense. `cogvideox-5b-4step` has no dense steps, and takes less\n"
        "compute than our dense quarter alone, so it was not compared.\n\n"
        + "\n".join(lines)
        + "\n\nWith 10 steps, a quarter and 30 % are the same three dense steps. Over four clips of 17 frames\n"
        "(10 steps, CPU, 2026-11-25), our default minus `cogvideox1.5-5b` is +0.29 dB, SSIM +0.0027; minus\n"
        "`wan2.1-1.3b-topk` it is -0.06 dB, SSIM +0.0012, so with few steps the two are level. The quick run takes\n"
        "20 steps."
    )


def _curve(runs: Runs, name: str) -> list[RunRow]:
    """One row with the mean PSNR for each compute at which `name` was measured."""
    found = [(c, runs.get(f"{name} @{c:.2f}")) for c in sorted(ALL)]
    return [
        RunRow(name, "", "", compute=rows[0].compute, psnr=mean(r.psnr for r in rows), run_s=rows[0].run_s)
        for _, rows in found
        if rows
    ]


def plot_compute(path: Path, rows: Sequence[RunRow]) -> None:
    """Draw PSNR against compute, a line for each method."""
    figure, axes = pyplot().subplots(figsize=(7.5, 5.5))
    for name, shown in NAMES.items():
        points = _curve(by_setting(rows), name)
        if points:
            axes.plot([p.compute for p in points], [p.psnr for p in points], "o-", label=shown)
    label(axes, "share of the dense attention FLOPs", rows)
    save(figure, path)


def plot_time(path: Path, rows: Sequence[RunRow]) -> None:
    """Draw a line from each published preset to our default at the preset's compute."""
    figure, axes = pyplot().subplots(figsize=(6.5, 4.2))
    runs = by_setting(rows)
    dense = {row.steps: row.run_s for row in rows if row.setting == "dense"}
    for name in (name for name in runs if name.endswith(PUBLISHED)):
        preset = name.removesuffix(PUBLISHED)
        pair = [runs[each] for each in (name, f"default = {preset}") if each in runs]
        x = [found[0].run_s / dense[found[0].steps] for found in pair]
        y = [mean(row.psnr for row in found) for found in pair]
        (line,) = axes.plot(x, y, "-", alpha=0.4)
        axes.plot(x[:1], y[:1], "o", color=line.get_color(), label=f"{preset} as published")
        axes.plot(x[1:], y[1:], "*", markersize=12, color=line.get_color(), label="our default at its compute")
    label(axes, "sampling time, share of the dense run's", rows)
    save(figure, path)
