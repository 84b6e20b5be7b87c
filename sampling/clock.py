"""Seconds of attention calls without waiting for the device: events on a GPU, the host's clock on a CPU."""

from __future__ import annotations

import time

import torch


class Clock:
    """Sums the time between `start` and `stop`; on devices other than CUDA (and ROCm) and the CPU it stays silent."""

    def __init__(self, device: torch.device | str = "meta") -> None:
        self._kind = torch.device(device).type
        self._started: object = None
        self._spans: list[tuple] = []

    def start(self) -> None:
        """A call begins; a start without a stop is forgotten at the next one."""
        self._started = self._now()

    def stop(self) -> None:
        """The call that began last has been handed to the device."""
        if self._started is not None:
            self._spans.append((self._started, self._now()))
            self._started = None

    def take(self) -> float | None:
        """Seconds since the last `take`; None without any call. On a GPU it waits for the last one."""
        spans, self._spans = self._spans, []
        if not spans:
            return None
        if self._kind == "cuda":
            spans[-1][1].synchronize()
            return sum(start.elapsed_time(end) for start, end in spans) / 1000
        return sum(end - start for start, end in spans)

    def _now(self) -> object:
        if self._kind == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            return event
        return time.perf_counter() if self._kind == "cpu" else None
