"""A learning-rate schedule tied to the clock, so that training ends on time on any GPU, and the average of the weights.

Progress is the share of the time budget used so far; the rate warms up over the first steps, then falls as a cosine of
progress. Runs are not reproducible bit for bit, because the number of steps depends on the machine.
"""

from __future__ import annotations

import itertools
import math
import time

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


class ClockSchedule:
    """Progress 0..1 from construction until `deadline` (in `time.time()` seconds)."""

    def __init__(self, deadline: float, warmup_steps: int = 150):
        self.begin = time.time()
        self.deadline = deadline
        self.warmup_steps = warmup_steps

    def progress(self) -> float:
        """Share of the time budget used so far, at most 1."""
        return min(1.0, (time.time() - self.begin) / max(self.deadline - self.begin, 1e-3))

    def factor(self, step: int, progress: float) -> float:
        """Factor 0..1 on the peak learning rate."""
        return min(1.0, (step + 1) / self.warmup_steps) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


def moving_average(model: torch.nn.Module, decay: float) -> AveragedModel:
    """Exponential moving average of a model's weights, all on one device and of one type; short memory at first."""
    update = itertools.count(2)  # the first one copies

    def average(averaged: list[torch.Tensor], current: list[torch.Tensor], _: torch.Tensor) -> None:
        number = next(update)  # reading the count passed in would wait for the device
        get_ema_multi_avg_fn(min(decay, (1 + number) / (10 + number)))(averaged, current, None)

    return AveragedModel(model, multi_avg_fn=average)
