"""Compiles the Triton kernels for all settings in advance, in several processes that share Triton's cache on disk.

A list of a hundred settings needs dozens of kernels, each taking one core several seconds. Not needed on a CPU.
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
from .setting import Schedule, Setting, resolve
from .tries import attention_of


def start(arguments: Sequence[str], workers: int | None = None) -> list[subprocess.Popen]:
    """Start the workers: the same command line again, each with its part of the list. Wait for them with `finish`."""
    workers = workers or max(1, min(12, (os.cpu_count() or 2) - 2))
    script = Path(__file__).with_name("run.py")
    return [
        subprocess.Popen([sys.executable, str(script), *arguments, "--compile-part", f"{part}/{workers}"])
        for part in range(workers)
    ]


def finish(workers: Sequence[subprocess.Popen], seconds: float) -> None:
    """Wait at most `seconds` for the workers; kernels they have not compiled by then are compiled when needed."""
    try:
        for worker in workers:
            worker.wait(seconds)
    except subprocess.TimeoutExpired:
        print("compiling ahead is taking too long; continuing without it")
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
    """Run one attention call on random data for each setting in this part that needs different kernels.

    part: "number/count", as `start` passes it; rows: of the model's batch, including those of the empty prompt.
    """
    number, count = map(int, part.split("/"))
    different: dict[str, Setting] = {}
    for setting in settings:
        node = {k: v for k, v in setting.node.items() if k not in ("sparsity", "start_percent", "end_percent")}
        kind = f"{sorted(node.items())} {sorted(setting.config.items())} {setting.prototype.get('static')}"
        kind += " ".join(name for name in ("reuse", "rank", "sol") if name in setting.prototype)
        different.setdefault(kind, setting)
    tokens = grid[0] * grid[1] * grid[2]
    # The model's memory layout: the heads of a token are adjacent.
    q, k, v = torch.randn(3, rows, tokens, heads, HEAD_WIDTH, device="cuda", dtype=dtype).transpose(2, 3).unbind(0)
    for setting in list(different.values())[number::count]:
        # Whatever fails here fails again when it is measured, and is reported then.
        with contextlib.suppress(Exception):
            compute = MATCHED if setting.match else setting.compute
            settings = resolve(setting, schedule, backend, compute)
            attention = attention_of(settings, schedule, grid, setting.prototype)
            for step in range(len(schedule.sigmas) - 3, len(schedule.sigmas)):
                attention.begin_step(step)
                attention(q, k, v)


MATCHED = 0.4
"""An arbitrary compute: the kernels do not depend on it."""
