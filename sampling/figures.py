"""The report of a sampling run: plain numbers, ready for JSON. Nothing is measured here.

Fields: backend, preset, target_sparsity, mean_sparsity (of the sparse calls), saved (share of the whole run's
self-attention, including its dense steps and calls), grid (of the largest part of the video that was computed in one
piece), grids (for every part: grid, sparse_calls, mean sparsity), steps (index, sigma, kind: see `record.KINDS`,
seconds, sparsity or null if nothing was sparse, sparse_calls, dense_calls, corrected_calls: how many of the sparse ones
were corrected, learned_calls: how many of the dense ones measured what PSA would lose, attention_seconds of its sparse
calls, layers: one sparsity per block), layers (block index -> mean sparsity), shares (pooling factor -> mean share of
the block pairs), coverage, pays (dense, sparse: median seconds of steps that can be compared, times: how many times as
fast the sparse ones were, why: why that is less than 1.1 times, or null; null if no steps can be compared), time
(seconds of dense, of sparse and of all other steps, and of PSA's attention), fallbacks (reason, calls), correction
(size, where: GPU, CPU or host memory, bytes: the most that were held, corrected_calls, learned_calls, without_room: how
many losses could not be kept, reason: why there was none or why it ended; null if it is off), notes (sentences about
the run as a whole), dense (why nothing was sparse and what to do, or null), level_map (pooling factors of one block's
first head, every stride-th row and column, and the share of its resolution at which each token was seen).
"""

from __future__ import annotations

import math
import statistics
from collections import Counter, defaultdict
from typing import Any

import torch

from ..kernels.config import PyramidConfig
from ..kernels.density import coverage_of, level_shares, pair_cost
from .findings import NONE_ACTIVE, why_dense
from .pays import how_it_pays, pays
from .record import DENSE, KINDS, SPARSE, UNSEEN, LevelMap, Record, Step
from .run import Run

MOST_PAIRS = 65536


