"""Triton kernels of all methods compiled beforehand, by several processes that share Triton's cache on disk.

A run needs dozens of them, each some seconds of one core. Kernels do not depend on the length (those of the levels do,
and flex_attention; they are compiled when they are needed).
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from methods import Method
from synthetic import smooth_qkv

GRID = (8, 32, 32)


def compile_all(arguments: Sequence[str], seconds: float = 120.0) -> None:
    """Run this command line again in several processes, each with a part of the methods; at most `seconds` long."""
    workers = max(1, min(12, (os.cpu_count() or 2) - 2))
    command = [sys.executable, str(Path(__file__).with_name("run.py")), *arguments, "--compile-part"]
    running = [
        subprocess.Popen([*command, f"{part}/{workers}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for part in range(workers)
    ]
    end = time.monotonic() + seconds
    try:
        for process in running:
            process.wait(max(0.0, end - time.monotonic()))
    except subprocess.TimeoutExpired:
        print("compiling ahead takes too long; going on without", flush=True)
    finally:
        for process in running:
            process.kill()
            process.wait()


def compile_part(chosen: Mapping[int, Sequence[Method]], part: str) -> None:
    """One call of every n-th method of each head size on a short video; `part` is `number/n`."""
    number, count = map(int, part.split("/"))
    jobs = [(dim, method) for dim, several in chosen.items() for method in several if method.name != "flex-attention"]
    for dim, method in jobs[number::count]:
        # What fails here fails again, and is reported, when it is measured.
        with contextlib.suppress(Exception):
            call, _ = method.make(*smooth_qkv(2, GRID, dim, method.dtype or torch.bfloat16, "cuda"), GRID)
            call()
    torch.cuda.synchronize()
