"""Measures what one model call loses: the error of the velocity against dense, on noisy latents from a dense run.

Whole runs diverge by chance, and vary by decibels from clip to clip; single calls do not. They are cheap and not very
noisy, so similar settings are compared here first and confirmed by whole runs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch

from ..table import write_records
from .attention import SparseAttention
from .demo_model import Attention, Clip, DemoModel, DenseAttention, Video, simple_schedule
from .setting import Setting, resolve

STEPS, MEASURED = 10, (3, 5, 8)
"""Number of steps of the dense run, and which of them are measured."""
FILE = "velocity.csv"


@dataclasses.dataclass
class VelocityRow:
    """One setting, one scene, one noise level."""

    setting: str
    clip: str
    sigma: float
    sparsity: float
    """Sparsity of this call."""
    error: float
    """Relative L2 error of the velocity."""
    seconds: float
    """Duration of the model call, see `DemoModel.clock`."""
    model: str = ""
    machine: str = ""
    precision: str = ""
    date: str = ""


def measure_velocity(
    model: DemoModel,
    clips: Sequence[Clip],
    video: Video,
    settings: Sequence[Setting],
    backend: str,
    facts: Mapping[str, str],
    folder: Path,
    say: Callable[[str], None],
) -> list[VelocityRow]:
    """Measure every setting at its node's sparsity, write `velocity.csv` into the folder and return the rows."""
    schedule = simple_schedule(STEPS, model.blocks)
    velocity_of = {clip: model.velocity_of([clip], video) for clip in clips}

    def call(x: torch.Tensor, step: int, clip: Clip, attention: Attention) -> torch.Tensor:
        attention.begin_step(step)
        return velocity_of[clip](x, schedule.sigmas[step], attention)

    truth = []
    for clip in clips:
        latents = model.sample([clip], video, schedule, DenseAttention()).latents
        truth += [(clip, n, latents[n - 1], call(latents[n - 1], n, clip, DenseAttention())) for n in MEASURED]
        say(f"dense: {clip.name}")
    rows = []
    for setting in settings:
        resolved = resolve(setting, schedule, backend, None)
        for clip, step, x, velocity in truth:
            attention = SparseAttention(resolved, schedule, video.grid, setting.prototype)
            began = model.clock()
            found = call(x, step, clip, attention)
            seconds = model.clock() - began
            error = float((found - velocity).norm() / velocity.norm())
            sparsity = 1 - attention.step_densities()[-1]
            rows.append(VelocityRow(setting.name, clip.name, schedule.sigmas[step], sparsity, error, seconds, **facts))
        say(f"{setting.name}: error of the velocity {mean_error(rows, setting.name):.4f}")
        write_records(folder / FILE, VelocityRow, rows)
    return rows


def mean_error(rows: Iterable[VelocityRow], setting: str) -> float:
    """A setting's mean error over scenes and noise levels."""
    errors = [row.error for row in rows if row.setting == setting]
    return sum(errors) / len(errors)
