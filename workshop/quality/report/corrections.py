"""The correction, on every model that it was measured on, and the ways to correct that were tried."""

from __future__ import annotations

from collections.abc import Iterable
from statistics import mean, stdev

from ...table import read_records
from ..results import RunRow
from ..summary import by_setting, difference
from .parts import RESULTS, Runs, error_of

CORRECTIONS, TRIES = "quality-corrections*-gpu.csv", "quality-tries*-gpu.csv"
MAIN = {"uncorrected": "no correction", "default": "our default", "eighth": "an eighth of the memory"}

Group = tuple[str, str, int]
"""Model, precision and steps."""


def read_groups(pattern: str) -> dict[Group, Runs]:
    """Runs by model, precision and steps, from all files in `workshop/results/` with such a name; the small model
    first, then more steps."""
    rows: dict[Group, list[RunRow]] = {}
    for path in sorted(RESULTS.glob(pattern)):
        for row in read_records(path, RunRow):
            rows.setdefault((row.model, row.precision.split(",")[0], row.steps or 0), []).append(row)
    return {group: by_setting(rows[group]) for group in sorted(rows, key=lambda g: (g[0], g[1], -g[2]))}


def title_of(group: Group, runs: Runs) -> str:
    """A group in words."""
    model, precision, steps = group
    clips = len({row.clip for rows in runs.values() for row in rows})
    return f"{model}, {precision}, {steps} steps, {clips} clips"


def corrections_section() -> str:
    """Our default with and without its correction, side by side, and what else it might be."""
    groups = read_groups(CORRECTIONS)
    text = [
        "## What is lost is given back",
        "What PSA lost in the last dense step is kept for every block and prompt, and added back in the sparse steps\n"
        "(`kernels/delta.py`). Mean PSNR in dB over the clips ± their standard deviation, and the worst clip, by\n"
        "share of compute; the calls that measure what is lost are counted.",
    ]
    if not groups:
        return "\n\n".join([*text, _missing("--corrections")])
    for group, runs in groups.items():
        text.append(_table(title_of(group, runs), runs, MAIN))
    text += _precisions(groups)
    text.append("What else the correction might be: mean PSNR, and the worst clip.")
    for group, runs in groups.items():
        others = {name: name for name in _names(runs) if name not in MAIN}
        if others:
            text.append(_table(title_of(group, runs), runs, others, spread=False))
    return "\n\n".join(text)


def tries_section() -> str:
    """Ways to correct that the product does not have, each minus our default."""
    groups = read_groups(TRIES)
    text = [
        "### Tried, and not in the product",
        "Each takes the same counted compute as our default, what it measures besides included. *By hand* is our\n"
        "default written again, from which the others differ in one thing: merging what is lost by log-sum-exp\n"
        "instead of adding it, a gamma for every head from two steps that learn, renewing the blocks that drifted\n"
        "most, and choosing levels again for the rows whose levels changed most (`workshop/quality/tries.py`). PSNR\n"
        "minus that of our default ± its standard error, and the difference of the worst clips.",
    ]
    if not groups:
        return "\n\n".join([*text, _missing("--tries")])
    for group, runs in groups.items():
        computes = _computes(runs)
        lines = _header(title_of(group, runs), computes)
        for name in _names(runs):
            cells = [_gain(runs, f"{name} @ {c}", f"default @ {c}") for c in computes]
            if name != "default" and any(cells):
                lines.append(f"| {name} | " + " | ".join(cells) + " |")
        text.append("\n".join(lines))
    return "\n\n".join(text)


def _missing(flag: str) -> str:
    return f"Not measured yet: `python dev.py quality {flag}` on a GPU."


def _names(runs: Runs) -> list[str]:
    return list(dict.fromkeys(name.rsplit(" @ ", 1)[0] for name in runs if " @ " in name))


def _computes(runs: Runs) -> list[str]:
    return sorted({name.rsplit(" @ ", 1)[1] for name in runs if " @ " in name})


def _header(title: str, computes: Iterable[str]) -> list[str]:
    cells = [title, *computes]
    return ["| " + " | ".join(cells) + " |", "|---" * len(cells) + "|"]


def _table(title: str, runs: Runs, names: dict[str, str], *, spread: bool = True) -> str:
    computes = [c for c in _computes(runs) if any(f"{name} @ {c}" in runs for name in names)]
    lines = _header(title, computes)
    for name, shown in names.items():
        cells = [_cell(runs.get(f"{name} @ {c}"), spread) for c in computes]
        if any(cells):
            lines.append(f"| {shown} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(rows: list[RunRow] | None, spread: bool) -> str:
    if not rows:
        return ""
    values = [row.psnr for row in rows]
    deviation = f" ± {stdev(values):.1f}" if spread and len(values) > 1 else ""
    return f"{mean(values):.1f}{deviation}, worst {min(values):.1f}"


def _gain(runs: Runs, name: str, default: str) -> str:
    found = difference(runs, name, default)
    if found is None:
        return ""
    worst = min(row.psnr for row in runs[name]) - min(row.psnr for row in runs[default])
    return f"{found.psnr:+.2f}{error_of(found)}, worst {worst:+.1f}"


def _precisions(groups: dict[Group, Runs]) -> list[str]:
    """Float16 minus bfloat16, where both were measured."""
    lines = []
    for (model, precision, steps), runs in groups.items():
        other = groups.get((model, "bf16", steps))
        if precision == "fp16" and other is not None:
            both = [c for c in _computes(runs) if f"default @ {c}" in runs and f"default @ {c}" in other]
            means = ((c, *(mean(row.psnr for row in found[f"default @ {c}"]) for found in (runs, other))) for c in both)
            values = ", ".join(f"{half - usual:+.2f} dB at {c}" for c, half, usual in means)
            lines.append(f"Our default in float16 minus bfloat16, each against its own dense run ({model}): {values}.")
    return lines
