"""How far a run is when the transformer is called, according to the scheduler of the pipeline that runs it.

A transformer is not told who calls it. What was true when PSA was applied may not be true in a run: schedulers get
replaced, and pipelines share a transformer. So the scheduler is looked up in every call.
"""

from __future__ import annotations

import dataclasses
import math
import sys
import weakref
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch


@dataclasses.dataclass(frozen=True)
class Steps:
    """Where a call is among the steps of its run.

    Attributes:
        source: the scheduler's own list, a new object for every run.
        timesteps: of the steps of this run, falling. dense: how many of the first stay dense. now: the one of the call.
        bar: a reference to the progress bar of the pipeline's call, see `running_call`.
    """

    source: object
    timesteps: list[float]
    dense: int
    now: float
    bar: Callable[[], Any | None]

    def go_on_from(self, before: Steps) -> bool:
        """Whether this call can be of the same run as the one before."""
        return self.source is before.source and self.now <= before.now


class Schedule:
    """The steps of the run that a call belongs to: which of them stay dense."""

    def __init__(self, pipe: Any, warm_up: float | int) -> None:
        """pipe: where to look for the scheduler if no pipeline is running, for example in a user's own loop.
        warm_up: how many of the first steps stay dense, a share (a float) or a number (an int)."""
        self.warm_up = warm_up
        self._pipe = _reference(pipe)

    def find(self, timestep: torch.Tensor | float) -> Steps | None:
        """The steps of the run, and the one that a call at `timestep` belongs to; None if no scheduler is known.

        Steps are the scheduler's distinct timesteps; some schedulers evaluate one of them twice. Of a video that is
        changed (`strength`), a pipeline leaves out the first, so its own list counts if it has one. The call belongs to
        the nearest step, because a model's own type may lose half the numbers between. Reads from the device.
        """
        running = running_call()
        timesteps = getattr(getattr(running.pipe or self._pipe(), "scheduler", None), "timesteps", None)
        if timesteps is None:
            return None
        steps = _distinct(timesteps)
        if isinstance(running.timesteps, torch.Tensor) and running.timesteps.numel():
            own = _distinct(running.timesteps)
            steps = own if own <= steps else steps
        listed = sorted(steps, reverse=True)
        # Wan2.2 5B has one timestep per token, zero for tokens of a given image.
        now = float(torch.as_tensor(timestep).max())
        dense = self.warm_up if isinstance(self.warm_up, int) else self.warm_up * len(listed)
        nearest = min(listed, key=lambda other: abs(other - now))
        return Steps(timesteps, listed, math.ceil(dense - 1e-6), nearest, _reference(running.bar))

    def __getstate__(self) -> dict[str, Any]:
        # A copy belongs to other pipelines, which are found when they run.
        return {"warm_up": self.warm_up, "_pipe": _nothing}


@dataclasses.dataclass(frozen=True)
class RunningCall:
    """The call of a pipeline that this thread is in; None for what there is not.

    Attributes:
        pipe: the pipeline.
        bar: its progress bar. It is made by the call and for it alone, so it is gone when the call has ended, however
            it ended.
        timesteps: what the call itself names so.
    """

    pipe: Any = None
    bar: Any = None
    timesteps: Any = None


def running_call() -> RunningCall:
    """The innermost call of this thread that is of a pipeline: a `__call__` that knows an object with a scheduler.

    Only such frames are read. Up to Python 3.12, what a frame holds when it is read stays alive until the frame ends,
    and a script that frees a model between two stages must be able to.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "__call__":
            known = frame.f_locals
            for value in known.values():
                parts = getattr(value, "__dict__", None) or {}
                if hasattr(parts.get("scheduler"), "timesteps"):
                    return RunningCall(value, known.get("progress_bar"), known.get("timesteps"))
        frame = frame.f_back
    return RunningCall()


def _distinct(timesteps: Any) -> set[float]:
    return set(torch.as_tensor(timesteps).cpu().double().tolist())


def _reference(thing: Any) -> Callable[[], Any | None]:
    """A reference that does not keep a pipeline (and its text encoder) or a progress bar alive, if the object allows
    that."""
    try:
        return weakref.ref(thing)
    except TypeError:
        return lambda: thing


def _nothing() -> None:
    return None
