"""What an attention call leaves for the same call of a later step: the levels that it chose, and its centroids."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable

from ..kernels.attention import AttentionResult
from ..kernels.levels import BlockLists
from ..kernels.semantic import Centroids

_FORGOTTEN_AFTER = 2
"""Steps after which what no call has asked for is dropped: windows that move on never come again."""


@dataclasses.dataclass
class _Entry:
    step: int
    calls: int
    lists: BlockLists | None
    centroids: Centroids | None


class Kept:
    """By the place of a call: which block, of which prompts, of which part of the video.

    Levels serve `reuse_steps` calls, the one that chose them included, and no more than so many steps: a sampler may
    ask several times in a step, a cache may leave steps out.
    """

    def __init__(self, reuse_steps: int) -> None:
        self.reuse_steps = reuse_steps
        self._step = 0
        self._entries: dict[Hashable, _Entry] = {}

    def next_step(self) -> None:
        """A step begins: drop what is too old to be of use."""
        self._step += 1
        for place, entry in list(self._entries.items()):
            age = self._step - entry.step
            if age >= self.reuse_steps or entry.calls >= self.reuse_steps:
                entry.lists = None
            if entry.lists is None and (entry.centroids is None or age > _FORGOTTEN_AFTER):
                del self._entries[place]

    def lists(self, place: Hashable) -> BlockLists | None:
        """The levels that the call at `place` is to use; None where it has to choose."""
        entry = self._entries.get(place)
        if entry is None or entry.calls >= self.reuse_steps:
            return None
        return entry.lists

    def centroids(self, place: Hashable) -> Centroids | None:
        """Where k-means goes on, in orders that follow the data."""
        entry = self._entries.get(place)
        return None if entry is None else entry.centroids

    def put(self, place: Hashable, result: AttentionResult, reused: bool) -> None:
        """The call at `place` has been computed, with the levels that were kept or with new ones."""
        entry = self._entries.get(place)
        if reused and entry is not None:
            entry.calls += 1
            return
        lists = result.lists if self.reuse_steps > 1 else None
        if lists is not None or result.centroids is not None:
            self._entries[place] = _Entry(self._step, 1, lists, result.centroids)

    def clear(self) -> None:
        """Forget all, where memory is short or the calls are cut otherwise from now on."""
        self._entries.clear()
