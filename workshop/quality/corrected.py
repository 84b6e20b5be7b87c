"""The product's correction written again, in little code that a try can change: the last dense step learns, levels are
kept, and in sparse steps some blocks are dense and learn again.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict

import torch
import torch.nn.functional as F

from ...choices.correction import Correction
from ...choices.settings import PatchSettings
from ...kernels.attention import AttentionResult, pyramid_sparse_attention
from ...kernels.delta import Delta, measure_delta
from ...kernels.falling import renews
from ...kernels.levels import BlockLists
from ...kernels.order import TokenLayout, make_order
from .attention import Calls
from .setting import Schedule

Place = tuple[int, int]
"""Row of the batch and block: where a call is known again in later steps."""


class Corrected:
    """Attention of one run with the product's correction. Begins with at least one dense step.

    gamma, renew: as in `Correction`.
    """

    def __init__(
        self,
        settings: PatchSettings,
        schedule: Schedule,
        grid: tuple[int, int, int],
        gamma: float | None = None,
        renew: int | None = None,
    ) -> None:
        self.settings, self.grid, self.blocks = settings, grid, schedule.blocks
        self.active = schedule.active(settings.start_percent, settings.end_percent)
        self.first, self.steps = self.active.index(True), len(self.active)
        self.gamma, self.renew = gamma or 0.0, renew or 0
        if self.first < self.least_dense_steps:
            raise ValueError(f"{self.first} dense steps are too few to learn from; raise start_percent")
        decided = Correction(gamma=gamma, renew=renew).decided(
            dataclasses.replace(settings.config, sparsity=1 - self._density()), 0.0, sum(self.active)
        )
        self.gamma, self.renew = decided.gamma, decided.renew
        self.config = dataclasses.replace(settings.config, sparsity=1 - self._density())
        self.step = self._block = 0
        self.lists: dict[Place, BlockLists] = {}
        self.deltas: dict[Place, Delta] = {}
        self._costs: dict[int, list[float | torch.Tensor]] = defaultdict(list)
        self._rows = 1
        self._made = dict.fromkeys(("dense", "sparse", "learning"), 0.0)

    least_dense_steps = 1

    def cost(self, step: int) -> tuple[float, float]:
        """Dense and sparse calls in a step, for one row of the batch."""
        if not self.active[step]:
            return self.blocks, self.blocks if step == self.first - 1 else 0
        turns = len(self.turns(step))
        return turns, self.blocks - (turns if step == self.steps - 1 else 0)

    def _density(self) -> float:
        """Density of the sparse calls at which the run costs what the settings say without any correction."""
        costs = [self.cost(step) for step in range(self.steps)]
        whole = sum(dense for (dense, _), active in zip(costs, self.active, strict=True) if active)
        budget = (1 - self.settings.config.sparsity) * sum(self.active) * self.blocks
        return (budget - whole) / sum(sparse for _, sparse in costs)

    def turns(self, step: int) -> list[int]:
        """The blocks whose turn it is to be dense in a sparse step."""
        return [block for block in range(self.blocks) if renews(step - self.first + 1, block, self.renew)]

    def renewed(self, row: int) -> list[int]:
        """The blocks that are dense in this sparse step."""
        return self.turns(self.step)

    def begin_step(self, step: int) -> None:
        """To be called before every model call."""
        self.step, self._block = step, 0

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Output [B, H, L, D] of q, k, v [B, H, L, D]."""
        block, self._rows = self._block, len(q)
        self._block += 1
        rows = [x.split(1) for x in (q, k, v)]
        return torch.cat([self._call((row, block), *one) for row, one in enumerate(zip(*rows, strict=True))])

    def _call(self, place: Place, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        active = self.active[self.step]
        if active and place[1] not in self.renewed(place[0]):
            return self.corrected(place, q, k, v)
        dense = F.scaled_dot_product_attention(q, k, v)
        self.count("dense", 1.0)
        if self.step < self.steps - 1 and (active or self.step >= self.first - self.least_dense_steps):
            self.learn(place, q, k, v, dense)
        return dense

    def learn(
        self, place: Place, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dense: torch.Tensor
    ) -> AttentionResult:
        """Choose levels and measure what they lose."""
        result = self.sparse(q, k, v, counts_as="learning")
        self.lists[place] = result.lists
        self.deltas[place] = measure_delta(dense, result.output, result.query_order, gamma=self.gamma)
        return result

    def corrected(self, place: Place, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """The output of a sparse call."""
        return self.sparse(q, k, v, self.lists[place], self.deltas[place]).output

    def sparse(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        lists: BlockLists | None = None,
        delta: Delta | None = None,
        *,
        counts_as: str = "sparse",
    ) -> AttentionResult:
        """A sparse call of one row; counts_as: its kind in `Calls`, or nothing."""
        result = pyramid_sparse_attention(
            q, k, v, self.config, layout=TokenLayout(self.grid), order=make_order(self.config.order, self.grid,
            self.config.tile, q.device), backend=self.settings.backend, lists=lists, delta=delta,
        )  # fmt: skip
        if counts_as:
            self.count(counts_as, result.density)
        return result

    def count(self, kind: str, share: float | torch.Tensor, calls: float = 1.0) -> None:
        """A call of this kind, or a part of one, was computed for one row, with this share of a dense call's work."""
        self._costs[self.step].append(share)
        self._made[kind] += calls

    def step_densities(self) -> list[float]:
        """The work of each step as a share of a dense step's."""
        return [sum(map(float, self._costs[step])) / (self.blocks * self._rows) for step in range(self.steps)]

    def calls(self) -> Calls:
        """What the run computed."""
        every = self.steps * self.blocks * self._rows
        return Calls(**{kind: count / every for kind, count in self._made.items()})
