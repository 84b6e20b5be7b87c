"""What the next attention call may reuse: levels and centroids of the same call of an earlier step, token orders, in
how many groups of heads calls are computed, and why calls that failed are not tried again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable

import torch

from ..kernels.attention import AttentionResult
from ..kernels.config import PyramidConfig
from ..kernels.levels import BlockLists
from ..kernels.order import TokenOrder, make_order
from ..kernels.semantic import SEMANTIC_ORDERS, Centroids

_FORGOTTEN_AFTER = 2
"""Steps after which what no call has asked for is dropped: windows that move on never come again."""

Grid = tuple[int, int, int]


@dataclasses.dataclass
class _Entry:
    step: int
    calls: int
    lists: BlockLists | None
    centroids: Centroids | None


class Kept:
    """Levels and centroids by the place of a call: which block, of which prompts, of which part of the video.

    Levels serve `reuse_steps` calls, the one that chose them included, and no more than so many steps: a sampler may
    ask several times in a step, a cache may leave steps out.

    Attributes:
        groups: in how many groups of heads a call is computed, more than one where memory is short.
    """

    def __init__(self, reuse_steps: int, refusals: dict[Hashable, str] | None = None) -> None:
        """refusals: those that others share; by default its own."""
        self.reuse_steps = reuse_steps
        self.groups = 1
        self._step = 0
        self._last = False
        self._entries: dict[Hashable, _Entry] = {}
        self._orders: dict[tuple, TokenOrder] = {}
        self._refusals: dict[Hashable, str] = {} if refusals is None else refusals

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
        if self._last:
            self._entries.pop(place, None)
            return
        entry = self._entries.get(place)
        if reused and entry is not None:
            entry.calls += 1
            return
        lists = result.lists if self.reuse_steps > 1 else None
        if lists is not None or result.centroids is not None:
            self._entries[place] = _Entry(self._step, 1, lists, result.centroids)

    def last_step(self) -> None:
        """No step comes after this one, so that a call leaves nothing."""
        self._last = True

    def clear(self) -> None:
        """Forget levels and centroids: their run has ended."""
        self._entries.clear()
        self._last = False

    def split(self, heads: int) -> bool:
        """Memory is short: calls of `heads` heads are computed in more groups from now on; False where each has one
        head already. What was kept is of groups of another size."""
        if self.groups >= heads:
            return False
        self.groups = min(2 * self.groups, heads)
        self._entries.clear()
        return True

    def order(self, config: PyramidConfig, grid: Grid, device: torch.device) -> TokenOrder | None:
        """The token order of a grid on `device`, made once; None for one that follows the data."""
        if config.order in SEMANTIC_ORDERS:
            return None
        key = (grid, device)
        if key not in self._orders:
            self._orders[key] = make_order(config.order, grid, config.tile, device)
        return self._orders[key]

    def only_orders_of(self, grid: Grid) -> None:
        """Drop the token orders of all other grids."""
        self._orders = {key: order for key, order in self._orders.items() if key[0] == grid}

    def refuse(self, case: Hashable, reason: str, sparsity: float | None = None) -> None:
        """Calls like this one stay dense from now on; sparsity: the only one that it is true of, None for all."""
        self._refusals[case, sparsity] = reason

    def refusal(self, case: Hashable, sparsity: float | None) -> str | None:
        """Why such a call is not tried; None where it is."""
        return self._refusals.get((case, None)) or self._refusals.get((case, sparsity))
