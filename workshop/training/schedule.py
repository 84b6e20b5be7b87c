"""Learning-rate schedule tied to the clock: training ends on time on any GPU.

Progress is the share of the time budget that has passed; the rate warms up over steps and falls as a cosine of
progress. Not reproducible to the bit between runs, because the number of steps depends on the machine.
"""

from __future__ import annotations

import math
import time


class ClockSchedule:
    """Progress 0..1 from construction until `deadline` (seconds, as `time.time()` counts)."""

    def __init__(self, deadline: float, warmup_steps: int = 150):
        self.begin = time.time()
        self.deadline = deadline
        self.warmup_steps = warmup_steps

    def progress(self) -> float:
        """Share of the budget that has passed, at most 1."""
        return min(1.0, (time.time() - self.begin) / max(self.deadline - self.begin, 1e-3))

    def factor(self, step: int, progress: float) -> float:
        """Factor 0..1 on the peak learning rate."""
        return min(1.0, (step + 1) / self.warmup_steps) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


class Average:
    """Exponential moving average of a module's trainable parameters, short-sighted in the beginning."""

    def __init__(self, parameters: list, decay: float):
        self.source = parameters
        self.decay = decay
        self.values = [p.detach().clone() for p in parameters]
        self.count = 0

    def update(self) -> None:
        """Take the current values in."""
        import torch

        self.count += 1
        decay = min(self.decay, (1 + self.count) / (10 + self.count))
        torch._foreach_lerp_(self.values, [p.detach() for p in self.source], 1 - decay)

    def swap(self) -> None:
        """Exchange the averaged and the current values; call twice to undo."""
        for parameter, value in zip(self.source, self.values, strict=True):
            kept = parameter.detach().clone()
            parameter.data.copy_(value)
            value.copy_(kept)
