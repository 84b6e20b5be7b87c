"""Median times of calls: from device events with the L2 cache flushed on a GPU, or from the clock on a CPU.

The GPU is kept busy until the host has launched the call, as in the middle of a model, so only GPU time is measured.
`host_ms` measures the host; a call takes as long as the slower of the two.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

# Larger than any L2 cache.
_FLUSH_BYTES = 2**28
# Flushes before a call, 0.1 ms each on an H100: together as long as the slowest host we saw took to launch a call.
_FLUSHES = 60


def median_ms(call: Callable[[], object], runs: int, warm_up: int = 1) -> float:
    """Median time of `runs` calls in milliseconds, after `warm_up` uncounted calls."""
    for _ in range(warm_up):
        call()
    cuda = torch.cuda.is_available()
    flush = torch.empty(_FLUSH_BYTES // 4, dtype=torch.int32, device="cuda") if cuda else None
    times = []
    for _ in range(runs):
        if cuda:
            for _ in range(_FLUSHES):
                flush.zero_()
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            call()
            end.record()
            torch.cuda.synchronize()
            times.append(begin.elapsed_time(end))
        else:
            begin = time.perf_counter()
            call()
            times.append(1e3 * (time.perf_counter() - begin))
    return statistics.median(times)


def host_ms(call: Callable[[], object], runs: int) -> float | None:
    """Median milliseconds until a call on an idle GPU returns, before its work is done; None on a CPU."""
    if not torch.cuda.is_available():
        return None
    times = []
    for _ in range(runs):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - begin))
    torch.cuda.synchronize()
    return statistics.median(times)


def extra_mb(call: Callable[[], torch.Tensor]) -> float | None:
    """Peak memory of a call in addition to its inputs and output, in MB (2^20 bytes); None on a CPU."""
    if not torch.cuda.is_available():
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = call()
    torch.cuda.synchronize()
    return round((torch.cuda.max_memory_allocated() - before - out.numel() * out.element_size()) / 2**20, 1)
