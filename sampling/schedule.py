"""Where a model call is in the sampler's schedule: its step, and how far along the sparse steps are.

A call only tells its noise level. Samplers also evaluate between the levels of their schedule and return to earlier
levels (restarts), and a cache may skip some levels. So we walk along the levels instead of looking them up.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Hashable, Sequence

_CLOSE = 1e-4
"""Relative distance within which two noise levels count as the same."""


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a model call is.

    Attributes:
        step: index of the sampler's step. on_level: whether the call is at the level at which that step begins.
        share: how far along the sparse steps are, from 0 for the first to 1 for the last, with the mean of those that
            belong together; 0.5 for calls between levels, so that the mean over a run is 0.5 whatever the sampler does.
    """

    step: int
    on_level: bool
    share: float = 0.5


class Schedule:
    """Follows the model calls of one sampling run along its noise levels.

    Args:
        levels: noise level at which each step begins; None if the sampler does not say.
        is_sparse: whether a step at a level is sparse.
        together: so many sparse steps in a row belong together, since the first of them chooses for all.
    """

    def __init__(self, levels: Sequence[float] | None, is_sparse: Callable[[float], bool], together: int = 1) -> None:
        self._together = together
        self.levels = list(levels or ())
        self.sparse_steps = [i for i, level in enumerate(self.levels) if is_sparse(level)]
        self._falls = all(a >= b for a, b in zip(self.levels, self.levels[1:], strict=False))
        self._next = 0
        self._sigma: float | None = None
        self._rows: set[Hashable] = set()
        self._place = Place(-1, False)

    def move(self, sigma: float, rows: Collection[Hashable] = ()) -> Place:
        """The place of the next model call, at noise level `sigma`, which computes `rows`.

        Calls in a row at the same level are one evaluation: the prompts of a step, or its windows and areas. If the
        schedule has that level again, its next step begins when a row comes a second time.
        """
        goes_on = self._sigma is not None and _alike(sigma, self._sigma)
        if goes_on and self._comes_again(sigma) and not self._rows.isdisjoint(rows):
            goes_on = False
        if not goes_on:
            self._sigma, self._rows = sigma, set()
            self._place = self._find(sigma)
        self._rows.update(rows)
        return self._place

    def _comes_again(self, sigma: float) -> bool:
        """Whether the next step begins at this level."""
        return self._next < len(self.levels) and _alike(self.levels[self._next], sigma)

    def _find(self, sigma: float) -> Place:
        if not self.levels:
            return Place(self._place.step + 1, False)
        for step in range(self._next, len(self.levels)):
            if _alike(self.levels[step], sigma):
                self._next = step + 1
                return Place(step, True, self._share(step))
        if not self._falls:
            return Place(max(0, self._next - 1), False)
        # A call between two levels belongs to the step that begins at the upper one.
        return Place(max(0, sum(level >= sigma * (1 - _CLOSE) for level in self.levels) - 1), False)

    def _share(self, step: int) -> float:
        if step not in self.sparse_steps or len(self.sparse_steps) < 2:
            return 0.5
        index, last = self.sparse_steps.index(step), len(self.sparse_steps) - 1
        first = index - index % self._together
        return (first + min(first + self._together - 1, last)) / 2 / last


def _alike(one: float, other: float) -> bool:
    return abs(one - other) <= _CLOSE * abs(other)
