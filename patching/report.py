"""The report of a sampling run: plain numbers, ready for JSON. Nothing is measured here.

Fields: backend, preset, target_sparsity, mean_sparsity, grid, steps (index, sigma, seconds, sparsity or null for a
dense step, sparse_calls, dense_calls), layers (block index -> mean sparsity), fallbacks (reason, calls), level_map
(pooling factors of one block's first head and the share of its resolution at which each token was seen).
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch

from ..kernels.density import pair_cost
from ..kernels.order import TokenLayout
from .run import LevelMap, Run


def make_report(run: Run) -> dict[str, Any]:
    """Read the run's figures from the device, once, and put them into a dictionary."""
    config = run.settings.config
    calls = [(step, block, density) for step in run.steps for block, density in step.densities]
    values = (1 - torch.stack([density for _, _, density in calls]).cpu()).tolist() if calls else []
    by_step: dict[int, list[float]] = defaultdict(list)
    by_layer: dict[int, list[float]] = defaultdict(list)
    for (step, block, _), value in zip(calls, values, strict=True):
        by_step[id(step)].append(value)
        by_layer[block].append(value)
    level_map = None
    if run.level_map is not None:
        level_map = {
            "step": run.level_map.step,
            "block": run.level_map.block,
            "head": 0,
            "block_q": config.block_q,
            "block_kv": config.block_kv,
            "order": config.order,
            "factors": run.level_map.factors.cpu().tolist(),
            "token_levels": _token_levels(run.level_map, run.layout, config.block_kv),
        }
    return {
        "backend": run.backend,
        "preset": run.settings.preset,
        "mode": config.mode,
        "target_sparsity": config.sparsity,
        "mean_sparsity": _mean(values),
        "grid": list(run.layout.grid) if run.layout else None,
        "steps": [
            {
                "index": step.index,
                "sigma": step.sigma,
                "seconds": round(step.seconds, 4),
                "sparsity": _mean(by_step[id(step)]),
                "sparse_calls": len(step.densities),
                "dense_calls": step.dense_calls,
            }
            for step in run.steps
        ],
        "layers": {str(block): _mean(by_layer[block]) for block in sorted(by_layer)},
        "fallbacks": [{"reason": reason, "calls": count} for reason, count in run.fallbacks.items()],
        "level_map": level_map,
    }


def _token_levels(level_map: LevelMap, layout: TokenLayout, block_kv: int) -> list[float]:
    """Share of its resolution (0..1) at which each video token was seen, mean over query blocks: raster order."""
    per_block = pair_cost(level_map.factors).mean(0)
    per_token = per_block.repeat_interleave(block_kv)[: layout.video]
    inverse = level_map.order.inverse
    return (per_token if inverse is None else per_token[inverse]).cpu().tolist()


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None
