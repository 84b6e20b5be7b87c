"""Times attention calls without waiting for the device: with events on a GPU, with the host's clock on a CPU."""

from __future__ import annotations

import time

import torch


class Clock:
    """Adds up the time between `start` and `stop`. Measures on CUDA, ROCm and the CPU; other devices get no figures."""

    def __init__(self, device: torch.device | str = "meta") -> None:
        self._kind = torch.device(device).type
        self._started: object = None
        self._spans: list[tuple] = []

    def start(self) -> None:
        """A call begins; a start without a stop is dropped at the next start."""
        self._started = self._now()

    def stop(self) -> None:
        """The latest call has been handed to the device."""
        if self._started is not None:
            self._spans.append((self._started, self._now()))
            self._started = None

    def take(self) -> float | None:
        """Seconds of the calls since the last `take`; None if there were none. On a GPU it waits for the last call."""
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
