"""Measures what ranking blocks costs: times whole attention calls at the size of real models, ranked in various ways.

Needs a GPU. With `times.csv`, two settings can be compared at equal time, not just at equal compute.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from ...kernels import PyramidConfig, TokenLayout, make_order, pyramid_sparse_attention
from ..benchmarks.timing import median_ms
from ..table import write_records

SHAPES = {"wan1.3b-720p": (12, (18, 45, 80), 128), "wan14b-720p": (40, (18, 45, 80), 128)}
"""Name -> heads, token grid (time, height, width), head size."""
PAPER = {"shares": {1: 0.10, 2: 0.05, 8: 0.20}, "mode": "topk", "order": "curve", "tail": False}
SPARSITIES = (0.85, 0.90)
RUNS = 7
FILE = "times.csv"
WAYS = {
    "pooled, max": {"importance": "pooled", "reduction": "max"},
    "pooled, mean": {"importance": "pooled", "reduction": "mean"},
    **{
        f"1 in {share}, {reduction}": {"importance": "sampled", "sample_share": 1 / share, "reduction": reduction}
        for share in (4, 8, 16)
        for reduction in ("max", "mean")
    },
    "1 in 8, mean, 128/32": {"importance": "sampled", "sample_share": 1 / 8, "reduction": "mean", "block_kv": 32},
}
"""Configuration fields that differ from the paper's recipe."""


@dataclasses.dataclass
class TimeRow:
    """One call: its median time, and that of dense attention on the same tensors."""

    shape: str
    setting: str
    sparsity: float
    ms: float
    dense_ms: float
    machine: str = ""
    date: str = ""


def measure_times(facts: Mapping[str, str], folder: Path, say: Callable[[str], None]) -> list[TimeRow]:
    """Time every way at every shape and write the file. The data is random: in topk mode it does not affect times."""
    rows: list[TimeRow] = []
    for shape, (heads, grid, dim) in SHAPES.items():
        tokens = grid[0] * grid[1] * grid[2]
        q, k, v = torch.randn(3, 1, heads, tokens, dim, device="cuda", dtype=torch.bfloat16).unbind(0)
        order = make_order("curve", grid, device=q.device)
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            dense_ms = median_ms(lambda q=q, k=k, v=v: F.scaled_dot_product_attention(q, k, v), RUNS)
        for name, more in WAYS.items():
            for sparsity in SPARSITIES:
                config = PyramidConfig(
                    shares={1: 0.10, 2: 0.05, 8: 0.20},
                    mode="topk",
                    order="curve",
                    tail=False,
                    sparsity=sparsity,
                    **more,
                )
                ms = median_ms(
                    lambda c=config, q=q, k=k, v=v, o=order, g=grid: pyramid_sparse_attention(
                        q, k, v, c, layout=TokenLayout(g), order=o
                    ),
                    RUNS,
                )
                rows.append(TimeRow(shape, name, sparsity, ms, dense_ms, **facts))
                say(f"{shape}, {name} at {sparsity}: {ms:.2f} ms, dense {dense_ms:.2f} ms")
        write_records(folder / FILE, TimeRow, rows)
    return rows
