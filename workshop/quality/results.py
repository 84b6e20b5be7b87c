"""The CSV files of a run: one row per setting and clip, one per setting, clip and step. Written as measured."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path

RUNS, STEPS = "runs.csv", "steps.csv"


@dataclasses.dataclass
class RunRow:
    """One setting on one clip. Compute, density and seconds are those of the batch that the clip was sampled in."""

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
    """JSON: what the setting says."""
    error: str = ""
    model: str = ""
    machine: str = ""
    precision: str = ""
    steps: int | None = None
    clips: int | None = None
    """Clips in the batch."""
    date: str = ""


@dataclasses.dataclass
class StepRow:
    """One setting, one clip, one step."""

    setting: str
    clip: str
    step: int
    sigma: float
    density: float
    """1 in a dense step."""
    latent_error: float


class Writer:
    """Writes rows to `runs.csv` and `steps.csv` of a folder, new files each time, complete after every call."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        for name, kind in ((RUNS, RunRow), (STEPS, StepRow)):
            with (folder / name).open("w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerow([field.name for field in dataclasses.fields(kind)])

    def add(self, runs: Iterable[RunRow], steps: Iterable[StepRow] = ()) -> None:
        """Append rows; figures with six significant digits."""
        for name, rows in ((RUNS, runs), (STEPS, steps)):
            with (self.folder / name).open("a", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows([[_text(v) for v in dataclasses.asdict(row).values()] for row in rows])


def read_runs(folder: Path) -> list[RunRow]:
    """The rows of `runs.csv` of a folder."""
    return read_run_file(folder / RUNS)


def read_run_file(path: Path) -> list[RunRow]:
    """The rows of a file such as `runs.csv`."""
    numbers = ("compute", "density", "warm_up", "psnr", "ssim", "lpips", "flicker", "latent_error")
    numbers += ("dense_step_s", "sparse_step_s", "run_s")
    return [_row(RunRow, entry, numbers, ("steps", "clips")) for entry in _entries(path)]


def read_steps(folder: Path) -> list[StepRow]:
    """The rows of `steps.csv`."""
    return [_row(StepRow, entry, ("sigma", "density", "latent_error"), ("step",)) for entry in _entries(folder / STEPS)]


def _entries(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _row(kind: type, entry: Mapping[str, str], floats: Iterable[str], ints: Iterable[str]):
    values: dict[str, object] = dict(entry)
    for name in floats:
        values[name] = float(entry[name]) if entry[name] else None
    for name in ints:
        values[name] = int(entry[name]) if entry[name] else None
    return kind(**values)


def _text(value: object) -> object:
    return format(value, ".6g") if isinstance(value, float) else "" if value is None else value
