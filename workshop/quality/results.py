"""The CSV files of a run: one with a row per setting and clip, one with a row per setting, clip and step."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path

from ..table import read_records, write_records

RUNS, STEPS = "runs.csv", "steps.csv"


@dataclasses.dataclass
class RunRow:
    """One setting on one clip. Compute, density and seconds are those of the clip's whole batch."""

    setting: str
    group: str
    clip: str
    compute: float | None = None
    """Attention FLOPs of the run as a share of the dense run's."""
    density: float | None = None
    """Mean over the sparse steps."""
    warm_up: float | None = None
    """Share of steps without any sparse call."""
    psnr: float | None = None
    ssim: float | None = None
    lpips: float | None = None
    flicker: float | None = None
    latent_error: float | None = None
    """Relative L2 error of the last latent."""
    dense_step_s: float | None = None
    sparse_step_s: float | None = None
    run_s: float | None = None
    """Sampling seconds of the batch, model and attention."""
    settings: str = ""
    """The setting as JSON."""
    error: str = ""
    model: str = ""
    machine: str = ""
    precision: str = ""
    steps: int | None = None
    clips: int | None = None
    """Clips in the batch."""
    date: str = ""
    forwards: float | None = None
    """Model calls as a share of the dense run's; the next three: attention calls by kind, see `Calls`."""
    dense_calls: float | None = None
    sparse_calls: float | None = None
    learning_calls: float | None = None


@dataclasses.dataclass
class StepRow:
    """One setting, one clip, one step."""

    setting: str
    clip: str
    step: int
    sigma: float
    density: float
    """1 for a dense step."""
    latent_error: float


class Writer:
    """Writes rows to `runs.csv` and `steps.csv` in a folder. Starts new files; they are complete after every call."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        write_records(folder / RUNS, RunRow, [])
        write_records(folder / STEPS, StepRow, [])

    def add(self, runs: Iterable[RunRow], steps: Iterable[StepRow] = ()) -> None:
        """Append rows."""
        write_records(self.folder / RUNS, RunRow, runs, append=True)
        write_records(self.folder / STEPS, StepRow, steps, append=True)


def read_runs(folder: Path) -> list[RunRow]:
    """The rows of a folder's `runs.csv`."""
    return read_records(folder / RUNS, RunRow)
