"""Seconds of a whole run of a real model, as far as they follow from a run of a small one.

What the small model's run computed (its attention calls by kind, the work in the sparse ones, its model calls) is
priced with times measured on a GPU: of single attention calls at the real model's size (`attention-gpu.csv`), and of a
step of the real model (`model-gpu.csv`). Guidance doubles all of it, for every method alike.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..table import read_rows
from .results import RunRow

RESULTS = Path(__file__).resolve().parents[2] / "workshop" / "results"
CALLS, STEPS = "attention-gpu.csv", "model-gpu.csv"
SIZES = {
    # name: shape of its attention calls, name of its steps, transformer blocks
    "Wan 1.3B": ("wan1.3b-720p", "wan2.1-1.3b", 30),
    "Wan 14B": ("wan14b-720p", "wan2.1-14b", 40),
}
_AUTO = "topk 10/5/0/20 at {}, curve, pooled, no tail"
_KEPT = "topk 10/5/0/20 at 0.85, curve, levels kept, no tail"

Row = Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class Line:
    """Time of a call by its density: milliseconds at a density of 0, and per unit of density."""

    fixed: float
    slope: float

    def plus(self, ms: float) -> Line:
        """A call that takes so much longer at every density."""
        return Line(self.fixed + ms, self.slope)


@dataclasses.dataclass(frozen=True)
class Times:
    """Times of one real model on one GPU.

    Attributes:
        rest: seconds of a step that are not self-attention. dense: ms of a dense call, by the fastest dense attention.
        sparse: a call of PSA; corrected: the same with kept levels and its correction, by size; learning: the call
            that measures what is lost; sol: Sol-Attn. None for what was not measured.
    """

    blocks: int
    rest: float
    dense: float
    sparse: Line
    corrected: Mapping[str, Line]
    learning: Line | None
    sol: Line | None

    def run(self, row: RunRow) -> float | None:
        """Seconds of a run that computes what `row` says; None if a time is missing for it, or a count."""
        if row.steps is None or row.forwards is None or row.compute is None or row.dense_calls is None:
            return None
        setting = json.loads(row.settings) if row.settings else {}
        sparse: Line | None = self.sparse
        if "sol" in setting.get("prototype", {}):
            sparse = self.sol
        elif row.learning_calls:
            size = setting.get("node", {}).get("correction", "full")
            sparse = self.corrected.get("full" if size == "auto" else size)
        if sparse is None or (row.learning_calls and self.learning is None):
            return None
        ms = self.dense * row.dense_calls
        ms += sparse.fixed * (row.sparse_calls or 0) + sparse.slope * (row.compute - row.dense_calls)
        if row.learning_calls and self.learning is not None:
            ms += self.learning.fixed * row.learning_calls
        return row.steps * (self.rest * row.forwards + self.blocks * ms / 1000)


def read_times(size: str, folder: Path = RESULTS) -> Times | None:
    """The times of a model in `SIZES`; None if its calls or its steps were not measured."""
    shape, model, blocks = SIZES[size]
    calls = [row for row in read_rows(folder / CALLS) if row["shape"] == shape]
    ms = {(row["method"], row["precision"], row["setting"]): float(row["ms"]) for row in calls}

    def psa(setting: str, method: str = "psa") -> float | None:
        return ms.get((method, "bfloat16", setting))

    usual = psa(_AUTO.format("0.85"))
    steps = [
        row
        for row in read_rows(folder / STEPS)
        if row["model"] == model
        and row["dtype"] == "bfloat16"
        and row["method"] in ("psa", "psa-corrected")
        and math.isclose(float(row["sparsity"]), 0.85, abs_tol=0.02)
    ]
    dense = [float(row["ms"]) for row in calls if row["setting"] == "dense" and row["precision"] == "bfloat16"]
    if usual is None or not steps or not dense:
        return None
    points = [row for row in calls if row["setting"] in [_AUTO.format(s) for s in ("0.85", "0.9", "0.95")]]
    sparse = _line([row for row in points if row["precision"] == "bfloat16" and row["method"] == "psa"])
    sol = [row for row in calls if row["method"] == "sol-attn" and math.isfinite(float(row["density"]))]
    corrected = {size: psa(f"{_KEPT}, correction {size}", "psa-corrected") for size in ("full", "eighth")}
    learning = psa(f"{_AUTO.format('0.85')}, measures its correction; without the dense call", "psa-learning")
    # The call that the measured step has made.
    call = (corrected["full"] if steps[-1]["method"] == "psa-corrected" else None) or usual
    return Times(
        blocks,
        rest=float(steps[-1]["seconds_per_step"]) - blocks * call / 1000,
        dense=min(dense),
        sparse=sparse,
        corrected={size: sparse.plus(ms - usual) for size, ms in corrected.items() if ms is not None},
        learning=None if learning is None else sparse.plus(learning - usual),
        sol=_line(sol) if len(sol) > 1 else None,
    )


def _line(rows: Sequence[Row]) -> Line:
    """Least squares through the rows' times by density; through the only row and its time if there is one."""
    points = [(float(row["density"]), float(row["ms"])) for row in rows]
    x, y = (sum(values) / len(points) for values in zip(*points, strict=True))
    spread = sum((density - x) ** 2 for density, _ in points)
    slope = sum((density - x) * (ms - y) for density, ms in points) / spread if spread else 0.0
    return Line(y - slope * x, slope)
