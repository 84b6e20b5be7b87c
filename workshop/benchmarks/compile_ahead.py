"""Compiles the Triton kernels of all methods in advance, in several processes that share Triton's cache on disk.

A run needs dozens of kernels, each taking one core several seconds. Most do not depend on the length; those that do
(choosing levels, flex_attention) are compiled when needed.
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
    """Run this command line again in several processes, each with its part of the methods, for at most `seconds`."""
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
        print("compiling ahead is taking too long; continuing without it", flush=True)
    finally:
        for process in running:
            process.kill()
            process.wait()


def compile_part(chosen: Mapping[int, Sequence[Method]], part: str) -> None:
    """Call every n-th method of each head size once, on a short video; `part` is `number/n`."""
    number, count = map(int, part.split("/"))
    jobs = [(dim, method) for dim, several in chosen.items() for method in several if method.name != "flex-attention"]
    for dim, method in jobs[number::count]:
        # Whatever fails here fails again when it is measured, and is reported then.
        with contextlib.suppress(Exception):
            call, _ = method.make(*smooth_qkv(2, GRID, dim, method.dtype or torch.bfloat16, "cuda"), GRID)
            call()
    torch.cuda.synchronize()
