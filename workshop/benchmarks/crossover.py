"""From how many tokens on a whole sparse call is faster than a dense one, by head size: what `min_tokens` should be.

A call takes as long as the slower of the GPU and the host: near the crossover that is often the host. `python dev.py
bench --crossover` prints a table as CSV and one line for every series; an H100 needs less than a minute.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Mapping, Sequence

import torch
from methods import AUTO, AUTO_KEPT, Method, methods
from synthetic import smooth_qkv
from timing import host_ms, median_ms

SERIES = ((64, 48), (128, 12), (128, 40))
"""Head size and number of heads: CogVideoX-5B, Wan 1.3B and Wan 14B."""
GRIDS = [(frames, 16, 32) for frames in (2, 4, 6, 8, 10, 12, 16, 20, 24, 32, 48)]
"""1024 to 24576 tokens."""
KINDS = {"dense": "dense", AUTO: "first", f"{AUTO_KEPT}, correction full": "kept"}
"""Setting of a method -> what it is called in the table."""
COLUMNS = ("gpu", "torch", "triton", "head_size", "heads", "tokens")
COLUMNS += tuple(f"{kind}_{what}" for kind in KINDS.values() for what in ("ms", "host_ms"))
COLUMNS += ("first_speedup", "kept_speedup")


def crossover_methods(dim: int, cuda: bool) -> list[Method]:
    """Dense attention, a first call at 0.85, and one with kept levels and a correction."""
    found: dict[str, Method] = {}
    for method in methods(dim, cuda, full=False):
        if method.setting in KINDS and method.dtype is None:
            found.setdefault(method.setting, method)
    return list(found.values())


def print_crossover(machine: Mapping[str, object], runs: int) -> None:
    """Measure, print the table, and say where each kind of call overtakes dense attention."""
    cuda = torch.cuda.is_available()
    series, grids = (SERIES, GRIDS) if cuda else (((64, 2), (128, 2)), GRIDS[:2])
    writer = csv.DictWriter(sys.stdout, COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for dim, heads in series:
        rows = []
        for grid in grids:
            figures = _measure(dim, heads, grid, runs)
            shape = {"head_size": dim, "heads": heads, "tokens": grid[0] * grid[1] * grid[2]}
            rows.append({**machine, **shape, **figures})
            writer.writerow(rows[-1])
            sys.stdout.flush()
        for kind in ("kept", "first"):
            tokens = overtakes([(row["tokens"], row[f"{kind}_speedup"]) for row in rows])
            found = "at no length that was measured" if tokens is None else f"from {tokens} tokens on"
            print(f"# {heads} heads of {dim}: {kind} calls are faster than dense {found}")


def overtakes(speedups: Sequence[tuple[int, float]]) -> int | None:
    """The fewest tokens from which on every length is faster than dense; None if the longest is not."""
    found = None
    for tokens, speedup in sorted(speedups, reverse=True):
        if speedup <= 1:
            break
        found = tokens
    return found


def _measure(dim: int, heads: int, grid: tuple[int, int, int], runs: int) -> dict[str, float]:
    cuda = torch.cuda.is_available()
    q, k, v = smooth_qkv(heads, grid, dim, torch.bfloat16 if cuda else torch.float32, "cuda" if cuda else "cpu")
    figures: dict[str, float] = {}
    for method in crossover_methods(dim, cuda):
        call, _ = method.make(q, k, v, grid)
        kind = KINDS[method.setting]
        device, host = median_ms(call, runs, warm_up=3), host_ms(call, runs)
        figures[f"{kind}_ms"] = round(device, 3)
        figures[f"{kind}_host_ms"] = round(device if host is None else host, 3)
    slower = {kind: max(figures[f"{kind}_ms"], figures[f"{kind}_host_ms"]) for kind in KINDS.values()}
    return figures | {f"{kind}_speedup": round(slower["dense"] / slower[kind], 3) for kind in ("first", "kept")}
