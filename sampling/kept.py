"""What the next attention call may reuse: levels and centroids from the same call in an earlier step, and token orders;
also how many groups of heads calls are computed in, and why calls that failed are not tried again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Iterable

import torch

from ..kernels.attention import AttentionResult
from ..kernels.config import PyramidConfig
from ..kernels.levels import BlockLists, listed_blocks
from ..kernels.order import TokenOrder, make_order
from ..kernels.semantic import SEMANTIC_ORDERS, Centroids

_FORGOTTEN_AFTER = 2
"""Steps after which an entry that no call has renewed is dropped: windows that move on never come back."""

Grid = tuple[int, int, int]


@dataclasses.dataclass
class _Entry:
    step: int
    calls: int
    lists: BlockLists | None
    centroids: Centroids | None


class Kept:
    """Levels and centroids by the place of a call: which block, which prompts, which part of the video.

    Levels are used for `reuse_steps` calls, including the one that chose them, and for no more than that many steps: a
    sampler may call the model several times in a step, and a cache may skip steps.

    Attributes:
        groups: how many groups of heads a call is computed in, more than one if memory is short.
    """

    def __init__(self, reuse_steps: int, refusals: dict[Hashable, str] | None = None) -> None:
        """refusals: a dictionary shared with others; by default its own."""
        self.reuse_steps = reuse_steps
        self.groups = 1
        self._step = 0
        self._last = False
        self._entries: dict[Hashable, _Entry] = {}
        self._orders: dict[tuple, TokenOrder] = {}
        self._refusals: dict[Hashable, str] = {} if refusals is None else refusals

    def keeps(self, order: str) -> bool:
        """Whether calls in this token order keep anything at all."""
        return self.reuse_steps > 1 or order in SEMANTIC_ORDERS

    def next_step(self) -> None:
        """A step begins: drop what is too old to be useful."""
        self._step += 1
        for place, entry in list(self._entries.items()):
            age = self._step - entry.step
            if age >= self.reuse_steps or entry.calls >= self.reuse_steps:
                entry.lists = None
            if entry.lists is None and (entry.centroids is None or age > _FORGOTTEN_AFTER):
                del self._entries[place]

    def lists(self, place: Hashable) -> BlockLists | None:
        """The levels that the call at `place` should use; None if it has to choose them."""
        entry = self._entries.get(place)
        if entry is None or entry.calls >= self.reuse_steps:
            return None
        return entry.lists

    def centroids(self, place: Hashable) -> Centroids | None:
        """Where k-means continues from, for orders that follow the data; None if it starts from scratch."""
        entry = self._entries.get(place)
        return None if entry is None else entry.centroids

    def put(self, place: Hashable, result: AttentionResult, config: PyramidConfig, reused: bool) -> None:
        """The call at `place` has been computed with `config`, with kept levels (`reused`) or with new ones."""
        if self._last:
            self._entries.pop(place, None)
            return
        entry = self._entries.get(place)
        if reused and entry is not None:
            entry.calls += 1
            return
        lists = None
        if self.reuse_steps > 1:
            blocks = result.lists.shape[-1]
            lists = result.lists.packed(listed_blocks(blocks, config) or blocks)  # without waiting for the device
        if lists is not None or result.centroids is not None:
            self._entries[place] = _Entry(self._step, 1, lists, result.centroids)

    def last_step(self) -> None:
        """No step comes after this one, so calls keep nothing from now on."""
        self._last = True

    def clear(self) -> None:
        """Forget levels and centroids: their run has ended."""
        self._entries.clear()
        self._last = False

    def split(self, heads: int) -> bool:
        """Memory is short: calls with `heads` heads are computed in more groups from now on; False if every group has
        only one head already. What was kept is dropped, since it belongs to groups of another size."""
        if self.groups >= heads:
            return False
        self.groups = min(2 * self.groups, heads)
        self._entries.clear()
        return True

    def order(self, name: str, grid: Grid, tile: Grid, device: torch.device) -> TokenOrder:
        """The token order of that name, see `order.make_order`, made once."""
        key = (grid, name, tile, device)
        if key not in self._orders:
            self._orders[key] = make_order(name, grid, tile, device)
        return self._orders[key]

    def only_orders_of(self, grid: Grid) -> None:
        """Drop the token orders of all other grids."""
        self._orders = {key: order for key, order in self._orders.items() if key[0] == grid}

    def refuse(self, case: Hashable, reason: str) -> None:
        """Calls of this case stay dense from now on."""
        self._refusals[case] = reason

    def refusal(self, cases: Iterable[Hashable]) -> str | None:
        """Why a call that belongs to these cases is not tried; None if it is."""
        if not self._refusals:
            return None
        return next((self._refusals[case] for case in cases if case in self._refusals), None)
