"""Times of calls: medians from device events with the second-level cache flushed, or from the clock on a CPU.

A GPU is kept busy until the host has launched the call, as it is in the middle of a model: what is measured is the
time of the GPU. What the host needs is `host_ms`; a call is as slow as the slower of the two.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

# More than any second-level cache holds.
_FLUSH_BYTES = 2**28
# Flushes before a call, .1 ms each on an H100: together as long as the slowest host that we saw took to launch a call.
_FLUSHES = 60


def median_ms(call: Callable[[], object], runs: int, warm_up: int = 1) -> float:
    """Median time of `runs` calls in milliseconds, after `warm_up` calls that do not count."""
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
    """Median time in milliseconds until a call on an idle GPU returns, its work not yet done; None on a CPU."""
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
    """Peak memory of a call beyond its inputs and its output, in MB (2^20 bytes); None on a CPU."""
    if not torch.cuda.is_available():
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = call()
    torch.cuda.synchronize()
    return round((torch.cuda.max_memory_allocated() - before - out.numel() * out.element_size()) / 2**20, 1)