def make_report(run: Run) -> dict[str, Any]:
    """Read the run's figures from the device, once, and put them in a dictionary."""
    config, record = run.settings.config, run.record
    calls = [
        (step, block, grid, density)
        for step in record.steps
        for (block, density), grid in zip(step.work, [*step.grids, *step.grids[-1:] * len(step.learned)], strict=False)
    ]
    sparse_grids = Counter(grid for step in record.steps for grid in step.grids)
    values = (1 - torch.stack([density for *_, density in calls]).cpu()).tolist() if calls else []
    by_step: dict[int, list[float]] = defaultdict(list)
    by_layer: dict[int, list[float]] = defaultdict(list)
    by_both: dict[int, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    by_grid: dict[tuple[int, ...], list[float]] = defaultdict(list)
    for (step, block, grid, _), value in zip(calls, values, strict=True):
        by_step[id(step)].append(value)
        by_layer[block].append(value)
        if value >= 0:  # the others were dense, to renew what they lose
            by_both[id(step)][block].append(value)
        by_grid[grid].append(value)
    layouts = sorted(record.layouts, key=lambda layout: -layout.video)
    shares = mean_shares(record)
    return {
        "backend": record.backend,
        "preset": run.settings.preset,
        "mode": config.mode,
        "target_sparsity": config.sparsity,
        "mean_sparsity": _mean(values),
        "saved": share_saved(record.steps, sum(values) - _learning_cost(record.steps)),
        "shares": None if shares is None else {str(factor): share for factor, share in shares.items()},
        "coverage": None if shares is None else coverage_of(shares),
        "pays": pays(record),
        "time": _time(record.steps),
        "grid": list(layouts[0].grid) if layouts else None,
        "grids": [
            {"grid": list(grid), "sparse_calls": sparse_grids[grid], "sparsity": _mean(by_grid[grid])}
            for grid in dict.fromkeys(layout.grid for layout in layouts)
        ],
        "steps": [
            {
                "index": step.index,
                "sigma": step.sigma,
                "kind": step.kind,
                "seconds": round(step.seconds, 4),
                "sparsity": _mean(by_step[id(step)]),
                "sparse_calls": len(step.densities),
                "dense_calls": step.dense_calls,
                "corrected_calls": step.corrected,
                "learned_calls": len(step.learned),
                "attention_seconds": None if step.attention is None else round(step.attention, 4),
                "layers": {str(block): _mean(found) for block, found in sorted(by_both[id(step)].items())},
            }
            for step in record.steps
        ],
        "layers": {str(block): _mean(by_layer[block]) for block in sorted(by_layer)},
        "fallbacks": [{"reason": reason, "calls": count} for reason, count in record.fallbacks.items()],
        "correction": _correction(run),
        "notes": list(record.notes),
        "dense": why_dense(run),
        "level_map": None if record.level_map is None else _level_map(record.level_map, config),
    }


def summary(report: dict[str, Any]) -> str:
    """One sentence about a run for the log, with the median times of its sparse and dense steps."""
    seconds, count = median_seconds(report), Counter(step["kind"] for step in report["steps"])
    sparse = count[SPARSE]
    text = f"{sparse} of {len(report['steps'])} steps sparse"
    if sparse:
        text += f" at {report['mean_sparsity']:.2f} ({report['backend']}), {seconds[SPARSE]:.2f} s each"
    correction = report["correction"]
    if correction is not None and correction["corrected_calls"]:
        text += f", {_share(correction['corrected_calls'], report)} corrected ({correction['size']})"
    others = [f"{count[kind]} {kind}" for kind in KINDS if count[kind] and kind not in (SPARSE, DENSE)]
    if sparse and count[DENSE]:
        others.insert(0, f"the dense ones {seconds[DENSE]:.2f} s")
    if report.get("pays") is not None:
        others.insert(1, how_it_pays(report["pays"]))
    if not sparse and not others and not report["fallbacks"] and not report["notes"]:
        return f"{text}: {NONE_ACTIVE}"
    return "; ".join([text, *others])


def _share(calls: int, report: dict[str, Any]) -> str:
    whole = sum(step["sparse_calls"] for step in report["steps"])
    return "all" if calls == whole else f"{calls / whole:.0%} of the calls"


def median_seconds(report: dict[str, Any]) -> dict[str, float]:
    """Kind of step -> median seconds of its steps, for the kinds that occurred. If sparse and dense steps can be
    compared, these are the ones that can."""
    seconds: dict[str, list[float]] = defaultdict(list)
    for step in report["steps"]:
        seconds[step["kind"]].append(step["seconds"])
    medians = {kind: statistics.median(values) for kind, values in seconds.items()}
    return medians | {kind: report["pays"][kind] for kind in (DENSE, SPARSE) if report.get("pays") is not None}


def share_saved(steps: list[Step], saved: float) -> float:
    """Share of a run's self-attention that was not computed: `saved`, in calls, out of all calls, sparse and dense.

    A step whose attention bypassed PSA counts as many calls as the other steps have on average; a step that a cache
    answered counts none.
    """
    calls = [len(step.densities) + step.dense_calls for step in steps if step.reached]
    unseen = sum(step.kind == UNSEEN for step in steps)
    return saved / (sum(calls) + unseen * statistics.mean(calls)) if calls else 0.0


def _learning_cost(steps: list[Step]) -> float:
    """What measuring the losses cost in steps without sparse calls, in dense calls; see `Step.work` for the others."""
    learned = [density for step in steps for _, density in step.learned if not step.densities]
    return float(torch.stack(learned).sum()) if learned else 0.0


def _correction(run: Run) -> dict[str, Any] | None:
    losses = run.losses
    if losses.settings is None:
        return None
    return {
        "size": losses.size,
        "where": losses.where or None,
        "bytes": losses.most,
        "corrected_calls": sum(step.corrected for step in run.record.steps),
        "learned_calls": sum(len(step.learned) for step in run.record.steps),
        "without_room": losses.without_room,
        "reason": losses.reason,
    }


def mean_shares(record: Record) -> dict[int, float] | None:
    """Pooling factor -> its share of the block pairs, mean over all sparse calls; None if there were none."""
    ends = [ends for step in record.steps for ends in step.level_ends]
    if not ends:
        return None
    return level_shares(record.levels, torch.stack(ends).mean(0).tolist())


def _time(steps: list[Step]) -> dict[str, float | None]:
    """Seconds; attention is only that of the sparse calls, None if the device has no clock for them."""
    seconds = {"dense_steps": 0.0, "sparse_steps": 0.0, "other_steps": 0.0}
    for step in steps:
        seconds[f"{step.kind if step.kind in (SPARSE, DENSE) else 'other'}_steps"] += step.seconds
    clocked = [step.attention for step in steps if step.kind == SPARSE and step.attention is not None]
    return {
        **{name: round(value, 4) for name, value in seconds.items()},
        "sparse_attention": round(sum(clocked), 4) if clocked else None,
    }


def _level_map(level_map: LevelMap, config: PyramidConfig) -> dict[str, Any]:
    # At 720p there are half a million pairs; the page and the log of a prompt do not need all of them.
    stride = max(1, math.ceil((level_map.factors.numel() / MOST_PAIRS) ** 0.5))
    return {
        "step": level_map.step,
        "grid": list(level_map.layout.grid),
        "block": level_map.block,
        "head": 0,
        "block_q": config.block_q,
        "block_kv": config.block_kv,
        "order": config.order,
        "stride": stride,
        "factors": level_map.factors[::stride, ::stride].cpu().tolist(),
        "token_levels": _token_levels(level_map, config.block_kv),
    }


def _token_levels(level_map: LevelMap, block_kv: int) -> list[float]:
    """Share of its resolution (0..1) at which each video token was seen, mean over query blocks, in raster order."""
    per_block = pair_cost(level_map.factors).mean(0)
    per_token = per_block.repeat_interleave(block_kv)[: level_map.layout.video]
    inverse = level_map.order.inverse
    return [round(level, 4) for level in (per_token if inverse is None else per_token[inverse]).tolist()]


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None
