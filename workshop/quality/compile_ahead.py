"""Triton kernels of all settings compiled beforehand, by several processes that share Triton's cache on disk.

A list of a hundred settings needs dozens of kernels, each some seconds of one core. Not needed on a CPU.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from ..training.wan_dit import HEAD_WIDTH
from .attention import SparseAttention
from .setting import Schedule, Setting, resolve


def start(arguments: Sequence[str], workers: int | None = None) -> list[subprocess.Popen]:
    """Start the workers: this command line again, each with a part of the list. Wait for them with `finish`."""
    workers = workers or max(1, min(12, (os.cpu_count() or 2) - 2))
    script = Path(__file__).with_name("run.py")
    return [
        subprocess.Popen([sys.executable, str(script), *arguments, "--compile-part", f"{part}/{workers}"])
        for part in range(workers)
    ]


def finish(workers: Sequence[subprocess.Popen], seconds: float) -> None:
    """Wait for the workers, at most `seconds` in all; what they have not compiled is compiled when it is needed."""
    try:
        for worker in workers:
            worker.wait(seconds)
    except subprocess.TimeoutExpired:
        print("compiling ahead takes too long; going on without")
    finally:
        for worker in workers:
            worker.kill()


def compile_part(
    settings: Sequence[Setting],
    part: str,
    schedule: Schedule,
    grid: tuple[int, int, int],
    rows: int,
    heads: int,
    backend: str,
    dtype: torch.dtype,
) -> None:
    """One attention call of every n-th different kernel setting on random data of the model's type.

    rows: of the model's batch, those of the empty prompt too.
    """
    number, count = map(int, part.split("/"))
    different: dict[str, Setting] = {}
    for setting in settings:
        node = {k: v for k, v in setting.node.items() if k not in ("sparsity", "start_percent", "end_percent")}
        kind = f"{sorted(node.items())} {sorted(setting.config.items())} {setting.prototype.get('static')}"
        kind += " ".join(name for name in ("reuse", "rank", "sol") if name in setting.prototype)
        different.setdefault(kind, setting)
    tokens = grid[0] * grid[1] * grid[2]
    # The model's strides: heads beside one another in a token.
    q, k, v = torch.randn(3, rows, tokens, heads, HEAD_WIDTH, device="cuda", dtype=dtype).transpose(2, 3).unbind(0)
    for setting in list(different.values())[number::count]:
        # What fails here fails again, and is reported, when it is measured.
        with contextlib.suppress(Exception):
            compute = MATCHED if setting.match else setting.compute
            settings = resolve(setting, schedule, backend, compute)
            attention = SparseAttention(settings, schedule, grid, setting.prototype)
            for step in range(len(schedule.sigmas) - 3, len(schedule.sigmas)):
                attention.begin_step(step)
                attention(q, k, v)


MATCHED = 0.4
"""Any compute: the kernels do not depend on it."""
